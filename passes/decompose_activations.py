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
    """Write functions out that ONNX, or the HTP library, has no single op for, so that each tensor gets a quantizer.

    Before: `silu(x)`, `mish(x)`, `glu(x)`, `logsigmoid(x)`, `softplus(x, beta)`, `celu(x, alpha)`, `sinh(x)`,
    `logsumexp(x)`. After: `x * sigmoid(x)`, `x * tanh(softplus(x))`, `a * sigmoid(b)` of the two halves of x,
    `-softplus(-x)`, `softplus(beta * x) / beta`, `alpha * elu(x / alpha)`, `(exp(x) - exp(-x)) / 2`, `m + log(sum(exp(x
    - m)))` with the maximum m. Does nothing to other functions, and to those whose factor is 1.
    """

    name: ClassVar[str] = "decompose-activations"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            decompose = _DECOMPOSITIONS.get(op_name(node))
            if decompose is None or (op_name(node) == "aten.softplus" and _factor(node) == 1.0):
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


def _softplus(node: Node) -> Node:
    """Whose factor is not 1."""
    inner = fx_graph.call(node, _aten.mul.Tensor, (node.args[0], _factor(node)))
    outer = fx_graph.call(node, _aten.softplus.default, (inner,))
    return fx_graph.call(node, _aten.div.Tensor, (outer, _factor(node)))


def _celu(node: Node) -> Node:
    factor = _factor(node)
    if factor == 1.0:
        return fx_graph.call(node, _aten.elu.default, (node.args[0],))
    inner = fx_graph.call(node, _aten.div.Tensor, (node.args[0], factor))
    return fx_graph.call(node, _aten.mul.Tensor, (fx_graph.call(node, _aten.elu.default, (inner,)), factor))


def _factor(node: Node) -> float:
    """beta of a softplus, alpha of a celu."""
    value = argument(node, 1)
    return 1.0 if value is None else float(value)


def _sinh(node: Node) -> Node:
    rising = fx_graph.call(node, _aten.exp.default, (node.args[0],))
    falling = fx_graph.call(node, _aten.exp.default, (fx_graph.call(node, _aten.neg.default, (node.args[0],)),))
    return fx_graph.call(node, _aten.div.Tensor, (fx_graph.call(node, _aten.sub.Tensor, (rising, falling)), 2.0))


def _log_sum_exp(node: Node) -> Node:
    x, axes, keeps_axes = node.args[0], list(argument(node, 1)), bool(argument(node, 2))
    greatest = fx_graph.call(node, _aten.amax.default, (x, axes, True))
    powers = fx_graph.call(node, _aten.exp.default, (fx_graph.call(node, _aten.sub.Tensor, (x, greatest)),))
    total = fx_graph.call(node, _aten.sum.dim_IntList, (powers, axes, True))
    result = fx_graph.call(node, _aten.add.Tensor, (greatest, fx_graph.call(node, _aten.log.default, (total,))))
    return result if keeps_axes else fx_graph.call(node, _aten.reshape.default, (result, list(node.meta["val"].shape)))


_DECOMPOSITIONS: dict[str, Callable[[Node], Node]] = {
    "aten.silu": _silu,
    "aten.mish": _mish,
    "aten.glu": _glu,
    "aten.log_sigmoid": _log_sigmoid,
    "aten.softplus": _softplus,
    "aten.celu": _celu,
    "aten.sinh": _sinh,
    "aten.logsumexp": _log_sum_exp,
}
