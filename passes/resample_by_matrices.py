"""resample-by-matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, module_path, op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten

RESAMPLING = "_resampling"  # the end of a matrix's name
_POOLS = {"aten.adaptive_avg_pool1d": 1, "aten.adaptive_avg_pool2d": 2}
_ANTIALIASED: dict[Any, Any] = {
    _aten._upsample_bilinear2d_aa.vec: _aten._upsample_bilinear2d_aa.default,
    _aten._upsample_bicubic2d_aa.vec: _aten._upsample_bicubic2d_aa.default,
}


@dataclass(frozen=True)
class ResampleByMatrices(FxPass):
    """Resample images by a product with one constant matrix for each dimension, where the HTP library has no op.

    Before: `adaptive_avg_pool2d(x [1, 8, 10, 14], [4, 4])`, whose windows differ in size, or an antialiased resize of
    `interpolate`. After: `linear(x, [4, 14])`, transposed, `linear(x, [4, 10])` and transposed back, in the order that
    takes fewer multiplications. Each row of an average's matrix is one value beside zeros, exact at every width of
    weights; those of a resize are not, so target `htp` asks for 8 bits at least. Matrices are dense, 1024 columns to
    256 take 256 KiB. Does nothing to pools whose windows are all of one size, and to a dimension that stays as it is.
    """

    name: ClassVar[str] = "resample-by-matrices"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        resamplings = [node for node in model.graph.nodes if _is_uneven(node) or node.target in _ANTIALIASED]
        for node in resamplings:
            fx_graph.replace(node, _resampled(model, node))
        fx_graph.finish(model)
        changes = tuple(f"resampled {layer_name(node)} by matrices" for node in resamplings)
        return PassResult(model, bool(changes), changes)


def _is_uneven(node: Node) -> bool:
    """Whether it averages over windows of different sizes."""
    return op_name(node) in _POOLS and any(whole % part for whole, part in _sizes(node).values())


def _sizes(node: Node) -> dict[int, tuple[int, int]]:
    """Length before and after of each dimension that is resampled, which counts from the end."""
    before, after = value_of(node.all_input_nodes[0]).shape, value_of(node).shape
    count = _POOLS.get(op_name(node), 2)
    return {axis: (before[axis], after[axis]) for axis in range(-count, 0)}


def _resampled(model: GraphModule, node: Node) -> Node:
    result, sizes = node.args[0], _sizes(node)
    # Along columns first it takes H W W' + H W' H' products, along rows first H W H' + W H' W': H W H' W' times
    # 1 / H' + 1 / W, or 1 / W' + 1 / H.
    for axis in sorted(sizes, key=lambda axis: 1 / sizes[axis][0] - 1 / sizes[axis][1]):
        matrix = _matrix(node, axis, *sizes[axis])
        if matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix))):
            continue
        name = f"{module_path(node)}.{node.name}_{'rows' if axis == -2 else 'columns'}{RESAMPLING}".lstrip(".")
        result = _product(node, result, axis, fx_graph.add_constant(model, node, name, matrix))
    assert isinstance(result, Node)
    return result


def _matrix(node: Node, axis: int, before: int, after: int) -> Tensor:
    """The (after, before) weight of a linear layer along one dimension: what the op makes of unit vectors."""
    units = torch.eye(before)[None]
    if op_name(node) in _POOLS:
        return torch.nn.functional.adaptive_avg_pool1d(units, after)[0].T.contiguous()
    scales = argument(node, 3)
    resize = _ANTIALIASED[node.target]
    images: Tensor = resize(units[:, :, None], [1, after], argument(node, 2), None, scales and scales[axis])
    return images[0, :, 0].T.contiguous()


def _product(node: Node, x: object, axis: int, matrix: Node) -> Node:
    if axis == -1:
        return fx_graph.call(node, _aten.linear.default, (x, matrix))
    turned = fx_graph.call(node, _aten.transpose.int, (x, -1, -2))
    product = fx_graph.call(node, _aten.linear.default, (turned, matrix))
    return fx_graph.call(node, _aten.transpose.int, (product, -1, -2))
