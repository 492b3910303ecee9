"""Graphs whose inputs and outputs are codes: the application quantizes, or reads a camera that gives bytes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fraqat_compiler.errors import TargetError
from fraqat_compiler.target import Arrays


@dataclass(frozen=True)
class Codes:
    """How the codes of one input or output stand for its values: value = (code - zero_point) * scale.

    Attributes:
        dtype: uint8 or uint16.
        scale, zero_point: of the whole tensor.
    """

    dtype: str
    scale: float
    zero_point: int

    def quantized(self, values: NDArray[np.floating]) -> NDArray[np.integer]:
        """What QuantizeLinear makes of values (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html)."""
        limits = np.iinfo(self.dtype)
        codes = np.rint(values.astype(np.float32) / np.float32(self.scale)) + self.zero_point
        clipped: NDArray[np.integer] = np.clip(codes, limits.min, limits.max).astype(self.dtype)
        return clipped

    def values(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """What DequantizeLinear makes of codes."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


def strip_boundary(model: ModelProto, folder: Path) -> dict[str, Codes]:
    """Take the quantizers off the inputs and outputs of a model, which keep their names; in place.

    An input that something else reads too, and an output that is no DequantizeLinear's, stay as they are.

    Args:
        model: without its weights, if they are in files.
        folder: where those lie.

    Returns:
        The codes, by the name of the input or output.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    values = {value.name: value for value in (*graph.input, *graph.output)}
    inputs = {node.input[0]: node for node in _input_quantizers(graph) if _is_known(node, constants)}
    taken = {node.output[0] for node in inputs.values()}  # an input that goes straight to an output
    outputs = {node.output[0]: node for node in _output_dequantizers(graph, taken) if _is_known(node, constants)}
    codes = {name: _typed(values[name], node, constants, folder) for name, node in (inputs | outputs).items()}
    for node in inputs.values():
        _take_off_input(graph, node)
    for node in outputs.values():
        _take_off_output(graph, node)
    return codes


def _is_known(node: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    return len(node.input) == 3 and set(node.input[1:]) <= set(constants)


def _input_quantizers(graph: GraphProto) -> list[NodeProto]:
    names = {value.name for value in graph.input}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in names.intersection(node.input):
            readers.setdefault(name, []).append(node)
    return [nodes[0] for nodes in readers.values() if len(nodes) == 1 and nodes[0].op_type == "QuantizeLinear"]


def _output_dequantizers(graph: GraphProto, taken: set[str]) -> list[NodeProto]:
    """Those of codes that the graph computes, one for each: codes have one name."""
    names = {value.name for value in graph.output}
    taken = taken | names | {value.name for value in graph.input}
    found: dict[str, NodeProto] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in names and node.input[0] not in taken:
            found.setdefault(node.input[0], node)
    return list(found.values())


def _take_off_input(graph: GraphProto, quantizer: NodeProto) -> None:
    graph.node.remove(quantizer)
    _rename(graph, quantizer.output[0], quantizer.input[0])


def _take_off_output(graph: GraphProto, dequantizer: NodeProto) -> None:
    codes, name = dequantizer.input[0], dequantizer.output[0]
    if any(name in node.input for node in graph.node):  # values that the graph goes on with
        _rename(graph, name, f"{name}_values")
    else:
        graph.node.remove(dequantizer)
    _rename(graph, codes, name)


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """A tensor's name, wherever nodes use it."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, used in enumerate(names):
                if used == old:
                    names[index] = new


def _typed(value: ValueInfoProto, node: NodeProto, constants: Mapping[str, TensorProto], folder: Path) -> Codes:
    """The codes of a quantizer, whose type the input or output gets."""
    scale, zero_point = (constants[name] for name in node.input[1:])
    value.type.tensor_type.elem_type = zero_point.data_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(zero_point.data_type)).name
    numbers = [numpy_helper.to_array(tensor, str(folder)).item() for tensor in (scale, zero_point)]
    return Codes(dtype, *numbers)


def quantized(arrays: Arrays, codes: Mapping[str, Codes]) -> Arrays:
    """Values as the graph takes or gives them.

    Raises:
        TargetError: one that shall become codes is not in float32.
    """
    return {
        name: codes[name].quantized(_float(name, array)) if name in codes else array for name, array in arrays.items()
    }


def dequantized(arrays: Arrays, codes: Mapping[str, Codes]) -> Arrays:
    """What the graph takes or gives, as values."""
    return {name: codes[name].values(array) if name in codes else array for name, array in arrays.items()}


def _float(name: str, array: NDArray[np.generic]) -> NDArray[np.float32]:
    if array.dtype != np.float32:
        raise TargetError(f"{name} is given as {array.dtype}, but has values in float32.", "Give it as float32.")
    return array.astype(np.float32, copy=False)
