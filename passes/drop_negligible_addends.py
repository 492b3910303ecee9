"""drop-negligible-addends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult


@dataclass(frozen=True)
class DropNegligibleAddends(OnnxPass):
    """Drop an epsilon that its sum's quantizer cannot show.

    Before: `Add(DQ(x, scale 1e-3), 1e-15) -> Q`. After: `DQ(x) -> Q`. A constant below half a step of both grids
    changes no code; quantized itself, it gets a scale so small that the HTP library computes garbage. Does nothing to
    larger constants, to tables, and where a side is in float.
    """

    name: ClassVar[str] = "drop-negligible-addends"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        dropped = []
        for node in list(model.nodes):
            kept = _kept_operand(node) if node.op == "Add" else None
            if kept is not None:
                qdq.replace_everywhere(model, node.outputs[0], kept)
                node.outputs.clear()
                dropped.append(f"dropped {node.name}")
        if dropped:
            qdq.finish(model)
        return PassResult(model, bool(dropped), tuple(dropped))


def _kept_operand(node: gs.Node) -> gs.Tensor | None:
    """The quantized operand of an Add whose other one is a constant of no effect."""
    for addend, kept in (node.inputs, node.inputs[::-1]):
        source = qdq.made_by(kept, qdq.DEQUANTIZE)
        if source is None or not qdq.is_constant(addend) or lazy_values.element_count(addend.shape) != 1:
            continue
        quantizers = [source, *node.outputs[0].outputs]
        if not all(other.op in (qdq.QUANTIZE, qdq.DEQUANTIZE) and qdq.is_scalar(other) for other in quantizers):
            continue
        least = min(float(lazy_values.values_of(other.inputs[1])) for other in quantizers)
        if abs(float(np.squeeze(lazy_values.values_of(addend)))) < least / 2:
            return kept
    return None
