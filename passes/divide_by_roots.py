"""divide-by-roots."""

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
class DivideByRoots(FxPass):
    """Divide by a square root instead of multiplying with its reciprocal.

    Before: `x * rsqrt(y)`, `x * reciprocal(sqrt(y))` or `x * y ** -0.5`. After: `x / sqrt(y)`, and `1 / sqrt(y)` where
    the reciprocal is wanted itself. The HTP library scales the reciprocal of a quantized root wrongly where the root
    stays below 1 (slope 0.63), and strays by 10 to 20 steps in the mean at 16 bits where the root has no quantizer of
    its own; the quotient it computes within 0.3. Does nothing to other powers and reciprocals.
    """

    name: ClassVar[str] = "divide-by-roots"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            radicand = _radicand(node)
            if radicand is not None:
                changes.append(f"divided by the root of {layer_name(node)}")
                _divide(model, node, radicand)
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _radicand(node: Node) -> Node | None:
    """y where a node is `1 / sqrt(y)`."""
    if op_name(node) == "aten.rsqrt" or _is_power(node, -0.5):
        return _operand(node)
    root = _operand(node) if op_name(node) == "aten.reciprocal" else None
    if root is not None and (op_name(root) == "aten.sqrt" or _is_power(root, 0.5)):
        return _operand(root)
    return None


def _is_power(node: Node, exponent: float) -> bool:
    return op_name(node) == "aten.pow" and bool(node.args[1] == exponent)


def _operand(node: Node) -> Node | None:
    return node.args[0] if isinstance(node.args[0], Node) else None


def _divide(model: GraphModule, node: Node, radicand: Node) -> None:
    root = fx_graph.call(node, _aten.sqrt.default, (radicand,))
    for user in list(node.users):
        if _other_factor(user, node) == 1.0:  # Python writes 1.0 / sqrt(y) so
            fx_graph.replace(user, node)
    for user in list(node.users):
        other = _other_factor(user, node)
        if isinstance(other, Node):
            fx_graph.replace(user, fx_graph.call(user, _aten.div.Tensor, (other, root)))
    if node.users:
        name = f"{module_path(node)}.{node.name}_one".lstrip(".")
        one = fx_graph.add_constant(model, node, name, torch.tensor(1.0))
        fx_graph.replace(node, fx_graph.call(node, _aten.div.Tensor, (one, root)))


def _other_factor(user: Node, node: Node) -> Any:
    """What a product multiplies a node with; None where it is no product of two."""
    if op_name(user) != "aten.mul" or user.args[0] is user.args[1]:
        return None
    return user.args[1] if user.args[0] is node else user.args[0]
