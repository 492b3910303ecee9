"""Random small programs of tensors, between two linear layers; `fuzz_htp.py` compiles them.

A program is two to five ops, without those that its result does not need. It is Python: what is printed is what is
computed, with x0 the result of the first layer. A seed names a program, its weights and its input.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (2, 8, 32)
OPS = (2, 5)  # in a program, at least and at most
ELEMENTS = (8, 40_000)  # of a tensor
MAX_RANK = 5  # HTP has no more
CHAINED = 0.75  # of the ops take the newest tensor, so that faults of neighbours show
CONSTANT = 1e-5  # of the greatest magnitude; a mean of a softmax varies by float32's rounding


class Value(NamedTuple):
    """A tensor of a program."""

    name: str
    shape: tuple[int, ...]


Draw = Callable[[random.Random, Value, Value], str]  # an expression of the first tensor, and maybe the second

UNARY = (
    "{x}.relu()",
    "{x}.sigmoid()",
    "{x}.tanh()",
    "F.gelu({x})",
    "F.silu({x})",
    "F.hardswish({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.elu({x})",
    "F.softplus({x})",
    "{x}.softmax(-1)",
    "{x}.softmax(1)",
    "F.layer_norm({x}, {x}.shape[-1:])",
    "{x}.mean(-1, keepdim=True)",
    "{x}.mean(1, keepdim=True)",
    "{x}.amax(-1, keepdim=True)",
    "{x}.sum(-2, keepdim=True) * 0.1",
    "-{x}",
    "{x}.abs()",
    "{x} * {x}",
    "{x}.clamp(-0.5, 0.7)",
    "({x}.abs() + 0.1).sqrt()",
    "{x}.clamp(max=1).exp()",
    "1 / ({x}.abs() + 0.5)",
)
BINARY = ("{x} + {y}", "{x} * {y}", "{x} - {y}", "torch.maximum({x}, {y})")


def unary(rng: random.Random, x: Value, _: Value) -> str:
    """An op of one tensor that leaves its layout."""
    return rng.choice(UNARY).format(x=x.name)


def binary(rng: random.Random, x: Value, y: Value) -> str:
    """Arithmetic of two tensors, sometimes as an outer product."""
    names = [x.name, y.name]
    if rng.random() < 0.4:
        names = [f"{of.name}.unsqueeze({rng.randint(1, len(of.shape))})" for of in (x, y)]
    return rng.choice(BINARY).format(x=names[0], y=names[1])


def reshape(rng: random.Random, x: Value, _: Value) -> str:
    """The same elements in one to three dimensions behind the batch, sometimes with one of size 1."""
    sizes = [1] * rng.randint(1, 3)
    for factor in prime_factors(torch.Size(x.shape[1:]).numel()):
        sizes[rng.randrange(len(sizes))] *= factor
    if rng.random() < 0.3:
        sizes.insert(rng.randint(0, len(sizes)), 1)
    return f"{x.name}.reshape({_list([x.shape[0], *sizes])})"


def prime_factors(number: int) -> list[int]:
    """Smallest first; none of 1."""
    factor = next((factor for factor in range(2, number + 1) if number % factor == 0), 1)
    return [] if factor == 1 else [factor, *prime_factors(number // factor)]


def permute(rng: random.Random, x: Value, _: Value) -> str:
    """The dimensions behind the batch in another order."""
    rest = list(range(1, len(x.shape)))
    return f"{x.name}.permute({_list([0, *rng.sample(rest, len(rest))])})"


def narrow(rng: random.Random, x: Value, _: Value) -> str:
    """A part of one dimension, sometimes every second element of it."""
    dim = rng.randrange(1, len(x.shape))
    begin, end = sorted(rng.sample(range(x.shape[dim] + 1), 2))
    step = rng.choice(["", "", "", ":2"])
    return f"{x.name}[{':, ' * dim}{begin}:{end}{step}]"


def concat(rng: random.Random, x: Value, y: Value) -> str:
    """Two tensors behind each other."""
    return f"torch.cat([{x.name}, {y.name}], {rng.randrange(1, len(x.shape))})"


def stack(rng: random.Random, x: Value, y: Value) -> str:
    """Two tensors in a new dimension."""
    return f"torch.stack([{x.name}, {y.name}], {rng.randint(1, len(x.shape))})"


def product(_: random.Random, x: Value, y: Value) -> str:
    """A product of matrices, as of attention."""
    return f"{x.name} @ {y.name}.transpose(-1, -2) * 0.2"


def flip(rng: random.Random, x: Value, _: Value) -> str:
    """One dimension backwards."""
    return f"{x.name}.flip({rng.randrange(1, len(x.shape))})"


def expand(rng: random.Random, x: Value, _: Value) -> str:
    """The tensor several times in a new dimension."""
    sizes = [-1] * len(x.shape)
    dim, count = rng.randint(1, len(x.shape)), rng.choice([2, 3, 4])
    return f"{x.name}.unsqueeze({dim}).expand({_list([*sizes[:dim], count, *sizes[dim:]])})"


def pad(rng: random.Random, x: Value, _: Value) -> str:
    """The last dimension with a margin; PyTorch repeats and mirrors only tensors of three dimensions like this."""
    modes = ["constant", "replicate", "reflect"] if len(x.shape) == 3 else ["constant"]
    return f'F.pad({x.name}, ({rng.choice([1, 2])}, 1), mode="{rng.choice(modes)}")'


def gate(_: random.Random, x: Value, __: Value) -> str:
    """One half of the last dimension times the sigmoid of the other."""
    return f"F.glu({x.name}, -1)"


def every_second(rng: random.Random, x: Value, _: Value) -> str:
    """Of the last dimension taken in pairs, as for rotary positions, the first or the second."""
    which = rng.choice([0, 1])
    if len(x.shape) == MAX_RANK:  # pairs would be one dimension more
        return f"{x.name}[..., {which}::2]"
    return f"{x.name}.reshape({_list([*x.shape[:-1], x.shape[-1] // 2, 2])})[..., {which}]"


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


# How often each is drawn, beside the others.
CATALOGUE: dict[Draw, int] = {
    binary: 3,
    unary: 2,
    reshape: 2,
    permute: 1,
    narrow: 1,
    concat: 1,
    stack: 1,
    product: 1,
    flip: 1,
    expand: 1,
    pad: 1,
    gate: 1,
    every_second: 1,
}


@dataclass(frozen=True)
class Program:
    """Expressions by the names of their results, in order; x0 is given, the last is the result."""

    expressions: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{name} = {expression}" for name, expression in self.expressions.items())

    def values(self, x0: Tensor) -> dict[str, Tensor]:
        """All tensors by name, in order.

        Raises:
            RuntimeError, IndexError: shapes that do not fit.
        """
        values = {"x0": x0}
        for name, expression in self.expressions.items():
            values[name] = eval(expression, {"torch": torch, "F": F}, values)  # our own text, never a file's
        return values


def program_of(seed: int) -> Program:
    """The program of a seed: shapes alone decide on it, so that it is the same on every machine."""
    rng, expressions = random.Random(seed), dict[str, str]()
    count = rng.randint(*OPS)
    while len(expressions) < count:
        pool = [Value(name, tuple(of.shape)) for name, of in shapes(Program(expressions)).items()]
        x = pool[-1] if rng.random() < CHAINED else rng.choice(pool)
        (draw,) = rng.choices(list(CATALOGUE), list(CATALOGUE.values()))
        longer = expressions | {f"x{len(pool)}": draw(rng, x, rng.choice(pool))}
        expressions = longer if fits(Program(longer)) else expressions
    return needed(Program(expressions))


def shapes(program: Program) -> dict[str, Tensor]:
    """The program's tensors without contents."""
    return program.values(torch.empty(SHAPE, device="meta"))


def fits(program: Program) -> bool:
    """Whether the last expression is valid and neither too large nor too small."""
    try:
        result = list(shapes(program).values())[-1]
    except (RuntimeError, IndexError):
        return False
    return ELEMENTS[0] <= result.numel() <= ELEMENTS[1] and result.ndim <= MAX_RANK


def needed(program: Program) -> Program:
    """The program without what its result does not depend on."""
    kept: dict[str, str] = {}
    wanted = {list(program.expressions)[-1]}
    for name, expression in reversed(list(program.expressions.items())):
        if name in wanted:
            kept[name] = expression
            wanted |= set(re.findall(r"\bx\d+\b", expression))
    return Program(dict(reversed(list(kept.items()))))


class Net(nn.Module):
    """A program between two linear layers."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.first = nn.Linear(SHAPE[-1], SHAPE[-1])
        self.last = nn.Linear(list(shapes(program).values())[-1].shape[-1], 16)

    def values(self, x: Tensor) -> list[Tensor]:
        """All tensors in front of the last layer."""
        return list(self.program.values(self.first(x)).values())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.values(x)[-1])
        return result


def case(seed: int) -> tuple[Net, Tensor]:
    """The net of a seed and its input."""
    torch.manual_seed(seed)
    return Net(program_of(seed)).eval(), torch.randn(SHAPE)


def says_nothing(seed: int) -> bool:
    """Whether a tensor of the program is constant: its quantizer has no range, and its cosine no meaning."""
    net, x = case(seed)
    with torch.no_grad():
        return any(value.max() - value.min() <= CONSTANT * value.abs().max() for value in net.values(x))
