"""decompose-group-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.ops import argument, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeGroupNorm(FxPass):
    """Write GroupNorm as a LayerNorm over each group and an affine map of the channels.

    Before: `group_norm(x, groups, gamma, beta)` on [N, C, ...]. After: `layer_norm` without affine of x as
    [N, groups, -1], back in shape, times gamma, plus beta as [1, C, 1 ...]: each tensor gets a quantizer of its own.
    Does nothing to a graph without GroupNorm.
    """

    name: ClassVar[str] = "decompose-group-norm"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) != "aten.group_norm":
                continue
            fx_graph.replace(node, _decompose(model, node))
            changes.append(f"decomposed {node.name}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _decompose(model: GraphModule, node: Node) -> Node:
    x, groups, epsilon = node.args[0], argument(node, 1), argument(node, 4)
    assert isinstance(x, Node)
    shape = list(x.meta["val"].shape)
    size = x.meta["val"][0].numel() // groups
    rows = fx_graph.call(node, _aten.reshape.default, (x, [shape[0], groups, size]))
    norm = fx_graph.call(
        node, _aten.layer_norm.default, (rows, [size], None, None, 1e-5 if epsilon is None else epsilon)
    )
    result = fx_graph.call(node, _aten.reshape.default, (norm, shape))
    for position, operation in ((2, _aten.mul.Tensor), (3, _aten.add.Tensor)):
        parameter = argument(node, position)
        if parameter is not None:
            result = fx_graph.call(node, operation, (result, _per_channel(model, node, parameter, len(shape))))
    return result


def _per_channel(model: GraphModule, node: Node, parameter: Node, rank: int) -> Node:
    """The parameter as [1, C, 1 ...], under its own name; a parameter stays one that is trained."""
    tensor = fx_graph.constant_of(model, parameter)
    if tensor is None or len(parameter.users) > 1:
        return fx_graph.call(node, _aten.reshape.default, (parameter, [1, -1, *[1] * (rank - 2)]))
    shaped = torch.nn.Parameter(tensor.detach().view(1, -1, *[1] * (rank - 2)))
    return fx_graph.add_constant(model, node, str(parameter.target), shaped)
