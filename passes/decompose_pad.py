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
    """Pad by concatenating: a constant for a value other than 0, the opposite ends for circular padding.

    Before: `pad(x [2, 16, 8], (0, 0, 0, 1), value=1)`, with which linear attention sums its weights, and
    `pad(x, (1, 1), "circular")`. After: `cat([x, ones [2, 1, 8]], 1)`: the value has a quantizer; and
    `cat([x[..., -1:], x, x[..., :1]], -1)`. The HTP library pads with something else than the value, and refuses the
    circular mode. Does nothing to padding with 0, which every grid holds, to the other modes, and to negative amounts,
    which crop.
    """

    name: ClassVar[str] = "decompose-pad"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if op_name(node) not in ("aten.pad", "aten.constant_pad_nd") or not is_float_tensor(node):
                continue
            if min(argument(node, 1)) < 0 or not (_is_circular(node) or _value(node)):
                continue
            fx_graph.replace(node, _concatenated(model, node))
            changes.append(f"decomposed {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _is_circular(node: Node) -> bool:
    return op_name(node) == "aten.pad" and argument(node, 2) == "circular"


def _value(node: Node) -> float:
    if op_name(node) == "aten.constant_pad_nd":
        return float(argument(node, 2) or 0.0)
    return float(argument(node, 3) or 0.0) if argument(node, 2) in (None, "constant") else 0.0


def _concatenated(model: GraphModule, node: Node) -> Node:
    result = node.args[0]
    assert isinstance(result, Node)
    for dimension, before, after in _padded(node):
        first = [_edge(model, node, result, dimension, before, is_first=True)] if before else []
        last = [_edge(model, node, result, dimension, after, is_first=False)] if after else []
        result = fx_graph.call(node, _aten.cat.default, ([*first, result, *last], dimension))
    return result


def _padded(node: Node) -> list[tuple[int, int, int]]:
    """Each dimension that grows, with the amounts before and after; the op's list begins with the last dimension."""
    rank, amounts = node.meta["val"].ndim, list(argument(node, 1))
    pairs = enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1)
    return [(rank - place, before, after) for place, (before, after) in pairs if before or after]


def _edge(model: GraphModule, node: Node, padded: Node, dimension: int, amount: int, *, is_first: bool) -> Node:
    if not _is_circular(node):
        return _fill(model, node, padded, dimension, amount)
    size = padded.meta["val"].shape[dimension]
    start, end = (size - amount, size) if is_first else (0, amount)
    return fx_graph.call(node, _aten.slice.Tensor, (padded, dimension, start, end))


def _fill(model: GraphModule, node: Node, like: Node, dimension: int, amount: int) -> Node:
    shape = list(like.meta["val"].shape)
    shape[dimension] = amount
    number = sum(1 for _ in model.graph.find_nodes(op="get_attr"))
    name = f"{module_path(node)}.{node.name}_fill_{number}".lstrip(".")
    return fx_graph.add_constant(model, node, name, torch.full(shape, _value(node)))
