"""decompose-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeAttention(FxPass):
    """Write scaled dot-product attention out, so that each of its tensors gets a quantizer.

    Before: `scaled_dot_product_attention(q, k, v, mask)`. After: `matmul(softmax(matmul(q * scale, k^T) + mask), v)`
    with scale = 1 / sqrt(head size) unless given. A causal or boolean mask becomes an additive one that holds
    `mask_value` (finite, because a quantizer has to span it); one that lets all pass is dropped. Does nothing to a
    graph without the fused call.
    """

    name: ClassVar[str] = "decompose-attention"
    mask_value: float = -50.0

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) != "aten.scaled_dot_product_attention":
                continue
            fx_graph.replace(node, self._decompose(model, node))
            changes.append(f"decomposed {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))

    def _decompose(self, model: GraphModule, node: Node) -> Node:
        arguments = _arguments(node)
        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        if arguments["enable_gqa"]:
            key, value = _repeat_heads(node, key, query), _repeat_heads(node, value, query)
        scale = arguments["scale"] or query.meta["val"].shape[-1] ** -0.5
        scaled = fx_graph.call(node, _aten.mul.Tensor, (query, scale))
        transposed = fx_graph.call(node, _aten.transpose.int, (key, -2, -1))
        scores = fx_graph.call(node, _aten.matmul.default, (scaled, transposed))
        mask = self._additive_mask(model, node, scores, arguments)
        if mask is not None:
            scores = fx_graph.call(node, _aten.add.Tensor, (scores, mask))
        weights = fx_graph.call(node, _aten.softmax.int, (scores, -1))
        return fx_graph.call(node, _aten.matmul.default, (weights, value))

    def _additive_mask(self, model: GraphModule, node: Node, scores: Node, arguments: dict[str, Any]) -> Node | None:
        if arguments["is_causal"]:
            rows, columns = scores.meta["val"].shape[-2:]
            above = torch.ones(rows, columns, dtype=torch.bool).triu(1)
            return fx_graph.add_constant(model, node, f"{node.name}_mask", above.float() * self.mask_value)
        mask = arguments["attn_mask"]
        if mask is None or mask.meta["val"].dtype is not torch.bool:
            return mask  # type: ignore[no-any-return]
        constant = fx_graph.constant_of(model, mask)
        if constant is not None and bool(constant.all()):
            return None
        if constant is not None:
            return fx_graph.add_constant(model, node, f"{node.name}_mask", (~constant).float() * self.mask_value)
        kept = fx_graph.call(node, _aten._to_copy.default, (mask,), {"dtype": torch.float32})
        dropped = fx_graph.call(node, _aten.sub.Tensor, (kept, 1.0))
        return fx_graph.call(node, _aten.mul.Tensor, (dropped, -self.mask_value))


def _arguments(node: Node) -> dict[str, Any]:
    """Every argument of the fused call by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((item.name for item in schema), node.args, strict=False)) | dict(node.kwargs)
    return {
        item.name: given.get(item.name, item.default_value if item.has_default_value() else None) for item in schema
    }


def _repeat_heads(node: Node, tensor: Node, query: Node) -> Node:
    """Grouped-query attention: repeat each key/value head for the query heads that share it."""
    batch, heads, length, size = tensor.meta["val"].shape
    repeats = query.meta["val"].shape[1] // heads
    if repeats == 1:
        return tensor
    separate = fx_graph.call(node, _aten.unsqueeze.default, (tensor, 2))
    repeated = fx_graph.call(node, _aten.expand.default, (separate, [batch, heads, repeats, length, size]))
    return fx_graph.call(node, _aten.reshape.default, (repeated, [batch, heads * repeats, length, size]))
