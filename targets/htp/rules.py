"""What the library accepts and computes wrongly, found in the file before anything is compiled.

Each rule was measured against the library; it reads the graph only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from onnx import shape_inference

from fraqat_compiler import lazy_values, onnx_io, qdq
from fraqat_compiler.passes.convolve_average_pools import is_split
from fraqat_compiler.passes.span_logarithms import spanning
from fraqat_compiler.target import Finding
from fraqat_compiler.targets.model_file import read_model

LARGEST_MASK = 1e4
FLAT_SOFTMAX = 0.1  # end of the output's range; below it results are too large by 3 % (0.1) to 70 % (0.002)
# (coordinate_transformation_mode, nearest_mode), and ONNX's defaults of both
_WRONG_RESIZES = frozenset({("half_pixel", "floor"), ("half_pixel", "ceil"), ("asymmetric", "round_prefer_ceil")})
_RESIZE_DEFAULTS = ("half_pixel", "round_prefer_floor")


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[gs.Node], bool]
    reason: str
    remedy: str


def wrong_nodes(model: Path) -> Iterator[Finding]:
    """A finding with verdict `wrong` for every node that a rule holds for.

    Raises:
        FraqatError: the file is damaged.
    """
    for node in with_shapes(model).nodes:
        for rule in _RULES:
            if rule.holds(node):
                yield Finding(node.name, node.op, "wrong", rule.reason, rule.remedy)


def with_shapes(model: Path) -> gs.Graph:
    """The graph; the file need not hold the shapes of what lies between its inputs and outputs."""
    graph = onnx_io.load(model)
    tensors = graph.tensors()
    for value in shape_inference.infer_shapes(read_model(model)).graph.value_info:
        if value.name in tensors:
            tensors[value.name].shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return graph


def _int4_without_zero_point(node: gs.Node) -> bool:
    has_kernel = node.op in ("Gemm", "MatMul", "Conv", "ConvTranspose")
    return has_kernel and any(_is_int4(source) and len(source.inputs) < 3 for source in _dequantizers(node))


def _is_int4(dequantizer: gs.Node) -> bool:
    codes = dequantizer.inputs[0]
    return qdq.is_constant(codes) and lazy_values.dtype_of(codes) in lazy_values.FOUR_BIT_TYPES


def _dequantizers(node: gs.Node) -> Iterator[gs.Node]:
    sources = (qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs)
    return (source for source in sources if source is not None)


def _reciprocal_of_sqrt(node: gs.Node) -> bool:
    return node.op == "Reciprocal" and _source_through_qdq(node.inputs[0]) == "Sqrt"


def _source_through_qdq(tensor: gs.Tensor) -> str:
    """The op behind a tensor and the quantizers on the way."""
    node = qdq.producer(tensor)
    while node is not None and node.op in (qdq.QUANTIZE, qdq.DEQUANTIZE):
        node = qdq.producer(node.inputs[0])
    return node.op if node is not None else ""


def _wide_tanh(node: gs.Node) -> bool:
    if node.op != "Tanh" or not _reads_16_bits(node):
        return False
    shape = node.inputs[0].shape
    return shape is None or math.prod(shape[:-1]) > 1


def _flat_softmax(node: gs.Node) -> bool:
    quantizers = [reader for reader in node.outputs[0].outputs if reader.op == qdq.QUANTIZE]
    if node.op != "Softmax" or _reads_16_bits(node) or not quantizers:
        return False
    is_narrow = qdq.code_type(quantizers[0]) == np.uint8 and qdq.is_scalar(quantizers[0])
    return is_narrow and float(lazy_values.values_of(quantizers[0].inputs[1])) * 255 < FLAT_SOFTMAX


def _narrow_logarithm(node: gs.Node) -> bool:
    return node.op == "Log" and spanning(node) is not None


def _reads_16_bits(node: gs.Node) -> bool:
    return any(qdq.code_type(source) == np.uint16 for source in _dequantizers(node) if len(source.inputs) > 2)


def _narrow_cumsum(node: gs.Node) -> bool:
    """Right along the last dimension, at 16 bits, and where zero_point is 0."""
    if node.op != "CumSum" or not qdq.is_constant(node.inputs[1]):
        return False
    source, shape = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE), node.inputs[0].shape
    if source is None or shape is None or qdq.code_type(source) != np.uint8:
        return False
    axis = int(lazy_values.values_of(node.inputs[1])) % len(shape)
    return axis != len(shape) - 1 and bool(lazy_values.values_of(source.inputs[2]))


def _nearest_resize(node: gs.Node) -> bool:
    if node.op != "Resize" or node.attrs.get("mode", "nearest") != "nearest":
        return False
    coordinates, rounding = _RESIZE_DEFAULTS
    modes = node.attrs.get("coordinate_transformation_mode", coordinates), node.attrs.get("nearest_mode", rounding)
    return modes in _WRONG_RESIZES


def _split_average(node: gs.Node) -> bool:
    """A pool over windows side by side; the pass turns it into a convolution where all windows have one divisor."""
    if node.op != "AveragePool" or node.inputs[0].shape is None or len(node.inputs[0].shape) != 4:
        return False
    kernel = list(node.attrs["kernel_shape"])
    stride, padding = list(node.attrs.get("strides", [1, 1])), list(node.attrs.get("pads", [0] * 4))
    return is_split(node.inputs[0].shape[2:], kernel, stride, padding)


def _scatters(node: gs.Node) -> bool:
    return node.op == "ScatterElements" and any(True for _ in _dequantizers(node))


def _mask_constant(node: gs.Node) -> bool:
    return node.op in ("Add", "Sub", "Where") and any(_least(tensor) < -LARGEST_MASK for tensor in node.inputs)


def _least(tensor: gs.Tensor) -> float:
    """The least value of a constant, quantized or not; 0 for what is none."""
    if qdq.is_constant(tensor):
        is_float = lazy_values.dtype_of(tensor).kind == "f"
        return float(np.min(lazy_values.values_of(tensor), initial=0.0)) if is_float else 0.0
    node = qdq.producer(tensor)
    if node is None or node.op not in (qdq.QUANTIZE, qdq.DEQUANTIZE):
        return 0.0
    if node.op == qdq.DEQUANTIZE and qdq.is_constant(node.inputs[0]):
        return _least_code(node)
    return _least(node.inputs[0])


def _least_code(dequantizer: gs.Node) -> float:
    """The least value that a DequantizeLinear with one scale gives."""
    if not qdq.is_scalar(dequantizer):
        return 0.0
    codes, scale, *zero_point = (lazy_values.values_of(item).astype(np.float64) for item in dequantizer.inputs)
    return float(np.min((codes - sum(zero_point)) * scale, initial=0.0))


_RULES = (
    _Rule(
        _narrow_cumsum,
        "CumSum at 8 bits is garbage where the zero point is not 0, except along the last dimension",
        "Transpose so that it runs along the last dimension (pass transpose-cumsums), or give it 16-bit activations: "
        "--activations 8,NAME=16.",
    ),
    _Rule(
        _int4_without_zero_point,
        "INT4 weights without a zero point are computed as if they had 8 bits",
        "Write the zero point, a tensor of zeros of the weight's type.",
    ),
    _Rule(
        _reciprocal_of_sqrt,
        "Sqrt then Reciprocal is scaled wrongly where the root stays below 1",
        "Write Div(1, Sqrt(x)) (pass form-quotients), or RMSNormalization of opset 23.",
    ),
    _Rule(
        _wide_tanh,
        "Tanh at 16 bits is garbage at many shapes of several rows",
        "Reshape to [1, N] around it (pass flatten-tanh), or use 8 bits there.",
    ),
    _Rule(
        _flat_softmax,
        "Softmax at 8 bits is too large where no probability comes near 1",
        "Quantize its result, or what it reads, at 16 bits.",
    ),
    _Rule(
        _narrow_logarithm,
        "Log at 16 bits is garbage where the range of its result is narrow",
        "Widen that range (pass span-logarithms), or use 8 bits there.",
    ),
    _Rule(
        _nearest_resize,
        "these modes of nearest-neighbour Resize pick other neighbours",
        "Use asymmetric with floor, or half_pixel with round_prefer_floor.",
    ),
    _Rule(
        _split_average,
        "AveragePool over even windows side by side, or padded ones, is cut off at the range of its result",
        "Count the padding (count_include_pad), so that pass convolve-average-pools makes it a convolution.",
    ),
    _Rule(
        _scatters,
        "ScatterElements writes wrong values",
        "Write whole rows, by index_copy or by the same index along a row (pass scatter-rows).",
    ),
    _Rule(_mask_constant, "a mask constant of this size ruins the quantizer", "Clip it to about -50: pass clip-masks."),
)
