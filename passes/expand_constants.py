"""expand-constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.lazy_values import Array, LazyArray
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class ExpandConstants(OnnxPass):
    """Repeat 16-bit constants that an Add or Mul broadcasts in front of a LayerNormalization.

    Before: `LayerNormalization(Add(x [4, L, D], DQ(table [1, L, D])))`. After: the same with a table of [4, L, D]. The
    HTP library takes the first form together, and reads beyond the table's end: wrong results for all but the first of
    the batch, or a crash. Does nothing at 8 bits, in front of other ops, to constants that have the size of the result
    or vary along the last dimension alone.
    """

    name: ClassVar[str] = "expand-constants"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        names = qdq.Names(model)
        changes = []
        for node in list(model.nodes):
            changes += [f"expanded {name}" for name in _expand_operands(model, node, names)]
        if changes:
            qdq.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _expand_operands(graph: gs.Graph, node: gs.Node, names: qdq.Names) -> list[str]:
    if node.op not in ("Add", "Mul") or not _is_normalized(node.outputs[0]):
        return []
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return []
    expanded = []
    for tensor in list(node.inputs):
        source = qdq.made_by(tensor, qdq.DEQUANTIZE)
        if source is None or not _is_broadcast_table(source, shape):
            continue
        codes = gs.Constant(names.free(f"{source.inputs[0].name}_x"), _repeated(source.inputs[0], shape))
        values = gs.Variable(names.free(f"{tensor.name}_x"), dtype=tensor.dtype, shape=list(shape))
        name = names.free(f"{source.name}_x")
        graph.nodes.append(gs.Node(qdq.DEQUANTIZE, name, dict(source.attrs), [codes, *source.inputs[1:]], [values]))
        qdq.replace_input(node, tensor, values)
        expanded.append(source.inputs[0].name)
    return expanded


def _is_normalized(tensor: gs.Tensor) -> bool:
    """Whether a LayerNormalization reads it, from its codes or directly."""
    for user in tensor.outputs:
        if user.op in NORMS or (user.op in (qdq.QUANTIZE, qdq.DEQUANTIZE) and _is_normalized(user.outputs[0])):
            return True
    return False


def _is_broadcast_table(source: gs.Node, shape: list[int]) -> bool:
    """A per-tensor 16-bit constant with several rows, which it repeats."""
    codes = source.inputs[0]
    if not qdq.is_constant(codes) or not qdq.is_scalar(source) or qdq.code_type(source).itemsize != 2:
        return False
    aligned = [1] * (len(shape) - len(codes.shape)) + list(codes.shape)
    return math.prod(aligned) < math.prod(shape) and aligned[-1] == shape[-1] and math.prod(aligned[:-1]) > 1


def _repeated(codes: gs.Constant, shape: list[int]) -> LazyArray:
    values = codes._values

    def compute() -> Array:
        return np.broadcast_to(lazy_values.load(values), shape)

    return LazyArray(shape, lazy_values.dtype_of(codes), compute)
