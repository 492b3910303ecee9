"""transpose-cumsums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, is_float_tensor, op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class TransposeCumsums(FxPass):
    """Let cumulative sums run along the last dimension.

    Before: `cumsum(x, 1)` of x [B, L, D]. After: the same of x [B, D, L] along 2, transposed back. At 8 bits the HTP
    library computes only this form rightly where the zero point is not 0 (others are garbage: cosine 0.1). Does nothing
    to integers, and to sums that run along the last dimension.
    """

    name: ClassVar[str] = "transpose-cumsums"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        sums = [node for node in model.graph.nodes if op_name(node) == "aten.cumsum" and _runs_before_the_last(node)]
        changes = tuple(f"transposed {layer_name(node)}" for node in sums)
        for node in sums:
            _transpose(node)
        fx_graph.finish(model)
        return PassResult(model, bool(sums), changes)


def _runs_before_the_last(node: Node) -> bool:
    if not is_float_tensor(node) or value_of(node).ndim < 2:
        return False
    return bool(argument(node, 1) % value_of(node).ndim != value_of(node).ndim - 1)


def _transpose(node: Node) -> None:
    dimension = argument(node, 1)
    across = fx_graph.call(node, _aten.transpose.int, (node.args[0], dimension, -1))
    summed = fx_graph.call(node, _aten.cumsum.default, (across, -1), dict(node.kwargs))
    fx_graph.replace(node, fx_graph.call(node, _aten.transpose.int, (summed, dimension, -1)))
