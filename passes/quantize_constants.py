"""quantize-constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import torch

from fraqat_compiler import lazy_values, qdq, quantizer
from fraqat_compiler.lazy_values import Array, LazyArray
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.quant_spec import QuantSpec

# The inputs that are values like their neighbours; other ops' constants are shapes, bounds or exponents.
_VALUE_INPUTS: dict[str, slice] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "PRelu", "MatMul"), slice(0, None)),
    "Where": slice(1, 3),
}


@dataclass(frozen=True)
class QuantizeConstants(OnnxPass):
    """Quantize the float constants among quantized tensors: the 0.125 of a Mul, the addends and tables of others.

    Before: `Mul(DQ(x), 0.125)`. After: `Mul(DQ(x), DQ(code))` at the width of x. One value, whatever the shape, is
    held exactly: its scale is the value divided by a power of two, so that code * scale gives it back, and 0 has the
    scale of its neighbour: any other gives garbage in a 16-bit Where of the HTP library. Tables get the least grid that
    spans them. Does nothing where another input is in float, and to shapes, bounds, exponents and
    padding, and to values that are not finite.
    """

    name: ClassVar[str] = "quantize-constants"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        quantization = _Quantization(model)
        changes = []
        for node in list(model.nodes):
            changes += [f"quantized {name} of {node.name}" for name in quantization.quantize_inputs(node)]
        if changes:
            qdq.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


class _Quantization:
    """One run: a constant that several nodes read is quantized once for each type."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = qdq.Names(graph)
        self.zero_points = qdq.SharedConstants(graph, self.names)
        self.done: dict[tuple[str, str, float | None], gs.Variable] = {}

    def quantize_inputs(self, node: gs.Node) -> list[str]:
        """Quantize the constants that a node reads as values; the names of those that were."""
        values = node.inputs[_VALUE_INPUTS[node.op]] if node.op in _VALUE_INPUTS else []
        constants = [tensor for tensor in values if qdq.is_constant(tensor)]
        computed = [tensor for tensor in values if not qdq.is_constant(tensor) and not _is_quantized_zero(tensor)]
        neighbour = _widest(computed)
        if neighbour is None:
            return []
        zeros = [tensor for tensor in values if _is_quantized_zero(tensor) and not _has_scale_of(tensor, neighbour)]
        fit = [tensor for tensor in constants if _is_quantizable(tensor)]
        for tensor in fit:
            qdq.replace_input(node, tensor, self._quantized(tensor, neighbour))
        for tensor in zeros:
            floats = gs.Constant(f"{tensor.name}_0", np.zeros(tensor.shape, np.float32))
            qdq.replace_input(node, tensor, self._quantized(floats, neighbour))
        return [tensor.name for tensor in (*fit, *zeros)]

    def _quantized(self, tensor: gs.Constant, neighbour: gs.Node) -> gs.Variable:
        scale = lazy_values.values_of(neighbour.inputs[1])
        key = (tensor.name, str(qdq.code_type(neighbour)), float(scale) if _is_zero(tensor) else None)
        if key not in self.done:
            self.done[key] = self._dequantize(tensor, neighbour)
        return self.done[key]

    def _dequantize(self, tensor: gs.Constant, neighbour: gs.Node) -> gs.Variable:
        values, stored = lazy_values.values_of(tensor), qdq.code_type(neighbour)
        codes, scale, zero_point = quantized(values, stored)
        if not values.any():
            scale = lazy_values.values_of(neighbour.inputs[1])
        names = self.names
        codes_constant = gs.Constant(names.free(f"{tensor.name}_q"), LazyArray(values.shape, stored, lambda: codes))
        scale_constant = lazy_values.constant(names.free(f"{tensor.name}_scale"), scale)
        result = gs.Variable(names.free(f"{tensor.name}_dq"), dtype=np.float32, shape=list(values.shape))
        name = names.free(f"{tensor.name}/{qdq.DEQUANTIZE}")
        inputs = [codes_constant, scale_constant, self.zero_points.zero_point(zero_point)]
        self.graph.nodes.append(gs.Node(qdq.DEQUANTIZE, name, {}, inputs, [result]))
        return result


def _widest(tensors: list[gs.Tensor]) -> gs.Node | None:
    """The quantizer with the widest codes among those of some tensors; None where one is in float, or there is none."""
    quantizers = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in tensors]
    known = [node for node in quantizers if node is not None and qdq.is_scalar(node)]
    if not known or len(known) != len(tensors):
        return None
    return max(known, key=lambda node: qdq.code_type(node).itemsize)


def _is_zero(tensor: gs.Constant) -> bool:
    return not lazy_values.values_of(tensor).any()


def _is_quantized_zero(tensor: gs.Tensor) -> bool:
    """Whether calibration quantized a constant of zeros, whose range tells no scale."""
    source = qdq.made_by(tensor, qdq.DEQUANTIZE)
    if source is None or not qdq.is_constant(source.inputs[0]) or not qdq.is_scalar(source) or len(source.inputs) < 3:
        return False
    codes, zero_point = (lazy_values.values_of(item) for item in (source.inputs[0], source.inputs[2]))
    return bool((codes == zero_point).all())


def _has_scale_of(tensor: gs.Tensor, neighbour: gs.Node) -> bool:
    source = qdq.made_by(tensor, qdq.DEQUANTIZE)
    assert source is not None
    return bool(lazy_values.values_of(source.inputs[1]) == lazy_values.values_of(neighbour.inputs[1]))


def _is_quantizable(tensor: gs.Constant) -> bool:
    if lazy_values.dtype_of(tensor) != np.float32 or lazy_values.element_count(tensor.shape) == 0:
        return False
    return bool(np.isfinite(lazy_values.values_of(tensor)).all())


def quantized(values: Array, stored: np.dtype[np.generic]) -> tuple[Array, Array, Array]:
    """Codes (shaped like `values`), scale and zero point (scalars) of a constant in an integer type."""
    first = values.reshape(-1)[0]
    if (values == first).all():
        code, scale, zero_point = _exact(np.float32(first), stored)
        return np.full(values.shape, code, stored), scale, zero_point
    return _nearest(torch.from_numpy(values), stored)


def _nearest(values: torch.Tensor, stored: np.dtype[np.generic]) -> tuple[Array, Array, Array]:
    spec = QuantSpec(bit_width=stored.itemsize * 8, symmetric=False, signed=stored.kind == "i")
    scale, zero_point = quantizer.asymmetric_parameters(values.amin(), values.amax(), spec)
    codes = quantizer.quantize(values, scale, zero_point, spec.quant_min, spec.quant_max)
    return codes.numpy().astype(stored), scale.numpy(), zero_point.numpy().astype(stored)


def _exact(value: np.float32, stored: np.dtype[np.generic]) -> tuple[int, Array, Array]:
    """Code, scale and zero point that give a value back exactly.

    A power of two as distance between code and zero point divides without rounding, as long as the scale is a normal
    number; a distance of 1 always does.
    """
    lowest, highest = lazy_values.type_range(stored)
    distance = (highest - lowest + 1) // 2
    if abs(value) / distance < np.finfo(np.float32).tiny:
        distance = 1
    scale = np.array(abs(value) / np.float32(distance) if value else 1.0, np.float32)
    code, zero_point = (lowest + distance, lowest) if value > 0 else (lowest, lowest + distance)
    if not value:
        code = zero_point
    return code, scale, np.array(zero_point, stored)
