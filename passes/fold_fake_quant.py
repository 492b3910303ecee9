"""fold-fake-quant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import torch

from fraqat_compiler import lazy_values, qdq, quantizer
from fraqat_compiler.lazy_values import Array, LazyArray
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

# Codes of 4-bit types are held as bytes until pack-int4 packs them.
_BYTE_TYPE = {lazy_values.INT4: np.dtype(np.int8), lazy_values.UINT4: np.dtype(np.uint8)}


@dataclass(frozen=True)
class FoldFakeQuant(OnnxPass):
    """Quantize the weights: what a QuantizeLinear makes of a constant becomes a constant of codes.

    Before: `W (float) -> QuantizeLinear -> DequantizeLinear -> Gemm`. After: `W (int8 codes) -> DequantizeLinear ->
    Gemm`, and no float copy is left. Codes are those of `quantizer.quantize`, computed one tensor at a time when they
    are needed. A tied weight stays one constant. A Transpose of a quantized weight is folded into it, and
    pairs that quantize the same tensor equally are merged. Does nothing to tensors that the graph computes.
    """

    name: ClassVar[str] = "fold-fake-quant"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        changes = [f"merged {name}" for name in _merge_equal(model, qdq.QUANTIZE)]
        changes += [f"quantized {name}" for name in _fold_quantizers(model)]
        changes += [f"merged {name}" for name in _merge_equal(model, qdq.DEQUANTIZE)]
        changes += [f"folded {name}" for name in _fold_transposes(model)]
        if changes:
            qdq.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _merge_equal(graph: gs.Graph, op: str) -> list[str]:
    """Let the readers of a node read an earlier one that does the same to the same tensor."""
    kept: dict[str, list[gs.Node]] = defaultdict(list)
    merged = []
    for node in list(graph.nodes):
        if node.op != op:
            continue
        same = next((other for other in kept[node.inputs[0].name] if qdq.same_parameters(node, other)), None)
        if same is None or node.outputs[0] in graph.outputs:
            kept[node.inputs[0].name].append(node)
            continue
        qdq.replace_everywhere(graph, node.outputs[0], same.outputs[0])
        node.outputs.clear()
        merged.append(node.name)
    return merged


def _fold_quantizers(graph: gs.Graph) -> list[str]:
    names = qdq.Names(graph)
    zero_points = qdq.SharedConstants(graph, names)
    folded = []
    for node in list(graph.nodes):
        if node.op == qdq.QUANTIZE and qdq.is_constant(node.inputs[0]):
            folded.append(node.inputs[0].name)
            _fold(node, names, zero_points)
    return folded


def _fold(node: gs.Node, names: qdq.Names, zero_points: qdq.SharedConstants) -> None:
    """Replace Q (and the Clip of odd widths after it) by a constant of codes, which takes over the weight's name."""
    last, code_range = _code_range(node)
    weight, codes, values = node.inputs[0], last.outputs[0], _codes(node, code_range)
    node.inputs.clear()
    name = names.free(f"{weight.name}_q") if weight.outputs else weight.name
    constant = gs.Constant(name, values)
    for reader in list(codes.outputs):
        qdq.replace_input(reader, codes, constant)
        if reader.op == qdq.DEQUANTIZE:
            _widen_zero_point(reader, zero_points)


def _code_range(node: gs.Node) -> tuple[gs.Node, tuple[int, int]]:
    """The last node that shapes the codes, and their range."""
    readers = node.outputs[0].outputs
    if len(readers) == 1 and readers[0].op == "Clip":
        lowest, highest = (int(lazy_values.values_of(bound)) for bound in readers[0].inputs[1:3])
        return readers[0], (lowest, highest)
    return node, lazy_values.type_range(qdq.code_type(node))


def _codes(node: gs.Node, code_range: tuple[int, int]) -> LazyArray:
    weight, scale, zero_point = (tensor._values for tensor in node.inputs)
    axis, group_size = qdq.granularity(node)
    stored = qdq.code_type(node)

    def compute() -> Array:
        float_values, step, offset = (_to_torch(lazy_values.load(values)) for values in (weight, scale, zero_point))
        codes = quantizer.quantize(float_values, step, offset, *code_range, axis, group_size)
        return codes.numpy()

    return LazyArray(weight.shape, _BYTE_TYPE.get(stored, stored), compute, code_range)


def _to_torch(values: Array) -> torch.Tensor:
    wide = values.astype(np.int32) if values.dtype.kind not in "f" else values
    return torch.from_numpy(wide)


def _widen_zero_point(node: gs.Node, zero_points: qdq.SharedConstants) -> None:
    """Codes and zero point of a DQ have one type."""
    values = lazy_values.values_of(node.inputs[2])
    wide = values.astype(_BYTE_TYPE.get(values.dtype, values.dtype))
    node.inputs[2] = zero_points.zero_point(wide)


def _fold_transposes(graph: gs.Graph) -> list[str]:
    """A Transpose of dequantized codes becomes transposed codes."""
    names = qdq.Names(graph)
    folded = []
    for node in list(graph.nodes):
        source = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE) if node.op == "Transpose" else None
        if source is None or not qdq.is_constant(source.inputs[0]):
            continue
        rank = len(source.inputs[0].shape)
        permutation = node.attrs.get("perm", list(range(rank))[::-1])
        codes = _transposed(source.inputs[0], permutation, names)
        attributes = dict(source.attrs)
        if not qdq.is_scalar(source):
            attributes["axis"] = permutation.index(qdq.axis_of(source) % rank)
        parameters = source.inputs[1:]
        if attributes.get("block_size"):  # then the scale has the weight's rank
            parameters = [_transposed(tensor, permutation, names) for tensor in parameters]
        name = names.free(f"{codes.name}/{qdq.DEQUANTIZE}")
        graph.nodes.append(gs.Node(qdq.DEQUANTIZE, name, attributes, [codes, *parameters], list(node.outputs)))
        node.outputs.clear()
        folded.append(node.name)
    return folded


def _transposed(tensor: gs.Constant, permutation: Sequence[int], names: qdq.Names) -> gs.Constant:
    values: Any = tensor._values
    shape = [tensor.shape[index] for index in permutation]
    lazy = LazyArray(
        shape,
        lazy_values.dtype_of(tensor),
        lambda: np.transpose(lazy_values.load(values), permutation),
        getattr(values, "code_range", None),
    )
    return gs.Constant(names.free(f"{tensor.name}_t"), lazy)
