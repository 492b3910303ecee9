"""What the library accepts and computes wrongly, found in the file before anything is compiled.

Each rule was measured against the library (QAIRT 2.51, v79); it reads the graph only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from fraqat_compiler.target import Finding

LARGEST_MASK = 1e4


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[gs.Node], bool]
    reason: str
    remedy: str


def wrong_nodes(model: Path) -> Iterator[Finding]:
    """A finding with verdict `wrong` for every node that a rule holds for."""
    graph = gs.import_onnx(onnx.load(str(model)))
    for node in graph.nodes:
        for rule in _RULES:
            if rule.holds(node):
                yield Finding(node.name, node.op, "wrong", rule.reason, rule.remedy)


def _int4_without_zero_point(node: gs.Node) -> bool:
    consumes_int4 = any(_is_int4(source) and len(source.inputs) < 3 for source in _dequantizers(node))
    return node.op in ("Gemm", "MatMul", "Conv", "ConvTranspose") and consumes_int4


def _is_int4(dequantizer: gs.Node) -> bool:
    codes = dequantizer.inputs[0]
    return isinstance(codes, gs.Constant) and "int4" in str(codes.dtype).lower()


def _dequantizers(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.inputs:
        if tensor.inputs and tensor.inputs[0].op == "DequantizeLinear":
            yield tensor.inputs[0]


def _reciprocal_of_sqrt(node: gs.Node) -> bool:
    return node.op == "Reciprocal" and any(source.op == "Sqrt" for source in _sources_through_qdq(node))


def _sources_through_qdq(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.inputs:
        while tensor.inputs and tensor.inputs[0].op in ("QuantizeLinear", "DequantizeLinear"):
            tensor = tensor.inputs[0].inputs[0]
        yield from tensor.inputs


def _wide_tanh(node: gs.Node) -> bool:
    if node.op != "Tanh":
        return False
    shape = node.inputs[0].shape
    is_flat = shape is not None and len(shape) == 2 and shape[0] == 1
    return not is_flat and any(_is_16_bit(source) for source in _dequantizers(node))


def _is_16_bit(dequantizer: gs.Node) -> bool:
    zero_point = dequantizer.inputs[2] if len(dequantizer.inputs) > 2 else None
    return zero_point is not None and np.dtype(zero_point.dtype) == np.uint16


def _mask_constant(node: gs.Node) -> bool:
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    floats = [tensor for tensor in constants if tensor.dtype in (np.float32, np.float16)]
    return node.op in ("Add", "Where", "Sub") and any(float(np.min(item.values)) < -LARGEST_MASK for item in floats)


_RULES = (
    _Rule(
        _int4_without_zero_point,
        "INT4 weights without a zero point are computed as if they had 8 bits",
        "Write the zero point, a tensor of zeros of the weight's type.",
    ),
    _Rule(
        _reciprocal_of_sqrt,
        "Sqrt then Reciprocal is scaled wrongly where the root stays below 1",
        "Write Div(1, Sqrt(x)), or RMSNormalization of opset 23.",
    ),
    _Rule(_wide_tanh, "Tanh at 16 bits is garbage at this shape", "Reshape to [1, N] around it, or use 8 bits there."),
    _Rule(_mask_constant, "a mask constant of this size ruins the quantizer", "Clip it to about -50: pass clip-masks."),
)
