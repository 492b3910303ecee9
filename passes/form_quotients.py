"""form-quotients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class FormQuotients(FxPass):
    """Divide instead of multiplying with a reciprocal.

    Before: `x * rsqrt(y)`, `x * reciprocal(y)` or `x * y ** -0.5`. After: `x / sqrt(y)`, `x / y`, and `1 / y` where the
    reciprocal is wanted itself. The HTP library scales a reciprocal wrongly where what it is of stays below 1 (slope
    0.63 behind a root, 65 of 255 steps behind a softmax), and that of a root without a quantizer of its own strays by
    10 to 20 steps in the mean at 16 bits. Quotients it computes rightly. Does nothing to other powers.
    """

    name: ClassVar[str] = "form-quotients"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            divisor = _divisor(node)
            if divisor is not None:
                changes.append(f"divided by {layer_name(node)}")
                _divide(model, node, divisor)
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _divisor(node: Node) -> Node | None:
    """y where a node is `1 / y`."""
    if op_name(node) == "aten.rsqrt" or _is_power(node, -0.5):
        return fx_graph.call(node, _aten.sqrt.default, (node.args[0],))
    if op_name(node) != "aten.reciprocal":
        return None
    divisor = node.args[0]
    assert isinstance(divisor, Node)
    return fx_graph.call(node, _aten.sqrt.default, (divisor.args[0],)) if _is_power(divisor, 0.5) else divisor


def _is_power(node: Node, exponent: float) -> bool:
    return op_name(node) == "aten.pow" and bool(node.args[1] == exponent)


def _divide(model: GraphModule, node: Node, divisor: Node) -> None:
    for user in list(node.users):
        if _other_factor(user, node) == 1.0:  # Python writes 1.0 / y so
            fx_graph.replace(user, node)
    for user in list(node.users):
        other = _other_factor(user, node)
        if isinstance(other, Node):
            fx_graph.replace(user, fx_graph.call(user, _aten.div.Tensor, (other, divisor)))
    if node.users:
        name = f"{module_path(node)}.{node.name}_one".lstrip(".")
        one = fx_graph.add_constant(model, node, name, torch.tensor(1.0))
        fx_graph.replace(node, fx_graph.call(node, _aten.div.Tensor, (one, divisor)))


def _other_factor(user: Node, node: Node) -> Any:
    """What a product multiplies a node with; None where it is no product of two."""
    if op_name(user) != "aten.mul" or user.args[0] is user.args[1]:
        return None
    return user.args[1] if user.args[0] is node else user.args[0]
