"""Taps: the tensors that chosen modules of a graph end with, for as long as a fine-tune wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.losses import BLOCKS
from fraqat_compiler.ops import is_float_tensor, module_path
from fraqat_compiler.widths import require_match

_TAPS = "feature_taps"


class Tap(nn.Module):
    """Passes a tensor on and keeps it."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        return x


Pairs = dict[str, list[tuple[Tensor, Tensor]]]


@contextmanager
def watched(student: GraphModule, teacher: Callable[..., Any], places: Sequence[str]) -> Iterator[Callable[[], Pairs]]:
    """See the tensors of both models at the same modules while the block runs.

    Args:
        student, teacher: two captured graphs of one model.
        places: patterns over module names, joined by commas, as in the loss `features`.

    Yields:
        What gives, by place, the (student's, teacher's) tensor of each module after both have run.

    Raises:
        UsageError: a pattern that matches nothing, or a teacher that was not captured.
    """
    if not places:
        yield dict
        return
    if not isinstance(teacher, GraphModule):
        raise UsageError("features can only be compared with a captured teacher.", "Pass what capture() returned.")
    modules = {place: modules_at(teacher, place) for place in places}
    every = list(dict.fromkeys(module for found in modules.values() for module in found))
    with tapped(teacher, every) as theirs, tapped(student, every) as mine:
        yield lambda: {
            place: [(mine[module].value, theirs[module].value) for module in found] for place, found in modules.items()
        }


@contextmanager
def tapped(graph: GraphModule, modules: list[str]) -> Iterator[dict[str, Tap]]:
    """Tap the last tensor of each module while the block runs.

    Args:
        graph: the float graph, or one with fake quants: then the tensor is the quantized one.
        modules: dotted names of the user's modules.

    Yields:
        A tap for each module; after a forward its `value` is that tensor, any shape, with its gradient.
    """
    taps, nodes = {module: Tap() for module in modules}, []
    for index, (module, tap) in enumerate(taps.items()):
        graph.add_submodule(f"{_TAPS}.{index}", tap)
        last = _last_tensor(graph, module)
        with graph.graph.inserting_after(last):
            nodes.append(graph.graph.call_module(f"{_TAPS}.{index}", (last,)))
    graph.recompile()
    try:
        yield taps
    finally:
        for node in nodes:
            graph.graph.erase_node(node)
        graph.delete_submodule(_TAPS)
        graph.recompile()


def modules_at(graph: GraphModule, patterns: str) -> list[str]:
    """Modules that compute a float tensor and match one of the patterns (joined by commas), the outermost ones.

    Instead of patterns, `blocks`: the outermost members of lists of modules, whose names end with a number; maybe none.

    Raises:
        UsageError: a pattern that matches none.
    """
    paths = dict.fromkeys(module_path(node) for node in graph.graph.nodes if _computes(graph, node))
    known = dict.fromkeys(name for path in paths if path for name in _with_owners(path))
    if patterns == BLOCKS:
        return _outermost(name for name in known if name.rpartition(".")[2].isdigit())
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        require_match(pattern, known)
    return _outermost(name for name in known if any(fnmatchcase(name, pattern) for pattern in wanted))


def _outermost(modules: Iterable[str]) -> list[str]:
    matching = dict.fromkeys(modules)
    return [name for name in matching if not matching.keys() & {*_with_owners(name)[:-1]}]


def _with_owners(path: str) -> list[str]:
    """`a.b.c` as a, a.b, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _last_tensor(graph: GraphModule, module: str) -> Node:
    nodes: list[Node] = [node for node in graph.graph.nodes if _computes(graph, node)]
    return [node for node in nodes if f"{module_path(node)}.".startswith(f"{module}.")][-1]


def _computes(graph: GraphModule, node: Node) -> bool:
    """Whether the model computes a float tensor here: an op, or the fake quant of one."""
    if not is_float_tensor(node):
        return False
    is_quantizer = node.op == "call_module" and isinstance(
        graph.get_submodule(str(node.target)), ActivationFakeQuantize
    )
    return node.op == "call_function" or is_quantizer
