"""merge-dimensions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, is_float_tensor, op_class, op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten
_SPATIAL = ("aten.conv3d", "aten.conv_transpose3d", "aten.max_pool3d", "aten.avg_pool3d", "aten.upsample_nearest3d")
_OF_ONE_DIMENSION = ("aten.prelu", "aten.glu", "aten.log_softmax", "aten._log_softmax")  # activations that know one


@dataclass(frozen=True)
class MergeDimensions(FxPass):
    """Compute tensors of more than `rank` dimensions with those merged that an op treats alike.

    Before: `softmax(x [2, 3, 4, 5, 6], -1)`, `linear(x [2, 3, 4, 5, 6])`, `x [2, 3, 4, 5, 6] + y [3, 4, 1, 6]`,
    `mean(x, (1, 2))`. After: the same of [6, 4, 5, 6], [120, 6], [2, 12, 5, 6] and [2, 12, 5, 6], reshaped back;
    reshapes that meet become one in `simplify-shapes`. The first dimensions are merged first: the last ones make the
    layout in memory. The HTP library refuses some ops of rank 5, and takes a transpose of heads through the ops behind
    it to where rank 5 begins, wrongly (cosine 0). Does nothing in graphs of three-dimensional convolutions, whose
    layout it would break up, nor where more than `rank` dimensions are left.
    """

    name: ClassVar[str] = "merge-dimensions"
    rank: int = 4

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        nodes = list(model.graph.nodes)
        changes = []
        for node in nodes if not any(op_name(node) in _SPATIAL for node in nodes) else []:
            merged = _merged(node, self.rank) if _ranks(node) > self.rank else None
            if merged is not None and _ranks(merged) <= self.rank:
                result = fx_graph.call(node, _aten.reshape.default, (merged, list(value_of(node).shape)))
                changes.append(f"merged dimensions of {layer_name(node)}")
                fx_graph.replace(node, result)
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _ranks(node: Node) -> int:
    """The highest rank among a computed float tensor and what it is computed from."""
    if node.op != "call_function" or not is_float_tensor(node):
        return 0
    return max(int(value_of(tensor).ndim) for tensor in (node, *node.all_input_nodes) if is_float_tensor(tensor))


def _merged(node: Node, rank: int) -> Node | None:
    """The op on so many dimensions, or more where they cannot be merged; None where it is not known how."""
    kind = op_class(node)
    if kind == "elementwise" or (kind == "activation" and op_name(node) not in _OF_ONE_DIMENSION):
        return _elementwise(node, rank)
    rewrite = _REWRITES.get(op_name(node))
    if rewrite is None or node.all_input_nodes[0].op == "get_attr":  # a weight keeps its shape
        return None
    return rewrite(node, rank)


def _elementwise(node: Node, rank: int) -> Node | None:
    """Neighbours become one that each operand repeats alike."""
    shape = list(value_of(node).shape)
    operands = {operand: _aligned(operand, len(shape)) for operand in node.all_input_nodes}
    runs = _runs(len(shape), rank, lambda dimension: tuple(sizes[dimension] == 1 for sizes in operands.values()))
    shaped = {operand: _reshaped(node, operand, _sizes(sizes, runs)) for operand, sizes in operands.items()}
    if None in shaped.values():
        return None
    args = torch.fx.node.map_arg(node.args, shaped.__getitem__)
    return fx_graph.call(node, node.target, args, dict(node.kwargs))


def _softmax(node: Node, rank: int) -> Node | None:
    x = node.args[0]
    assert isinstance(x, Node)
    shape = list(value_of(x).shape)
    axis = argument(node, 1) % len(shape)
    runs = _runs(len(shape), rank, lambda dimension: dimension == axis)
    shaped = _reshaped(node, x, _sizes(shape, runs))
    return fx_graph.call(node, node.target, (shaped, runs.index([axis]), *node.args[2:]), dict(node.kwargs))


def _reduction(node: Node, rank: int) -> Node | None:
    x, axes = node.args[0], argument(node, 1)
    assert isinstance(x, Node)
    shape = list(value_of(x).shape)
    given = [axes] if isinstance(axes, int) else axes or range(len(shape))
    reduced = {axis % len(shape) for axis in given}
    runs = _runs(len(shape), rank, lambda dimension: dimension in reduced)
    places = [place for place, run in enumerate(runs) if run[0] in reduced]
    shaped = _reshaped(node, x, _sizes(shape, runs))
    return fx_graph.call(node, _OVER_DIMENSIONS.get(op_name(node), node.target), (shaped, places))


def _rows(node: Node, rank: int) -> Node | None:
    """All dimensions but those that a linear layer or a norm works along become one."""
    x = node.args[0]
    assert isinstance(x, Node)
    kept = 1 if op_name(node) == "aten.linear" else len(argument(node, 1))
    shape = list(value_of(x).shape)
    shaped = _reshaped(node, x, [prod(shape[:-kept]), *shape[-kept:]])
    return fx_graph.call(node, node.target, (shaped, *node.args[1:]), dict(node.kwargs))


def _matmul(node: Node, rank: int) -> Node | None:
    """Of as many matrices on both sides."""
    shapes = [list(value_of(operand).shape) for operand in node.args if isinstance(operand, Node)]
    if len(shapes) != 2 or shapes[0][:-2] != shapes[1][:-2]:
        return None
    factors = [
        _reshaped(node, operand, [prod(shape[:-2]), *shape[-2:]])
        for operand, shape in zip(node.args, shapes, strict=True)
        if isinstance(operand, Node)
    ]
    return None if None in factors else fx_graph.call(node, node.target, tuple(factors))


def _runs(dimensions: int, most: int, key: Callable[[int], Hashable]) -> list[list[int]]:
    """Dimensions in order, with neighbours of one key together, from the first on, until there are `most`."""
    runs = [[dimension] for dimension in range(dimensions)]
    place = 0
    while len(runs) > most and place + 1 < len(runs):
        if key(runs[place][0]) == key(runs[place + 1][0]):
            runs[place] += runs.pop(place + 1)
        else:
            place += 1
    return runs


def _sizes(shape: Sequence[int], runs: Sequence[Sequence[int]]) -> list[int]:
    return [prod(shape[dimension] for dimension in run) for run in runs]


def _aligned(operand: Node, rank: int) -> list[int]:
    shape = list(value_of(operand).shape)
    return [1] * (rank - len(shape)) + shape


def _reshaped(node: Node, operand: Node, shape: list[int]) -> Node | None:
    """An operand in another shape; None for a weight, which keeps its own."""
    own = list(value_of(operand).shape)
    if _without_leading_ones(own) == _without_leading_ones(shape) and len(own) <= len(shape):
        return operand
    return None if operand.op == "get_attr" else fx_graph.call(node, _aten.reshape.default, (operand, shape))


def _without_leading_ones(shape: list[int]) -> list[int]:
    first = next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


_OVER_DIMENSIONS: dict[str, Any] = {"aten.mean": _aten.mean.dim, "aten.sum": _aten.sum.dim_IntList}
_REWRITES: dict[str, Callable[[Node, int], Node | None]] = {
    **dict.fromkeys(("aten.mean", "aten.sum", "aten.amax", "aten.amin"), _reduction),
    "aten.softmax": _softmax,
    "aten._softmax": _softmax,
    "aten.matmul": _matmul,
    "aten.linear": _rows,
    "aten.layer_norm": _rows,
    "aten.rms_norm": _rows,
}
