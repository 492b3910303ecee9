"""weigh-norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import NORM_OPS, argument, module_path, op_name, set_argument
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult


@dataclass(frozen=True)
class WeighNorms(FxPass):
    """Give a norm without a weight a weight of ones, which gets a quantizer.

    Before: `layer_norm(x, [64], None, None)`, as adaptive norms of diffusion transformers have it. After:
    `layer_norm(x, [64], ones, None)`; an InstanceNorm gets a bias of zeros too, which ONNX asks for. The exporter would
    write both in float: a 16-bit norm with them strays by up to 14 steps in the HTP library, and behind a linear layer
    it is garbage; with a quantized weight it is right within a step. Does nothing to norms with a weight, and to
    GroupNorm and BatchNorm, which other passes write out.
    """

    name: ClassVar[str] = "weigh-norms"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) in _SIZES and argument(node, NORM_OPS[op_name(node)].weight) is None:
                _weigh(model, node)
                changes.append(f"gave {layer_name(node)} a weight")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _weigh(model: GraphModule, node: Node) -> None:
    """Constants in the places that the op's schema has for them."""
    norm, size = NORM_OPS[op_name(node)], _SIZES[op_name(node)](node)
    prefix = f"{module_path(node)}.{node.name}".lstrip(".")
    weight = fx_graph.add_constant(model, node, f"{prefix}_weight", torch.ones(size))
    set_argument(node, norm.weight, weight)
    if op_name(node) == "aten.instance_norm" and argument(node, norm.bias) is None:
        assert norm.bias is not None
        set_argument(node, norm.bias, fx_graph.add_constant(model, node, f"{prefix}_bias", torch.zeros(size)))


def _normalized_shape(node: Node) -> list[int]:
    shape: list[int] = argument(node, 1)
    return shape


def _channels(node: Node) -> list[int]:
    return [node.meta["val"].shape[1]]


_SIZES = {
    "aten.layer_norm": _normalized_shape,
    "aten.rms_norm": _normalized_shape,
    "aten.instance_norm": _channels,
}
