"""span-softmax-inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult


@dataclass(frozen=True)
class SpanSoftmaxInputs(OnnxPass):
    """Give a 16-bit Softmax an input whose grid spans at least `span`.

    Before: `Add -> Q(scale 1e-6) -> DQ -> Softmax`. After: the same pair with a scale of 8e-6, a whole multiple, on the
    same zero point. Where scores differ by less than about 0.13 in all, the HTP library computes garbage of half the
    output's range; a second pair behind the first it would drop. Does nothing at 8 bits, to a grid that spans enough,
    and to scores that other ops read too.
    """

    name: ClassVar[str] = "span-softmax-inputs"
    span: float = 0.5

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        names, changes = qdq.Names(model), []
        for node in model.nodes:
            pair = _pair_before(node) if node.op == "Softmax" else None
            if pair is None:
                continue
            factor = self._factor(pair[0])
            if factor > 1:
                _widen(pair, factor, names)
                changes.append(f"widened the grid before {node.name} {factor}-fold")
        return PassResult(model, bool(changes), tuple(changes))

    def _factor(self, quantizer: gs.Node) -> int:
        return math.ceil(self.span / (float(lazy_values.values_of(quantizer.inputs[1])) * np.iinfo(np.uint16).max))


def _pair_before(node: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """The 16-bit Q and DQ before a node, which nothing else reads."""
    last = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE)
    first = qdq.made_by(last.inputs[0], qdq.QUANTIZE) if last is not None else None
    if last is None or first is None or not qdq.is_scalar(first) or qdq.code_type(first) != np.uint16:
        return None
    alone = len(first.outputs[0].outputs) == 1 and len(last.outputs[0].outputs) == 1
    return (first, last) if alone else None


def _widen(pair: tuple[gs.Node, gs.Node], factor: int, names: qdq.Names) -> None:
    scale = pair[0].inputs[1]
    coarse = np.asarray(lazy_values.values_of(scale) * np.float32(factor))
    constant = lazy_values.constant(names.free(f"{scale.name}_x{factor}"), coarse)
    for quantizer in pair:
        quantizer.inputs[1] = constant
