"""expand-outer-products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import is_float_tensor, op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandOuterProducts(FxPass):
    """Repeat the first factor of an outer product of two tensors of one size.

    Before: `mul(unsqueeze(a [8, 32], -1), unsqueeze(b [8, 32], -2))` of shape [8, 32, 32]. After: the same with the
    first factor expanded to [8, 32, 32]. The HTP library takes the reshapes of such factors behind the product, as if
    they were equal, and multiplies a and b element by element: results without any likeness (cosine 0), at 8 and 16
    bits. Sums, quotients and factors of different sizes it computes rightly; they are left alone.
    """

    name: ClassVar[str] = "expand-outer-products"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        products = [node for node in model.graph.nodes if op_name(node) == "aten.mul" and _is_outer(node)]
        for node in products:
            first, second = node.args
            expanded = fx_graph.call(node, _aten.expand.default, (first, list(value_of(node).shape)))
            node.args = (expanded, second)
        fx_graph.finish(model)
        return PassResult(model, bool(products), tuple(f"expanded a factor of {layer_name(node)}" for node in products))


def _is_outer(node: Node) -> bool:
    """Whether both factors have the same number of elements, and the product more."""
    sizes = {value_of(factor).numel() for factor in node.args if isinstance(factor, Node) and is_float_tensor(factor)}
    return len(sizes) == 1 and max(sizes) < value_of(node).numel()
