"""decompose-softplus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

_LEVELS = 65535
_SIGMOID = (0.0, 65535 / 65536)  # the grid that the library gives it whatever the file says
_LOGARITHM = (-4.01, 0.0)  # -0.7 at the least; the rest is what a 16-bit Log needs, see span-logarithms
_LEAST_SPAN = 1e-4  # of a grid of which no code is used


@dataclass(frozen=True)
class DecomposeSoftplus(OnnxPass):
    """Write a 16-bit Softplus out.

    Before: `Softplus(DQ(x))`. After: `Relu(x) - Log(Sigmoid(Abs(x)))`, which is the same, since log(1 + e^x) = x +
    log(1 + e^-x) and 1 + e^-x = 1 / sigmoid(x). Each part has a quantizer whose range follows from that of x. The HTP
    library's Softplus is up to 0.012 off whatever its range (600 steps of one up to 1.3), and garbage behind a
    convolution; written out it stays below 0.0003. Does nothing at 8 bits, where it is right.
    """

    name: ClassVar[str] = "decompose-softplus"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        wide = [node for node in model.nodes if node.op == "Softplus" and _is_wide(node)]
        writer = _Writer(model)
        for node in wide:
            writer.write(node)
        if wide:
            qdq.finish(model)
        return PassResult(model, bool(wide), tuple(f"decomposed {node.name}" for node in wide))


def _is_wide(node: gs.Node) -> bool:
    source = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE)
    return source is not None and qdq.is_scalar(source) and qdq.code_type(source) == np.uint16


class _Writer:
    """One run: new nodes and their constants have names of their own."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = qdq.Names(graph)
        self.constants = qdq.SharedConstants(graph, self.names)

    def write(self, node: gs.Node) -> None:
        """Replace a Softplus; the quantizer of its result stays."""
        x, result = node.inputs[0], node.outputs[0]
        lowest, highest = _range(qdq.made_by(x, qdq.DEQUANTIZE))
        greatest = max(-lowest, highest, _LEAST_SPAN)
        absolute = self._quantized("Abs", node, x, (0.0, greatest))
        sigmoid = self._quantized("Sigmoid", node, absolute, _SIGMOID)
        logarithm = self._quantized("Log", node, sigmoid, _LOGARITHM)
        positive = self._quantized("Relu", node, x, (0.0, max(highest, _LEAST_SPAN)))
        node.outputs.clear()
        self._add("Sub", node, [positive, logarithm], result)

    def _quantized(self, op: str, node: gs.Node, x: gs.Tensor, ends: tuple[float, float]) -> gs.Variable:
        result = gs.Variable(self.names.free(f"{node.name}_{op.lower()}"), np.float32, x.shape)
        self._add(op, node, [x], result)
        return qdq.insert_pair(self.graph, self.names, result, self._grid(ends), [])

    def _add(self, op: str, node: gs.Node, inputs: Sequence[gs.Tensor], result: gs.Variable) -> None:
        prefix = node.name.removesuffix(node.op)
        self.graph.nodes.append(gs.Node(op, self.names.free(f"{prefix}{op}"), {}, list(inputs), [result]))

    def _grid(self, ends: tuple[float, float]) -> gs.Node:
        """A quantizer to copy that spans the ends."""
        scale = np.array((ends[1] - ends[0]) / _LEVELS, np.float32)
        zero_point = np.array(round(-ends[0] / float(scale)), np.uint16)
        wish = f"scale_{float(scale):.6g}"
        return gs.Node(
            qdq.QUANTIZE,
            "",
            {},
            [gs.Variable(""), self.constants.get(wish, scale), self.constants.zero_point(zero_point)],
        )


def _range(quantizer: gs.Node | None) -> tuple[float, float]:
    assert quantizer is not None
    scale, zero_point = (float(lazy_values.values_of(item)) for item in quantizer.inputs[1:3])
    return -zero_point * scale, (_LEVELS - zero_point) * scale
