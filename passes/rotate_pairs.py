"""rotate-pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class RotatePairs(FxPass):
    """Turn neighbours in the last dimension by 90 degrees with a matrix, as rotary positions of FLUX do.

    Before: `stack([-x[..., 1::2], x[..., 0::2]], -1)`, or the same of `unbind`, and flat again. After: `linear(x, p)`
    with a matrix of 0, 1 and -1, which every width of weights holds exactly. The HTP library takes the odd half over
    without regard to its zero point where a norm comes before it (off by 8,000 steps at 16 bits); and rows of two
    elements are the slowest layout there is. Does nothing to halves that are not interleaved.
    """

    name: ClassVar[str] = "rotate-pairs"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in model.graph.find_nodes(op="call_function", target=_aten.stack.default):
            x, flat = _rotated(node), _only_user(node)
            if x is None or flat is None or flat.meta["val"].shape != x.meta["val"].shape:
                continue
            name = f"{module_path(flat)}.{flat.name}_rotation".lstrip(".")
            matrix = fx_graph.add_constant(model, flat, name, rotation(x.meta["val"].shape[-1]))
            fx_graph.replace(flat, fx_graph.call(flat, _aten.linear.default, (x, matrix)))
            changes.append(f"rotated pairs of {layer_name(flat)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def rotation(size: int) -> Tensor:
    """The (size, size) weight of a linear layer that takes (a, b, c, d ...) to (-b, a, -d, c ...)."""
    return torch.kron(torch.eye(size // 2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


def _rotated(stack: Node) -> Node | None:
    """x of `stack([-odd(x), even(x)], -1)`."""
    parts, axis = stack.args[0], argument(stack, 1) or 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (-1, stack.meta["val"].ndim - 1):
        return None
    negated, even = parts
    if not isinstance(negated, Node) or op_name(negated) != "aten.neg":
        return None
    sources = _source(negated.args[0], 1), _source(even, 0)
    return sources[0] if sources[0] is sources[1] else None


def _source(part: Any, first: int) -> Node | None:
    """x where a node is every second element of its last dimension, from `first` on."""
    if not isinstance(part, Node) or not isinstance(part.args[0], Node):
        return None
    whole = part.args[0]
    if op_name(part) == "aten.slice":
        axis, start, step = (argument(part, index) for index in (1, 2, 4))
        is_half = axis in (-1, whole.meta["val"].ndim - 1) and (start or 0) == first and step == 2
        covers = part.meta["val"].shape[-1] * 2 == whole.meta["val"].shape[-1]
        return whole if is_half and covers else None
    if op_name(whole) != "aten.unbind" or part.args[1] != first:
        return None
    return _paired(whole)


def _paired(unbind: Node) -> Node | None:
    """x where an unbind takes the pairs of its last dimension apart."""
    pairs = unbind.args[0]
    if not isinstance(pairs, Node) or op_name(pairs) not in ("aten.view", "aten.reshape"):
        return None
    x, shape = pairs.args[0], list(pairs.meta["val"].shape)
    if not isinstance(x, Node) or shape[-1] != 2 or argument(unbind, 1) not in (-1, len(shape) - 1):
        return None
    return x if list(x.meta["val"].shape) == [*shape[:-2], math.prod(shape[-2:])] else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    is_flat = len(users) == 1 and op_name(users[0]) in ("aten.view", "aten.reshape", "aten.flatten")
    return users[0] if is_flat else None
