"""From an exported torch program to an ONNX graph without weights.

`torch.onnx` does the translation; what is said here is how this package's ops and Linear look in ONNX, which is what
quantizing hardware wants to see.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx import TensorProto
from onnx_ir.passes import common as ir_passes
from onnxscript import optimizer
from onnxscript.function_libs.torch_lib.ops.core import aten_index
from torch.export import ExportedProgram

import fraqat_compiler.quantizer  # noqa: F401  # registers the ops that are translated below
from fraqat_compiler.capture import user_line
from fraqat_compiler.errors import PassError

ONNX_DOMAINS = ("", "ai.onnx")
_UNSTORABLE = ("Loop", "If", "Scan")  # their bodies hold nodes that no pass would see
LARGEST_FOLDED = 1024  # elements of a constant that the exporter's shape arithmetic may leave

# The code range of a quantizer -> the ONNX type that stores it and saturates at exactly its ends.
STORAGE: dict[tuple[int, int], int] = {
    (-8, 7): TensorProto.INT4,
    (0, 15): TensorProto.UINT4,
    (-128, 127): TensorProto.INT8,
    (0, 255): TensorProto.UINT8,
    (-32768, 32767): TensorProto.INT16,
    (0, 65535): TensorProto.UINT16,
}
# For other ranges, by (signed, bits).
_WIDER_STORAGE = {
    (False, 8): TensorProto.UINT8,
    (True, 8): TensorProto.INT8,
    (False, 16): TensorProto.UINT16,
    (True, 16): TensorProto.INT16,
}

Value = Any  # onnxscript traces with values of a private class
op: Any = onnxscript.opset21


def _fake_quantize(
    x: Value, scale: Value, zero_point: Value, quant_min: int, quant_max: int, axis: int, group_size: int
) -> Value:
    """QuantizeLinear, DequantizeLinear; codes of a width that no type has are clipped in between."""
    storage = STORAGE.get((quant_min, quant_max)) or _wider_storage(quant_min, quant_max)
    attributes = _granularity(x, scale, axis, group_size)
    offset = op.Cast(zero_point, to=storage)
    codes = op.QuantizeLinear(x, scale, offset, **attributes)
    if (quant_min, quant_max) not in STORAGE:
        lowest, highest = (op.Cast(op.Constant(value_int=bound), to=storage) for bound in (quant_min, quant_max))
        codes = op.Clip(codes, lowest, highest)
    return op.DequantizeLinear(codes, scale, offset, **attributes)


def _wider_storage(quant_min: int, quant_max: int) -> int:
    bits = 8 if quant_max - quant_min < 2**8 else 16
    return _WIDER_STORAGE[quant_min < 0, bits]


def _granularity(x: Value, scale: Value, axis: int, group_size: int) -> dict[str, int]:
    if group_size:
        return {"axis": len(x.shape) - 1, "block_size": group_size}
    if len(scale.shape):
        return {"axis": axis % len(x.shape)}
    return {}


def _fake_quantize_bias(bias: Value, input_scale: Value, weight_scale: Value) -> Value:
    """ONNX has no QuantizeLinear to int32: a Cast stands where `qdq.finish_biases` puts the codes."""
    attributes = {"axis": 0} if len(weight_scale.shape) else {}
    codes = op.Cast(bias, to=TensorProto.INT32)
    return op.DequantizeLinear(codes, op.Mul(input_scale, weight_scale), **attributes)


def _linear(x: Value, weight: Value, bias: Value = None) -> Value:
    """Gemm, which takes an int32 bias and the weight as it lies; Gemm has two dimensions, so others are reshaped."""
    if len(x.shape) == 2:
        return _gemm(x, weight, bias)
    if not all(isinstance(size, int) for size in x.shape):
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)
    *rows, width = x.shape
    flat = op.Reshape(x, op.Constant(value_ints=[_product(rows), width]))
    return op.Reshape(_gemm(flat, weight, bias), op.Constant(value_ints=[*rows, weight.shape[0]]))


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _gemm(x: Value, weight: Value, bias: Value) -> Value:
    return op.Gemm(x, weight, transB=1) if bias is None else op.Gemm(x, weight, bias, transB=1)


def _clamp(x: Value, lowest: float | None = None, highest: float | None = None) -> Value:
    """One Clip; the exporter's own translation is a Max and a Min."""
    bounds = [None if bound is None else op.Constant(value_float=bound) for bound in (lowest, highest)]
    if not x.dtype.is_floating_point():
        bounds = [None if bound is None else op.CastLike(bound, x) for bound in bounds]
    return op.Clip(x, *bounds)


def _softmax(x: Value, dim: int, dtype: int | None = None) -> Value:
    """Without the Cast that the exporter's own puts behind it: one float type runs through the graph."""
    return op.Softmax(x, axis=dim)


def _softplus(x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """One Softplus, which is stable at any x; torch's threshold only spares the exponential."""
    if beta == 1.0:
        return op.Softplus(x)
    factor = op.Constant(value_float=beta)
    return op.Div(op.Softplus(op.Mul(x, factor)), factor)


def _elu(x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    """Elu, or Selu where both sides have one scale; torch has no function that scales the input."""
    return op.Elu(x, alpha=alpha) if scale == 1.0 else op.Selu(x, alpha=alpha, gamma=scale)


def _rms_norm(x: Value, normalized_shape: Sequence[int], weight: Value = None, eps: float | None = None) -> Value:
    """RMSNormalization, which opset 23 has; only of a weight is the gamma known that it asks for."""
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    return onnxscript.opset23.RMSNormalization(x, weight, axis=-len(normalized_shape), epsilon=epsilon)


def _index(x: Value, indices: Sequence[Value | None]) -> Value:
    """Gathers where each index picks along a dimension of its own: `x[:, i]`, rows and columns `x[i[:, None], j]`.

    Hardware refuses the exporter's GatherND, or computes it wrongly.
    """
    given = {position: index for position, index in enumerate(indices) if index is not None}
    positions = list(given)
    if len(positions) == 1:
        return op.Gather(x, given[positions[0]], axis=positions[0])
    shapes = [tuple(index.shape) for index in given.values()]
    shape = _outer_shape(shapes) if positions[-1] - positions[0] == len(positions) - 1 else None
    if shape is None:
        return aten_index(x, indices)
    result = x
    for position, size in zip(positions, map(_product, shapes), strict=True):
        result = op.Gather(result, op.Reshape(given[position], op.Constant(value_ints=[size])), axis=position)
    full = [*x.shape[: positions[0]], *shape, *x.shape[positions[-1] + 1 :]]
    return op.Reshape(result, op.Constant(value_ints=full))


def _outer_shape(shapes: list[tuple[int, ...]]) -> list[int] | None:
    """What index shapes broadcast to when each has dimensions of its own, in order; None when they share some."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    own = [[dimension for dimension, size in enumerate(shape) if size != 1] for shape in padded]
    if [dimension for dimensions in own for dimension in dimensions] != sorted(set().union(*own)):
        return None
    return [max(sizes) for sizes in zip(*padded, strict=True)]


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fraqat.fake_quantize.default: _fake_quantize,
    torch.ops.fraqat.fake_quantize_bias.default: _fake_quantize_bias,
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.clamp.default: _clamp,
    torch.ops.aten.softmax.int: _softmax,
    torch.ops.aten.softplus.default: _softplus,
    torch.ops.aten.elu.default: _elu,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten._unsafe_index.Tensor: _index,
}


# Ops that an opset has and the ones before it lack.
_TRANSLATIONS_SINCE: dict[int, dict[Callable[..., Any], Callable[..., Any]]] = {
    23: {torch.ops.aten.rms_norm.default: _rms_norm},
}


def translate(program: ExportedProgram, opset: int) -> ir.Model:
    """The program as an onnx-ir model, shape arithmetic folded.

    Weights are tensors that refer to torch's.

    Raises:
        PassError: an op has no ONNX form; with the user's source line.
    """
    _normalize_clamps(program)
    try:
        with quiet_exporter():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=_translations(opset),
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _translation_error(error, program) from error
    assert exported is not None
    return exported.model


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    newer = [table for since, table in _TRANSLATIONS_SINCE.items() if opset >= since]
    return {op: translate for table in (_TRANSLATIONS, *newer) for op, translate in table.items()}


def _normalize_clamps(program: ExportedProgram) -> None:
    """Positional float bounds: the exporter fails on `clamp(0.5, 3)`, whose bounds have two types."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.default):
        if not node.meta["val"].is_floating_point():
            continue
        bounds = [*node.args[1:], *(node.kwargs.get(name) for name in ("min", "max")[len(node.args) - 1 :])]
        node.args = (node.args[0], *(None if bound is None else float(bound) for bound in bounds))
        node.kwargs = {}


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Drop the exporter's warnings (torchvision is missing, deprecations inside torch) in this block alone."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _translation_error(error: Exception, program: ExportedProgram) -> PassError:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    node = next((found[1] for cause in causes[1:] if (found := re.search(r"translating node %(\w+)", str(cause)))), "")
    op_name = next((found[0] for cause in causes if (found := re.search(r"\b(aten|prims)\.\w+", str(cause)))), "an op")
    return PassError(
        f"{op_name} (node {node}{_line_of_part(program, node)}) has no ONNX form: {first_line(causes[-1])}.",
        "Write it with other torch ops, or keep this part outside the model.",
    )


def _line_of_part(program: ExportedProgram, name: str) -> str:
    """The user's line of a node that may be a part of the program's: `_linalg_svd` of `linalg_svd`."""
    origins = [node for node in program.graph.nodes if node.op == "call_function" and node.name.strip("_") in name]
    for node in sorted(origins, key=lambda node: len(node.name), reverse=True):
        if user_line(node):
            return user_line(node)
    return ""


def first_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".")


def detach_values(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Take the weights out of a model; they become inputs, which no later step can fold or copy.

    Returns:
        Each such input, whose name may still change, and its values, which refer to torch's tensors.
    """
    values = []
    for name, value in list(model.graph.initializers.items()):
        assert value.const_value is not None
        values.append((value, value.const_value))
        value.const_value = None
        del model.graph.initializers[name]
        model.graph.inputs.append(value)
    return values


def simplify(model: ir.Model) -> None:
    """Fold shape arithmetic, drop no-ops and repeated computations, make every constant an initializer."""
    inline = ir.passes.Sequential(ir_passes.InlinePass(), ir_passes.RemoveUnusedFunctionsPass())  # type: ignore[no-untyped-call]
    inline(model)
    optimizer.fold_constants(model, output_size_limit=LARGEST_FOLDED, should_fold=_should_fold)
    tidy = ir.passes.Sequential(
        ir_passes.IdentityEliminationPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.DeduplicateInitializersPass(),
        ir_passes.OutputFixPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
    )
    tidy(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Never a quantizer; None leaves the choice to the optimizer."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def module_path_of(node: ir.Node) -> str:
    """Dotted name of the user's module that a node was translated from; empty for the model itself."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    scopes = re.findall(r"'([^']*)'", text)
    return scopes[-2] if len(scopes) > 1 else ""


def refuse_foreign_ops(model: ir.Model) -> None:
    """Every node must belong to ONNX itself.

    Raises:
        PassError: naming the first that does not.
    """
    for node in model.graph:
        if node.op_type in _UNSTORABLE or node.op_type.startswith("Sequence"):
            path = module_path_of(node)
            raise PassError(
                f"an op of {path or 'the model'} became {node.op_type}, which cannot be quantized.",
                "Write it with other torch ops, or keep this part outside the model.",
            )
        if node.domain not in ONNX_DOMAINS:
            raise PassError(
                f"{node.name} became {node.domain}::{node.op_type}, which is no ONNX op.",
                "Write it with other torch ops, or keep this part outside the model.",
            )
