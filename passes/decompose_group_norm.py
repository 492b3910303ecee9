"""decompose-group-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten
_CONVOLUTIONS = {3: _aten.conv1d.default, 4: _aten.conv2d.default}


@dataclass(frozen=True)
class DecomposeGroupNorm(FxPass):
    """Write GroupNorm as a LayerNorm over each group and an affine map of the channels.

    Before: `group_norm(x, groups, gamma, beta)` on [N, C, ...]. After: `layer_norm` without affine of x as
    [N, groups, -1], back in shape, then a depthwise convolution by a kernel of one element, gamma, with the bias beta:
    one weight for each scale is held exactly. At ranks that have no such convolution it is times gamma, plus beta as
    [1, C, 1 ...]; at 16 bits the HTP library computes that form wrongly in front of a convolution. Does nothing to a
    graph without GroupNorm.
    """

    name: ClassVar[str] = "decompose-group-norm"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) != "aten.group_norm":
                continue
            fx_graph.replace(node, _decompose(model, node))
            changes.append(f"decomposed {layer_name(node)}")
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
    return _scaled(model, node, result, argument(node, 2), argument(node, 3))


def _scaled(model: GraphModule, node: Node, x: Node, weight: Node | None, bias: Node | None) -> Node:
    """The affine map of the channels, where there is one."""
    shape, rank = x.meta["val"].shape, x.meta["val"].ndim
    convolve = _CONVOLUTIONS.get(rank)
    if weight is None:
        return x
    if convolve is None or bias is None:
        x = fx_graph.call(node, _aten.mul.Tensor, (x, _per_channel(model, node, weight, rank)))
        return x if bias is None else fx_graph.call(node, _aten.add.Tensor, (x, _per_channel(model, node, bias, rank)))
    ones = [1] * (rank - 2)
    kernel = _shaped(model, node, weight, [-1, 1, *ones])
    return fx_graph.call(node, convolve, (x, kernel, bias, ones, [0] * len(ones), ones, shape[1]))


def _per_channel(model: GraphModule, node: Node, parameter: Node, rank: int) -> Node:
    return _shaped(model, node, parameter, [1, -1, *[1] * (rank - 2)])


def _shaped(model: GraphModule, node: Node, parameter: Node, shape: list[int]) -> Node:
    """The parameter in another shape, under its own name; a parameter stays one that is trained."""
    tensor = fx_graph.constant_of(model, parameter)
    if tensor is None or len(parameter.users) > 1:
        return fx_graph.call(node, _aten.reshape.default, (parameter, shape))
    shaped = torch.nn.Parameter(tensor.detach().view(shape))
    return fx_graph.add_constant(model, node, str(parameter.target), shaped)
