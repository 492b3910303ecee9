"""decompose-activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeActivations(FxPass):
    """Write activation functions out that ONNX has no single op for, so that each of their tensors gets a quantizer.

    Before: `silu(x)`, `mish(x)`, `glu(x)`, `logsigmoid(x)`. After: `x * sigmoid(x)`, `x * tanh(softplus(x))`,
    `a * sigmoid(b)` of the two halves of x, `-softplus(-x)`. Does nothing to other functions.
    """

    name: ClassVar[str] = "decompose-activations"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            decompose = _DECOMPOSITIONS.get(op_name(node))
            if decompose is None:
                continue
            fx_graph.replace(node, decompose(node))
            changes.append(f"decomposed {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _silu(node: Node) -> Node:
    x = node.args[0]
    return fx_graph.call(node, _aten.mul.Tensor, (x, fx_graph.call(node, _aten.sigmoid.default, (x,))))


def _mish(node: Node) -> Node:
    x = node.args[0]
    softplus = fx_graph.call(node, _aten.softplus.default, (x,))
    return fx_graph.call(node, _aten.mul.Tensor, (x, fx_graph.call(node, _aten.tanh.default, (softplus,))))


def _glu(node: Node) -> Node:
    x, dimension = node.args[0], argument(node, 1)
    assert isinstance(x, Node)
    dimension = -1 if dimension is None else dimension
    half = x.meta["val"].shape[dimension] // 2
    first, second = (
        fx_graph.call(node, _aten.slice.Tensor, (x, dimension, start, start + half)) for start in (0, half)
    )
    return fx_graph.call(node, _aten.mul.Tensor, (first, fx_graph.call(node, _aten.sigmoid.default, (second,))))


def _log_sigmoid(node: Node) -> Node:
    softplus = fx_graph.call(node, _aten.softplus.default, (fx_graph.call(node, _aten.neg.default, (node.args[0],)),))
    return fx_graph.call(node, _aten.neg.default, (softplus,))


_DECOMPOSITIONS: dict[str, Callable[[Node], Node]] = {
    "aten.silu": _silu,
    "aten.mish": _mish,
    "aten.glu": _glu,
    "aten.log_sigmoid": _log_sigmoid,
}
