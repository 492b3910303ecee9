"""The list of a compiled graph's layers: every op, quantized or float and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.fake_quant import ActivationFakeQuantize, BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from fraqat_compiler.ops import NORM_OPS, WEIGHTED_OPS, module_path, op_name

_STORED_WIDTHS = (4, 8, 16, 32)  # what a file has integer types for


def layers(graph: GraphModule) -> list[dict[str, Any]]:
    """Report key `layers`: one entry for each op of a graph that `insert-fake-quant` went over.

    A layer with weights has the user's module name; any other op has it with the op's own name behind a slash.
    """
    entries, taken = [], set()
    for node in graph.graph.nodes:
        verdict = node.meta.get("quantization")
        if verdict is None:
            continue
        name = layer_name(node)
        name = f"{name}/{node.name}" if name in taken else name
        taken.add(name)
        entries.append({"name": name, "op": op_name(node).removeprefix("aten."), **verdict})
    return entries


def layer_name(node: Node) -> str:
    """The user's module where the op is its main one, else that and the op's own name behind a slash."""
    path = module_path(node)
    if path and (op_name(node) in WEIGHTED_OPS or op_name(node) in NORM_OPS):
        return path
    return f"{path}/{node.name}" if path else node.name


def weight_quantizers(graph: GraphModule) -> Iterator[tuple[str, WeightFakeQuantize]]:
    """(name of the tensor, its fake quant) for every tensor that the graph owns."""
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, WeightFakeQuantize):
            yield str(node.args[0].target), module


def parameter_counts(graph: GraphModule) -> tuple[int, int]:
    """(all parameters, those held by a weight quantizer); a tied tensor counts once."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    scales = {name for name in read if name.startswith("fake_quant.")}
    total = sum(fx_graph.get_tensor(graph, name).numel() for name in read - scales)
    quantized = sum(fx_graph.get_tensor(graph, name).numel() for name, _ in weight_quantizers(graph))
    return total, quantized


def demanded_bytes(graph: GraphModule) -> int:
    """Bytes that the bit widths demand of a file: codes, scales and zero points of every quantizer, floats of the rest.

    Counted on the quantizers, not on the file, so a weight that was stored wider than it should be shows.
    """
    quantized = dict(weight_quantizers(graph))
    total = sum(quantizer_bytes(module, fx_graph.get_tensor(graph, name).numel()) for name, module in quantized.items())
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationFakeQuantize):
            total += quantizer_bytes(module, 0)
        if isinstance(module, BiasFakeQuantize):
            total += 2 * 4 * node.args[0].meta["val"].numel() + 4  # int32 codes, a float scale each, the zero point
        if node.op == "get_attr" and not str(node.target).startswith("fake_quant."):
            is_float = not any(user.op == "call_module" for user in node.users)
            total += node.meta["val"].numel() * node.meta["val"].element_size() if is_float else 0
    return total


def quantizer_bytes(module: FakeQuantize, elements: int) -> int:
    """Codes of `elements`, and the quantizer's own parameters."""
    width = next(stored for stored in _STORED_WIDTHS if stored >= module.spec.bit_width)
    return math.ceil(elements * width / 8) + module.scale.numel() * 4 + math.ceil(module.scale.numel() * width / 8)


def set_weight_bit_width(graph: GraphModule, end_widths: dict[str, float], bit_width: float | None = None) -> None:
    """Set every weight (role `weight`) to a stage's width, or to its own end width where that is higher.

    Args:
        graph: graph with fake quants.
        end_widths: width at which each weight ends, by tensor name.
        bit_width: the stage's; None sets the end widths.
    """
    for name, module in weight_quantizers(graph):
        if module.role == "weight" and name in end_widths:
            module.set_bit_width(end_widths[name] if bit_width is None else max(bit_width, end_widths[name]))


def end_widths(graph: GraphModule) -> dict[str, float]:
    """The widths that `insert-fake-quant` gave the weights, by tensor name."""
    return {name: module.spec.bit_width for name, module in weight_quantizers(graph) if module.role == "weight"}
