"""ONNX files: writing a graph one weight at a time, reading it without its weights, its size, its verification."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, checker, defs, shape_inference

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.errors import FraqatError, OutputError, VerificationError

MAX_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB; beyond this, weights go to a file beside the model
SMALLEST_EXTERNAL = 1024  # bytes; what is smaller stays in the model
ALIGNMENT = 64  # bytes at which a tensor begins in the weights' file, so that it can be mapped
ONNX_DOMAINS = ("", "ai.onnx")
PRODUCER = "fraqat_compiler"
_IR_VERSION = {21: 10, 22: 10, 23: 11}  # the oldest file version that knows the opset, so that old runtimes read it


def save(graph: gs.Graph, path: Path, max_inline_bytes: int = MAX_INLINE_BYTES) -> None:
    """Write a graph to `path`, and to `<path>.data` where its weights exceed `max_inline_bytes`.

    The same graph gives the same bytes. Beyond the limit one weight at a time is in memory.

    Raises:
        OutputError: the file cannot be written; nothing is left under its name.
    """
    constants = _constants(graph)
    model = _structure(graph)
    external = sum(tensor._values.nbytes for tensor in constants) > max_inline_bytes
    partial, data = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.data")
    try:
        data.unlink(missing_ok=True)
        if external:
            with data.open("wb") as file:
                model.graph.initializer.extend(_written_outside(constants, file, data.name))
        else:
            model.graph.initializer.extend(to_proto(tensor) for tensor in constants)
        partial.write_bytes(model.SerializeToString(deterministic=True))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.", "Free disk space or name another folder."
        ) from error


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    return [tensor for tensor in graph.tensors().values() if qdq.is_constant(tensor)]


def _structure(graph: gs.Graph) -> ModelProto:
    """The model without weights, and without all that a runtime does not need."""
    light = graph.copy()
    interface = {tensor.name for tensor in [*light.inputs, *light.outputs]}
    for tensor in light.tensors().values():
        if qdq.is_constant(tensor):
            tensor.to_variable()
        if tensor.name not in interface and not _is_uninferable(light, tensor):
            tensor.dtype = tensor.shape = None  # then the exporter leaves its type and shape out
    model: ModelProto = gs.export_onnx(light.toposort(), do_type_check=False)
    model.producer_name = PRODUCER
    model.ir_version = _IR_VERSION.get(graph.opset, graph.ir_version or onnx.IR_VERSION)
    return model


def _is_uninferable(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the op that computes a tensor has no shape rule in ONNX: then runtimes need the shape in the file."""
    node = qdq.producer(tensor)
    if node is None:
        return False
    return not defs.get_schema(node.op, graph.opset, node.domain or "").has_type_and_shape_inference_function


def to_proto(tensor: gs.Constant) -> TensorProto:
    """A constant as a file holds it."""
    data_type = lazy_values.onnx_type(lazy_values.dtype_of(tensor))
    return onnx.helper.make_tensor(tensor.name, data_type, tensor.shape, _bytes(tensor), raw=True)


def _bytes(tensor: gs.Constant) -> bytes:
    return lazy_values.raw_bytes(lazy_values.values_of(tensor))


def _written_outside(constants: list[gs.Constant], file: BinaryIO, location: str) -> Iterator[TensorProto]:
    """Write each large constant into `file`, and give the entry that refers to it."""
    for tensor in constants:
        if tensor._values.nbytes < SMALLEST_EXTERNAL:
            yield to_proto(tensor)
            continue
        file.write(bytes(-file.tell() % ALIGNMENT))
        offset = file.tell()
        length = file.write(_bytes(tensor))
        yield _external_entry(tensor, location, offset, length)


def _external_entry(tensor: gs.Constant, location: str, offset: int, length: int) -> TensorProto:
    data_type = lazy_values.onnx_type(lazy_values.dtype_of(tensor))
    proto = TensorProto(name=tensor.name, data_type=data_type, dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def load(path: Path) -> gs.Graph:
    """The graph of an ONNX file, shapes and types of all tensors inferred; weights stay packed until they are needed.

    Raises:
        VerificationError: the file is damaged, or its weights are missing.
    """
    try:
        graph = gs.import_onnx(shape_inference.infer_shapes(_load_model(path)))
    except FraqatError:
        raise
    except Exception as error:  # a damaged file fails wherever its bytes are first read
        raise _unreadable(path, error) from error
    for tensor in _constants(graph):
        tensor.values = lazy_values.of_proto(tensor._values.tensor, str(path.parent))
        tensor.data_location = None
    return graph


def _load_model(path: Path) -> ModelProto:
    """The model; weights that lie outside are not read, but must be there."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise _unreadable(path, error) from error
    for file in sorted({_location(tensor) for tensor in model.graph.initializer} - {""}):
        if not (path.parent / file).is_file():
            raise VerificationError(f"{path} refers to weights in {file}, which is not beside it.", "Copy both files.")
    return model


def _unreadable(path: Path, error: Exception) -> VerificationError:
    return VerificationError(
        f"{path} cannot be read as an ONNX model: {_first_line(error)}.", "Copy or compile it again."
    )


def _location(tensor: TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def expected_bytes(graph: gs.Graph) -> int:
    """Bytes that the bit widths demand: every weight, scale, zero point, bias and constant at its type's width."""
    return sum(lazy_values.stored_bytes(tensor.shape, lazy_values.dtype_of(tensor)) for tensor in _constants(graph))


def file_bytes(path: Path) -> int:
    """Bytes of a model with its weights' file."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def summary(path: Path) -> dict[str, Any]:
    """The report's key `onnx`.

    `bytes` is what lies on disk and `expected_bytes` what the bit widths demand. The rest, `structure_bytes`, is the
    graph itself: nodes, names and shapes. It does not grow with the weights, so it shows in small models only.
    """
    graph = load(path)
    actual, expected = file_bytes(path), expected_bytes(graph)
    return {
        "path": path.name,
        "bytes": actual,
        "expected_bytes": expected,
        "structure_bytes": actual - expected,
        "opset": graph.opset,
        "domains": sorted({node.domain or "ai.onnx" for node in graph.nodes}),
    }


def verify(path: Path) -> None:
    """Verify a file: ONNX's full check, its own ops alone, no float copy of a quantized weight, onnxruntime loads it.

    Raises:
        VerificationError: one of these does not hold.
    """
    graph = load(path)
    _refuse_foreign(graph, path)
    _refuse_float_copies(graph, path)
    try:
        checker.check_model(path, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError, UnicodeDecodeError) as error:
        raise VerificationError(f"the ONNX checker refuses {path.name}: {str(error).strip()}") from error
    _open_in_onnxruntime(path)


def _refuse_foreign(graph: gs.Graph, path: Path) -> None:
    for node in graph.nodes:
        if (node.domain or "") not in ONNX_DOMAINS:
            raise VerificationError(
                f"node {node.name} of {path.name} is {node.domain}::{node.op}, which is no ONNX op."
            )


def _refuse_float_copies(graph: gs.Graph, path: Path) -> None:
    for node in graph.nodes:
        if node.op == qdq.QUANTIZE and qdq.is_constant(node.inputs[0]):
            raise VerificationError(
                f"{path.name} holds {node.inputs[0].name} in float, and {node.name} quantizes it.",
                "Run fold-fake-quant before saving.",
            )


def _open_in_onnxruntime(path: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise VerificationError(f"onnxruntime refuses {path.name}: {_first_line(error)}.") from error
