"""mask-triangles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten
_TRIANGLES = {"aten.tril": torch.tril, "aten.triu": torch.triu}


@dataclass(frozen=True)
class MaskTriangles(FxPass):
    """Keep one triangle of a matrix by a product with a mask.

    Before: `tril(x, k)` or `triu(x, k)` of activations, which become Trilu, an op that the HTP library refuses. After:
    `x * mask` with a constant of 1 and 0. Does nothing to integers and booleans, whose masks fold-constants computes.
    """

    name: ClassVar[str] = "mask-triangles"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) in _TRIANGLES and node.meta["val"].is_floating_point():
                changes.append(f"masked {layer_name(node)}")
                _mask(model, node)
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _mask(model: GraphModule, node: Node) -> None:
    value = node.meta["val"]
    ones = torch.ones(value.shape[-2:], dtype=value.dtype)
    mask = _TRIANGLES[op_name(node)](ones, argument(node, 1) or 0)
    constant = fx_graph.add_constant(model, node, f"{module_path(node)}.{node.name}_mask".lstrip("."), mask)
    fx_graph.replace(node, fx_graph.call(node, _aten.mul.Tensor, (node.args[0], constant)))
