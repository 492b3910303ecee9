"""From the ONNX file to OpenVINO's IR: int4 codes that int8 kernels take, and names that do not change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from functools import lru_cache
from pathlib import Path

import openvino as ov
from onnx import GraphProto
from openvino import opset13

from fraqat_compiler.errors import TargetError
from fraqat_compiler.targets.model_file import read_model

_FOUR_BITS = (ov.Type.i4, ov.Type.u4)
_BETWEEN_CODES_AND_LAYER = frozenset({"Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Broadcast"})

_HEADING = re.compile(
    r"Exception from |Check '|FrontEnd API|Model wasn't|Summary:|To facilitate|While validating|Conversion is failed"
    r"|.* with a message:$"
)


@lru_cache(maxsize=1)
def core() -> ov.Core:
    """The one OpenVINO of this process."""
    return ov.Core()


def convert(path: Path) -> ov.Model:
    """The IR of an ONNX file.

    Raises:
        TargetError: the file is damaged, or OpenVINO converts no such node; `check` says which.
    """
    graph = read_model(path).graph
    try:
        model = core().read_model(path)
    except RuntimeError as error:  # all that OpenVINO raises
        raise TargetError(f"OpenVINO cannot convert {path.name}: {plain(error)}.") from error
    name_outputs(model, graph)
    expand_int4(model)
    name_stably(model, {node.name for node in graph.node} | {name for node in graph.node for name in node.output})
    return model


def name_outputs(model: ov.Model, graph: GraphProto) -> None:
    """Give outputs their one name, and the op behind each, which OpenVINO calls after the output, its node's."""
    makers = {name: node.name for node in graph.node for name in node.output}
    for port, output in zip(model.outputs, graph.output, strict=True):
        port.get_tensor().set_names({output.name})  # a removed Identity leaves its input's name beside it
        op = port.get_node().input_value(0).get_node()
        if op.get_friendly_name() == output.name and makers.get(output.name):
            op.set_friendly_name(makers[output.name])


def plain(error: BaseException) -> str:
    """OpenVINO's own words, as one line, without the places in its sources and the headings around them."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not _HEADING.match(line)]
    return (telling or lines or [type(error).__name__])[-1].rstrip(". ")


def expand_int4(model: ov.Model) -> None:
    """Let the plugin widen int4 codes to int8 when it loads them, where their layer's activations are quantized.

    Before: `i4 codes -> Convert(f32) -> Subtract, Multiply -> MatMul`. After: `i4 codes -> Convert(i8) -> Convert(f32)
    -> ...`. The CPU plugin has int8 kernels for int8 weights only; int4 ones it would dequantize and multiply in
    float. The file keeps the packed codes.
    """
    for constant in [op for op in model.get_ordered_ops() if _has_four_bits(op)]:
        readers = [reader for reader in constant.output(0).get_target_inputs() if _is_of_int8_layer(reader.get_node())]
        if not readers:
            continue
        widened = opset13.convert(constant, ov.Type.i8, name=f"{constant.get_friendly_name()}/int8")
        for reader in readers:
            reader.replace_source_output(widened.output(0))


def _has_four_bits(op: ov.Node) -> bool:
    return op.get_type_name() == "Constant" and op.get_element_type() in _FOUR_BITS


def _is_of_int8_layer(reader: ov.Node) -> bool:
    """Whether the codes end in a layer whose other input comes from a FakeQuantize."""
    layer = reader
    while layer.get_type_name() in _BETWEEN_CODES_AND_LAYER:
        layer = next(iter(layer.output(0).get_target_inputs())).get_node()
    return any(op.get_type_name() == "FakeQuantize" for op in _sources(layer))


def _sources(layer: ov.Node) -> Iterator[ov.Node]:
    """The first input of a layer and what it is computed from, as far as it is only dequantized."""
    op = layer.input_value(0).get_node()
    yield op
    while op.get_type_name() in _BETWEEN_CODES_AND_LAYER:
        op = op.input_value(0).get_node()
        yield op


def name_stably(model: ov.Model, given: Set[str]) -> None:
    """Number what OpenVINO named itself: it counts on through the life of the process, which the file would show."""
    for index, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if name not in given and re.fullmatch(rf"{op.get_type_name()}_\d+", name):
            op.set_friendly_name(f"{op.get_type_name()}:{index}")
