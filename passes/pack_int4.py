"""pack-int4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.lazy_values import LazyArray
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

_PACKED_TYPE = {np.dtype(np.int8): lazy_values.INT4, np.dtype(np.uint8): lazy_values.UINT4}


@dataclass(frozen=True)
class PackInt4(OnnxPass):
    """Store weights whose codes fit into four bits as INT4 or UINT4: two codes a byte, the first in the low half.

    Before: `codes (int8, -8..7) -> DequantizeLinear`, a byte each. After: `codes (INT4, packed) -> DequantizeLinear`
    with a zero point of the same type; what it computes is unchanged. Left out, a file holds the same codes in bytes,
    for runtimes without INT4. Does nothing to scalars and tables, which are no weights (their DequantizeLinear must
    feed a Gemm, MatMul, Conv, ConvTranspose or Gather), and to codes that need more than four bits.
    """

    name: ClassVar[str] = "pack-int4"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        zero_points = qdq.SharedConstants(model, qdq.Names(model))
        weights = _weights(model)
        packed = [name for name, readers in weights.items() if _pack(readers, zero_points)]
        if packed:
            qdq.finish(model)
        return PassResult(model, bool(packed), tuple(f"packed {name}" for name in packed))


_WEIGHT_INPUT = {"Gemm": 1, "MatMul": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0}


def _weights(graph: gs.Graph) -> dict[str, list[gs.Node]]:
    """Name of each constant of codes that is a weight -> the DQs that read it."""
    weights: dict[str, list[gs.Node]] = {}
    for node in graph.nodes:
        if node.op == qdq.DEQUANTIZE and qdq.is_constant(node.inputs[0]):
            weights.setdefault(node.inputs[0].name, []).append(node)
    return {name: nodes for name, nodes in weights.items() if all(map(_feeds_weight, nodes))}


def _feeds_weight(node: gs.Node) -> bool:
    values = node.outputs[0]
    return bool(values.outputs) and all(
        reader.op in _WEIGHT_INPUT and reader.inputs[_WEIGHT_INPUT[reader.op]] is values for reader in values.outputs
    )


def _pack(readers: list[gs.Node], zero_points: qdq.SharedConstants) -> bool:
    """Retype the codes that the DQs read, and their zero points; False where they do not fit."""
    codes = readers[0].inputs[0]
    packed_type = _PACKED_TYPE.get(lazy_values.dtype_of(codes))
    if packed_type is None or any(len(reader.inputs) < 3 for reader in readers):
        return False
    offsets = [lazy_values.values_of(reader.inputs[2]) for reader in readers]
    if not all(_fits(offset, packed_type) for offset in offsets) or not _codes_fit(codes, packed_type):
        return False
    values = codes._values
    codes.values = LazyArray(codes.shape, packed_type, lambda: lazy_values.load(values), None)
    for reader, offset in zip(readers, offsets, strict=True):
        reader.inputs[2] = zero_points.zero_point(offset.astype(packed_type))
    return True


def _codes_fit(codes: gs.Constant, packed_type: np.dtype[np.generic]) -> bool:
    lowest, highest = lazy_values.type_range(packed_type)
    first, last = lazy_values.code_range(codes)
    return lowest <= first and last <= highest


def _fits(values: lazy_values.Array, packed_type: np.dtype[np.generic]) -> bool:
    lowest, highest = lazy_values.type_range(packed_type)
    return values.size == 0 or bool(values.min() >= lowest and values.max() <= highest)
