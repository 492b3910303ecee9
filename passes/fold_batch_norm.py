"""fold-batch-norm."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.ops import WEIGHTED_OPS, argument, groups, op_name, set_argument
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_BATCH_NORM = {"aten._native_batch_norm_legit_no_training", "aten.batch_norm"}


@dataclass(frozen=True)
class FoldBatchNorm(FxPass):
    """Fold BatchNorm in inference form into the weights before it, so that weights are quantized as they are used.

    Before: `batch_norm(conv2d(x, W, b))`. After: `conv2d(x, W * k, (b - mean) * k + beta)` with
    k = gamma / sqrt(var + eps) for each output channel. A BatchNorm with no layer to fold into becomes a 1x1 depthwise
    convolution (3-D and 4-D tensors), or a multiply and an add. Does nothing to a graph without BatchNorm.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) not in _BATCH_NORM:
                continue
            scale, shift = _affine(model, node)
            layer = node.args[0]
            if _can_fold(model, layer):
                _fold(model, layer, scale, shift)
                _replace_output(node, layer)
                changes.append(f"folded {node.name} into {layer.name}")
            else:
                _replace_output(node, _stand_alone(model, node, scale, shift))
                changes.append(f"made {node.name} a layer of its own")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _affine(model: GraphModule, node: Node) -> tuple[Tensor, Tensor]:
    """Per-channel factor and addend of a BatchNorm, both (C,)."""
    gamma, beta, mean, variance = (fx_graph.constant_of(model, argument(node, position)) for position in range(1, 5))
    assert mean is not None and variance is not None
    epsilon = float(argument(node, 7 if op_name(node) == "aten.batch_norm" else 6))
    scale = torch.rsqrt(variance.detach().double() + epsilon)
    scale = scale if gamma is None else scale * gamma.detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift if beta is None else shift + beta.detach().double()


def _can_fold(model: GraphModule, layer: Any) -> bool:
    if not isinstance(layer, Node) or op_name(layer) not in WEIGHTED_OPS or len(layer.users) != 1:
        return False
    weighted = WEIGHTED_OPS[op_name(layer)]
    if weighted.op_class not in ("linear", "conv", "conv_transpose") or op_name(layer) == "aten.addmm":
        return False
    if weighted.op_class == "linear" and layer.meta["val"].ndim != 2:  # BatchNorm counts channels in dimension 1
        return False
    if weighted.op_class == "conv_transpose" and groups(layer) != 1:
        return False
    weight = argument(layer, weighted.weight)
    return fx_graph.constant_of(model, weight) is not None and len(weight.users) == 1


def _fold(model: GraphModule, layer: Node, scale: Tensor, shift: Tensor) -> None:
    weighted = WEIGHTED_OPS[op_name(layer)]
    assert weighted.bias is not None
    weight_node, bias_node = argument(layer, weighted.weight), argument(layer, weighted.bias)
    weight = fx_graph.get_tensor(model, weight_node.target)
    shape = [1] * weight.ndim
    shape[weighted.channel_axis] = -1
    folded = torch.nn.Parameter((weight.detach().double() * scale.view(shape)).to(weight.dtype))
    fx_graph.set_tensor(model, weight_node.target, folded)
    bias = fx_graph.constant_of(model, bias_node)
    total = shift if bias is None else shift + bias.detach().double() * scale
    bias_name = f"{weight_node.target.removesuffix('weight')}bias" if bias is None else bias_node.target
    parameter = torch.nn.Parameter(total.to(weight.dtype))
    set_argument(
        layer, weighted.bias, fx_graph.add_constant(model, layer, _own(model, bias_name, bias_node), parameter)
    )


def _own(model: GraphModule, name: str, bias_node: Any) -> str:
    """The bias's own name, or a new one where another layer reads the same bias."""
    return f"{name}_folded" if isinstance(bias_node, Node) and len(bias_node.users) > 1 else name


def _stand_alone(model: GraphModule, node: Node, scale: Tensor, shift: Tensor) -> Node:
    x = node.args[0]
    assert isinstance(x, Node)
    rank, dtype = x.meta["val"].ndim, x.meta["val"].dtype
    factor, addend = torch.nn.Parameter(scale.to(dtype)), torch.nn.Parameter(shift.to(dtype))
    if rank in (3, 4):
        kernel = torch.nn.Parameter(factor.detach().view(-1, *[1] * (rank - 1)))
        weight = fx_graph.add_constant(model, node, f"{node.name}.weight", kernel)
        bias = fx_graph.add_constant(model, node, f"{node.name}.bias", addend)
        convolution = torch.ops.aten.conv1d.default if rank == 3 else torch.ops.aten.conv2d.default
        ones, zeros = [1] * (rank - 2), [0] * (rank - 2)
        return fx_graph.call(node, convolution, (x, weight, bias, ones, zeros, ones, factor.numel()))
    shape = [1, -1] + [1] * (rank - 2)
    multiplier = fx_graph.add_constant(
        model, node, f"{node.name}.weight", torch.nn.Parameter(factor.detach().view(shape))
    )
    offset = fx_graph.add_constant(model, node, f"{node.name}.bias", torch.nn.Parameter(addend.detach().view(shape)))
    product = fx_graph.call(node, torch.ops.aten.mul.Tensor, (x, multiplier))
    return fx_graph.call(node, torch.ops.aten.add.Tensor, (product, offset))


def _replace_output(node: Node, replacement: Node) -> None:
    """The inference form of BatchNorm returns a tuple whose first item is the output."""
    for user in list(node.users):
        if user.target is operator.getitem:
            fx_graph.replace(user, replacement)
    if node.users:
        node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)
