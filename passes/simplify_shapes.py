"""simplify-shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_RESHAPES = frozenset("aten.squeeze aten.unsqueeze aten.flatten aten.unflatten aten.view aten.reshape".split())
_PERMUTES = frozenset("aten.permute aten.transpose aten.t".split())


@dataclass(frozen=True)
class SimplifyShapes(FxPass):
    """Write what only renames dimensions as one reshape.

    Before: `unsqueeze(transpose(view(x, [1, 16, 1, 8]), 1, 2), 2)`, `squeeze` of a dimension that is not 1. After:
    `reshape(x, [1, 1, 1, 16, 8])`, nothing. A transpose that leaves the order of all dimensions longer than 1 moves no
    value; the HTP library computes one behind a linear layer wrongly. Does nothing to other transposes.
    """

    name: ClassVar[str] = "simplify-shapes"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if _is_reshape(node) and _simplify(node):
                changes.append(f"simplified {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _is_reshape(node: Node) -> bool:
    """Whether a node's values lie in the order of its input's."""
    if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
        return False
    if op_name(node) in _RESHAPES:
        return True
    return op_name(node) in _PERMUTES and _keeps_order(node)


def _keeps_order(node: Node) -> bool:
    order, shape = permutation(node), _shape(node.args[0])  # type: ignore[arg-type]
    long = [dimension for dimension in order if shape[dimension] != 1]
    return long == sorted(long)


def permutation(node: Node) -> list[int]:
    """The dimension of the input that each dimension of the output is, for a permute, transpose or t."""
    rank = len(value_of(node).shape)
    if op_name(node) == "aten.permute":
        dimensions: Sequence[int] = argument(node, 1)
        return [dimension % rank for dimension in dimensions]
    first, second = (0, rank - 1) if op_name(node) == "aten.t" else (argument(node, 1) % rank, argument(node, 2) % rank)
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return order


def _simplify(node: Node) -> bool:
    """Make a node one reshape of what lies before all reshapes; False where it is that already."""
    source, shape = node.args[0], _shape(node)
    while isinstance(source, Node) and _is_reshape(source):
        source = source.args[0]
    assert isinstance(source, Node)
    if _shape(source) == shape:
        fx_graph.replace(node, source)
        return True
    if node.target is torch.ops.aten.reshape.default and node.args[0] is source:
        return False
    fx_graph.replace(node, fx_graph.call(node, torch.ops.aten.reshape.default, (source, shape)))
    return True


def _shape(node: Node) -> list[int]:
    return list(value_of(node).shape)
