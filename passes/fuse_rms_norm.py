"""fuse-rms-norm."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class FuseRmsNorm(FxPass):
    """Make one op of an RMSNorm that is written out, and let it see rows of two dimensions.

    Before: `x * rsqrt(mean(x ** 2, -1) + eps) * gamma`. After: `rms_norm(x, gamma, eps)` between reshapes to [rows,
    size] and back where x has several leading dimensions. Written out, the HTP library scales the reciprocal root
    wrongly where the root stays below 1; RMSNormalization of opset 23 it computes within a step, but at 8 bits not over
    several leading dimensions. Does nothing to other uses of rsqrt.
    """

    name: ClassVar[str] = "fuse-rms-norm"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) == "aten.rsqrt":
                changes += [f"fused {name}" for name in _fuse(model, node)]
        for node in model.graph.find_nodes(op="call_function", target=_aten.rms_norm.default):
            if _flatten(node):
                changes.append(f"gave {layer_name(node)} rows")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _fuse(model: GraphModule, root: Node) -> list[str]:
    """Replace each product of x with the reciprocal root of its mean square."""
    matched = _mean_square(root.args[0])
    if matched is None:
        return []
    x, epsilon = matched
    products = [user for user in root.users if op_name(user) == "aten.mul" and x in user.args]
    for product in products:
        last, gamma = _scaled(model, product)
        size = x.meta["val"].shape[-1]
        fx_graph.replace(last, fx_graph.call(last, _aten.rms_norm.default, (x, [size], gamma, epsilon)))
    return [product.name for product in products]


def _mean_square(node: Any) -> tuple[Node, float] | None:
    """x and epsilon, where a node is mean(x ** 2) + epsilon over the last dimension."""
    if not isinstance(node, Node) or op_name(node) != "aten.add" or not isinstance(node.args[1], float):
        return None
    mean = node.args[0]
    if not isinstance(mean, Node) or op_name(mean) != "aten.mean" or not argument(mean, 2):
        return None
    square, axes = mean.args[0], argument(mean, 1)
    x = _squared(square)
    if x is None or axes is None or [axis % x.meta["val"].ndim for axis in axes] != [x.meta["val"].ndim - 1]:
        return None
    return x, node.args[1]


def _squared(node: Any) -> Node | None:
    """x of `x ** 2` or `x * x`."""
    if not isinstance(node, Node) or not isinstance(node.args[0], Node):
        return None
    is_square = op_name(node) == "aten.pow" and node.args[1] == 2
    is_product = op_name(node) == "aten.mul" and node.args[0] is node.args[1]
    return node.args[0] if is_square or is_product else None


def _scaled(model: GraphModule, product: Node) -> tuple[Node, Node | None]:
    """The product with gamma, and gamma, where that is all that becomes of a node; else the node itself."""
    (user, *others) = product.users
    if others or op_name(user) != "aten.mul":
        return product, None
    gamma = next((operand for operand in user.args if operand is not product), None)
    value = fx_graph.constant_of(model, gamma)
    is_row = value is not None and tuple(value.shape) == tuple(product.meta["val"].shape[-1:])
    return (user, gamma) if is_row and isinstance(gamma, Node) else (product, None)


def _flatten(node: Node) -> bool:
    """Put reshapes around a norm whose rows count along several dimensions."""
    x, shape = node.args[0], list(node.meta["val"].shape)
    assert isinstance(x, Node)
    if sum(size > 1 for size in shape[:-1]) < 2:
        return False
    rows = fx_graph.call(node, _aten.reshape.default, (x, [prod(shape[:-1]), shape[-1]]))
    norm = fx_graph.call(node, _aten.rms_norm.default, (rows, *node.args[1:]))
    fx_graph.replace(node, fx_graph.call(node, _aten.reshape.default, (norm, shape)))
    return True
