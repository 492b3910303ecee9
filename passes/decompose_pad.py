"""decompose-pad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, is_float_tensor, module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposePad(FxPass):
    """Pad with a value other than 0 by concatenating a constant.

    Before: `pad(x [2, 16, 8], (0, 0, 0, 1), value=1)`, with which linear attention sums its weights. After:
    `cat([x, ones [2, 1, 8]], 1)`: the value has a quantizer. The HTP library pads with something else than the value.
    Does nothing to padding with 0, which every grid holds, and to the other modes.
    """

    name: ClassVar[str] = "decompose-pad"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) in ("aten.pad", "aten.constant_pad_nd") and is_float_tensor(node) and _value(node):
                fx_graph.replace(node, _concatenated(model, node))
                changes.append(f"decomposed {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _value(node: Node) -> float:
    if op_name(node) == "aten.constant_pad_nd":
        return float(argument(node, 2) or 0.0)
    return float(argument(node, 3) or 0.0) if argument(node, 2) in (None, "constant") else 0.0


def _concatenated(model: GraphModule, node: Node) -> Node:
    """One concatenation for each side that is padded; the amounts begin with the last dimension."""
    result, amounts = node.args[0], list(argument(node, 1))
    assert isinstance(result, Node)
    for index, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        dimension = result.meta["val"].ndim - 1 - index
        for amount, is_first in ((before, True), (after, False)):
            if amount > 0:
                fill = _fill(model, node, result, dimension, amount)
                parts = [fill, result] if is_first else [result, fill]
                result = fx_graph.call(node, _aten.cat.default, (parts, dimension))
    return result


def _fill(model: GraphModule, node: Node, like: Node, dimension: int, amount: int) -> Node:
    shape = list(like.meta["val"].shape)
    shape[dimension] = amount
    number = sum(1 for _ in model.graph.find_nodes(op="get_attr"))
    name = f"{module_path(node)}.{node.name}_fill_{number}".lstrip(".")
    return fx_graph.add_constant(model, node, name, torch.full(shape, _value(node)))
