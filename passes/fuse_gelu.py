"""fuse-gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten
_INPUT_FACTOR = math.sqrt(0.5)
_TOLERANCE = 1e-4  # constants are written with few digits


@dataclass(frozen=True)
class FuseGelu(FxPass):
    """Make one GELU of one that is written out with the error function, which the HTP library has no kernel for.

    Before: `0.5 * x * (1 + erf(x / sqrt(2)))`, in any order of its factors, or `0.5 * x * erfc(-x / sqrt(2))`, or
    `x * ndtr(x)`. After: `gelu(x)`. Does nothing to other uses of these functions.
    """

    name: ClassVar[str] = "fuse-gelu"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            found = _distribution(model, node)
            last = _gelu_end(model, *found) if found else None
            if found and last is not None:
                changes.append(f"fused {layer_name(last)}")
                fx_graph.replace(last, fx_graph.call(last, _aten.gelu.default, (found[1],)))
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _distribution(model: GraphModule, node: Node) -> tuple[Node, Node, float] | None:
    """A node that is twice the normal distribution of x (or once), x, and the factor that makes it once."""
    name = op_name(node)
    if name == "aten.special_ndtr":
        return (node, node.args[0], 1.0) if isinstance(node.args[0], Node) else None
    if name not in ("aten.erf", "aten.erfc", "aten.special_erfc"):
        return None
    x, factor = _without_factor(model, node.args[0])
    wanted = _INPUT_FACTOR if name == "aten.erf" else -_INPUT_FACTOR
    if x is None or not math.isclose(factor, wanted, rel_tol=_TOLERANCE):
        return None
    if name != "aten.erf":
        return node, x, 0.5
    total = _only_user(node)
    is_sum = total is not None and op_name(total) == "aten.add" and not total.kwargs
    if total is None or not is_sum or _number(model, _other(total, node)) != 1.0:
        return None
    return total, x, 0.5


def _gelu_end(model: GraphModule, node: Node, x: Node, missing: float) -> Node | None:
    """The product from which on a distribution is multiplied with x and the missing factor, if it is."""
    has_x = False
    user = _only_user(node)
    while user is not None and op_name(user) in ("aten.mul", "aten.div"):
        factor = _factor(model, user, node)
        source, scale = _without_factor(model, _other(user, node))
        if factor is not None:
            missing /= factor
        elif source is x and not has_x and op_name(user) == "aten.mul":
            missing, has_x = missing / scale, True
        else:
            return None
        if has_x and math.isclose(missing, 1.0, rel_tol=_TOLERANCE):
            return user
        node, user = user, _only_user(user)
    return None


def _without_factor(model: GraphModule, value: Any) -> tuple[Node | None, float]:
    """x and c of `c * x`, however many products and quotients that is, and `-x`."""
    factor = 1.0
    while isinstance(value, Node):
        if op_name(value) == "aten.neg":
            factor, value = -factor, value.args[0]
            continue
        operand = next((arg for arg in value.args if isinstance(arg, Node) and _number(model, arg) is None), None)
        step = _factor(model, value, operand) if op_name(value) in ("aten.mul", "aten.div") and operand else None
        if step is None:
            return value, factor
        factor, value = factor * step, operand
    return None, factor


def _factor(model: GraphModule, node: Node, operand: Node) -> float | None:
    """c where a node is `c * operand`, or `operand / (1 / c)`."""
    number = _number(model, _other(node, operand))
    if number is None or (op_name(node) == "aten.div" and (node.args[0] is not operand or node.kwargs)):
        return None
    return 1 / number if op_name(node) == "aten.div" else number


def _other(node: Node, operand: Node) -> Any:
    return node.args[1] if node.args[0] is operand else node.args[0]


def _number(model: GraphModule, value: Any) -> float | None:
    """A number other than 0, written in the graph or kept as a constant of one element."""
    tensor = fx_graph.constant_of(model, value)
    if tensor is not None and tensor.numel() == 1:
        value = float(tensor)
    return float(value) if isinstance(value, (int, float)) and value else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
