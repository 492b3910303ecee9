"""scatter-rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, is_float_tensor, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten
_SHAPE_OPS = frozenset(f"aten.{name}" for name in ("expand", "reshape", "view", "unsqueeze", "squeeze"))


@dataclass(frozen=True)
class ScatterRows(FxPass):
    """Write whole rows by their number where `scatter` has it for every element, as caches of keys and values do.

    Before: `scatter(cache, 2, position.view(1, 1, 1, 1).expand(1, 8, 1, 64), key)`. After: `index_copy(cache, 2,
    position, key)`, a ScatterND in ONNX, where the former is a ScatterElements: that the HTP library accepts, and
    writes wrong values. Does nothing where an index is not the same along all other dimensions, or where rows are
    written in part.
    """

    name: ClassVar[str] = "scatter-rows"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if node.target is not _aten.scatter.src or not is_float_tensor(node):
                continue
            rows = _rows(model, node)
            if rows is not None:
                fx_graph.replace(node, _copied(node, rows))
                changes.append(f"wrote rows in {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _rows(model: GraphModule, node: Node) -> Node | None:
    """The numbers of the rows in one dimension; None where elements of a row differ, or are left out."""
    x, axis, index, source = (argument(node, position) for position in range(4))
    shape, written = list(x.meta["val"].shape), list(index.meta["val"].shape)
    count = written[axis]
    whole = [count if dimension == axis % len(shape) else size for dimension, size in enumerate(shape)]
    if written != whole or list(source.meta["val"].shape) != whole:
        return None
    constant = fx_graph.constant_of(model, index)
    if constant is not None:
        return _constant_rows(model, node, constant, axis)
    origin = _before_shape_ops(index)
    if origin.meta["val"].numel() != count or not _lies_along(index, origin, axis):
        return None
    return fx_graph.call(node, _aten.reshape.default, (origin, [count]))


def _constant_rows(model: GraphModule, node: Node, index: Tensor, axis: int) -> Node | None:
    rows = index.movedim(axis, 0).reshape(index.shape[axis], -1)
    if not (rows == rows[:, :1]).all():
        return None
    return fx_graph.add_constant(model, node, f"{node.name}_rows", rows[:, 0].clone())


def _before_shape_ops(node: Node) -> Node:
    while op_name(node) in _SHAPE_OPS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _lies_along(index: Node, origin: Node, axis: int) -> bool:
    """Whether the index repeats the numbers of its origin along all dimensions but one: as seen on sample numbers."""
    sample: Any = torch.arange(origin.meta["val"].numel()).reshape(origin.meta["val"].shape)
    steps = []
    while index is not origin:
        steps.append(index)
        index = index.args[0]  # type: ignore[assignment]
    for step in reversed(steps):
        sample = step.target(sample, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    rows = sample.movedim(axis, 0).reshape(sample.shape[axis], -1)
    return bool((rows == torch.arange(len(rows))[:, None]).all())


def _copied(node: Node, rows: Node) -> Node:
    return fx_graph.call(node, _aten.index_copy.default, (node.args[0], argument(node, 1), rows, argument(node, 3)))
