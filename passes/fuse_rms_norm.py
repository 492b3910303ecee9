"""fuse-rms-norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
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

    Before: `x * rsqrt(mean(x ** 2, -1) + eps) * gamma`, or `x / sqrt(...) * gamma`, as form-quotients leaves it.
    After: `rms_norm(x, gamma, eps)` between reshapes to [rows, size] and back where x has several leading dimensions.
    Written out it takes five quantizers, one of them on squares, where 8 bits know nothing but the greatest;
    RMSNormalization of opset 23 the HTP library computes within a step, but at 8 bits not over several leading
    dimensions. Does nothing to other uses of roots.

    Option: `rows`, false leaves the shapes alone.
    """

    name: ClassVar[str] = "fuse-rms-norm"
    rows: bool = True

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) in ("aten.rsqrt", "aten.sqrt") or _is_power(node, 0.5):
                changes += [f"fused {name}" for name in _fuse(model, node)]
        for node in model.graph.find_nodes(op="call_function", target=_aten.rms_norm.default):
            if self.rows and _flatten(node):
                changes.append(f"gave {layer_name(node)} rows")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _fuse(model: GraphModule, root: Node) -> list[str]:
    """Replace each product of x with the reciprocal root of its mean square, and each quotient of x and the root."""
    matched = _mean_square(model, root.args[0])
    if matched is None:
        return []
    x, epsilon = matched
    products = [user for user in root.users if _scales(user, x, root)]
    for product in products:
        last, gamma = _scaled(model, product)
        size = x.meta["val"].shape[-1]
        fx_graph.replace(last, fx_graph.call(last, _aten.rms_norm.default, (x, [size], gamma, epsilon)))
    return [product.name for product in products]


def _scales(user: Node, x: Node, root: Node) -> bool:
    if op_name(root) == "aten.rsqrt":
        return op_name(user) == "aten.mul" and x in user.args
    return op_name(user) == "aten.div" and user.args == (x, root) and not user.kwargs


def _mean_square(model: GraphModule, node: Any) -> tuple[Node, float] | None:
    """x and epsilon, where a node is mean(x ** 2) + epsilon over the last dimension; 0 for epsilon where none is."""
    epsilon = 0.0
    if isinstance(node, Node) and op_name(node) == "aten.add" and not node.kwargs:
        mean, addend = node.args
        constant = fx_graph.constant_of(model, addend)
        addend = float(constant) if constant is not None and constant.numel() == 1 else addend
        if not isinstance(addend, float):
            return None
        node, epsilon = mean, addend
    x = _meant(node)
    return (x, epsilon) if x is not None else None


def _meant(mean: Any) -> Node | None:
    """x of mean(x ** 2) over the last dimension, which is kept; the mean may be a sum over the number of elements."""
    if not isinstance(mean, Node):
        return None
    if op_name(mean) in ("aten.div", "aten.mul") and isinstance(mean.args[0], Node):
        total, count = mean.args
        if not isinstance(total, Node) or op_name(total) != "aten.sum" or not isinstance(count, (int, float)):
            return None
        divisor = count if op_name(mean) == "aten.div" else 1 / count
        x = _reduced(total)
        return x if x is not None and math.isclose(divisor, x.meta["val"].shape[-1], rel_tol=1e-6) else None
    return _reduced(mean) if op_name(mean) == "aten.mean" else None


def _reduced(node: Node) -> Node | None:
    """x of a reduction of x ** 2 over its last dimension, which is kept."""
    x, axes = _squared(node.args[0]), argument(node, 1)
    if x is None or axes is None or not argument(node, 2):
        return None
    return x if [axis % x.meta["val"].ndim for axis in axes] == [x.meta["val"].ndim - 1] else None


def _squared(node: Any) -> Node | None:
    """x of `x ** 2` or `x * x`."""
    if not isinstance(node, Node) or not isinstance(node.args[0], Node):
        return None
    is_square = op_name(node) == "aten.square" or _is_power(node, 2)
    is_product = op_name(node) == "aten.mul" and node.args[0] is node.args[1]
    return node.args[0] if is_square or is_product else None


def _is_power(node: Node, exponent: float) -> bool:
    return op_name(node) == "aten.pow" and bool(node.args[1] == exponent)


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
    rows = fx_graph.call(node, _aten.reshape.default, (x, [math.prod(shape[:-1]), shape[-1]]))
    norm = fx_graph.call(node, _aten.rms_norm.default, (rows, *node.args[1:]))
    fx_graph.replace(node, fx_graph.call(node, _aten.reshape.default, (norm, shape)))
    return True
