"""flatten-silus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten
_TILE_SIDE, _TILE_CHANNELS = 8, 32


@dataclass(frozen=True)
class FlattenSilus(FxPass):
    """Compute the SiLU of tall narrow images of few channels without their height.

    Before: `mul(x, sigmoid(x))` of x [1, 8, 64, 4]. After: the same of [1, 8, 256], reshaped back. The HTP library
    makes one op of the two, and at 16 bits that is garbage (cosine 0) where an image is higher than 8, at most 8 wide,
    and has at most 32 channels, which may be its second or its last dimension. Does nothing to other shapes and to
    products with the sigmoid of something else.
    """

    name: ClassVar[str] = "flatten-silus"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            x = _silu_of(node)
            if x is None or not _is_tall(value_of(x).shape):
                continue
            flat = fx_graph.call(node, _aten.reshape.default, (x, [*value_of(x).shape[:2], -1]))
            product = fx_graph.call(node, _aten.mul.Tensor, (flat, fx_graph.call(node, _aten.sigmoid.default, (flat,))))
            fx_graph.replace(node, fx_graph.call(node, _aten.reshape.default, (product, list(value_of(x).shape))))
            changes.append(f"flattened {layer_name(x)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _silu_of(node: Node) -> Node | None:
    """x of `x * sigmoid(x)`."""
    if op_name(node) != "aten.mul":
        return None
    for x, gate in (node.args[:2], node.args[1::-1]):
        if isinstance(x, Node) and isinstance(gate, Node) and op_name(gate) == "aten.sigmoid" and gate.args[0] is x:
            return x
    return None


def _is_tall(shape: Sequence[int]) -> bool:
    if len(shape) != 4:
        return False
    first, second, last = shape[1:]
    layouts = ((second, last, first), (first, second, last))
    return any(high > _TILE_SIDE >= wide and deep <= _TILE_CHANNELS for high, wide, deep in layouts)
