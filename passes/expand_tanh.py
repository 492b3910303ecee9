"""expand-tanh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.polynomial import chebyshev

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.lazy_values import Array
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

_LEVELS = 65535
_FURTHEST = 0.4  # beyond it two terms are off by more than half a step, and the library by less than ten
_TOLERANCE = 2.0**-17  # half a step of a result that comes near 1
_LEAST = 1e-6  # of a range; below it a scale is no normal number


@dataclass(frozen=True)
class ExpandTanh(OnnxPass):
    """Write a 16-bit Tanh of values near 0 as a polynomial.

    Before: `Tanh(DQ(x))` with x within 0.4. After: `x * (c0 + c1 * x^2 + c2 * x^4)` with as few terms as are right
    within half a step: one up to 0.005, two up to 0.13. The library's Tanh is off by 1e-4 whatever the range, 260 steps
    within 0.01; so are the soft-capped logits and scores of Gemma-2 while they are small beside the cap. Products and
    sums it computes within a step. The coefficients interpolate tanh(x) / x at the Chebyshev nodes of x^2. Does nothing
    at 8 bits, and to a wider range.
    """

    name: ClassVar[str] = "expand-tanh"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        near = [node for node in model.nodes if node.op == "Tanh" and 0 < _furthest(node) <= _FURTHEST]
        writer = _Writer(model)
        for node in near:
            writer.write(node)
        if near:
            qdq.finish(model)
        return PassResult(model, bool(near), tuple(f"expanded {node.name}" for node in near))


def _furthest(node: gs.Node) -> float:
    """How far from 0 the input of 16 bits goes; 0 for others."""
    source = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE)
    if source is None or not qdq.is_scalar(source) or qdq.code_type(source) != np.uint16:
        return 0.0
    step, offset = (float(lazy_values.values_of(item)) for item in source.inputs[1:3])
    return max(offset, _LEVELS - offset) * step


def coefficients(furthest: float) -> list[float]:
    """c0, c1 ... of tanh(x) / x in powers of x^2, for x within `furthest`, as many as are needed."""
    square = max(furthest, _LEAST) ** 2
    samples = np.linspace(square / 1000, square, 1000)
    for degree in range(3):
        nodes = (chebyshev.chebpts1(degree + 1) + 1) / 2 * square
        found = np.linalg.solve(np.vander(nodes / square, increasing=True), _ratio(nodes))
        error = np.abs(np.polyval(found[::-1], samples / square) - _ratio(samples)).max()
        if error <= _TOLERANCE:
            break
    return [float(value / square**power) for power, value in enumerate(found)]


def _ratio(square: Array) -> Array:
    root = np.sqrt(square)
    result: Array = np.tanh(root) / root
    return result


class _Writer:
    """One run: new nodes and their constants have names of their own."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = qdq.Names(graph)
        self.constants = qdq.SharedConstants(graph, self.names)

    def write(self, node: gs.Node) -> None:
        """Replace a Tanh; the quantizer of its result stays."""
        x, result = node.inputs[0], node.outputs[0]
        node.outputs.clear()
        self._add("Mul", node, [x, self._polynomial(node, x)], result)

    def _polynomial(self, node: gs.Node, x: gs.Tensor) -> gs.Tensor:
        """tanh(x) / x by Horner's rule."""
        square, (lowest, *rest) = _furthest(node) ** 2, coefficients(_furthest(node))
        total = self._constant(node, rest[-1] if rest else lowest)
        if not rest:
            return total
        squared = self._quantized("Mul", node, [x, x], (0.0, square))
        bound = rest[-1]
        for coefficient in [*rest[-2::-1], lowest]:
            product = self._quantized("Mul", node, [squared, total], _ends(0.0, bound * square))
            ends = _ends(coefficient, coefficient + bound * square, 0.0)
            total = self._quantized("Add", node, [product, self._constant(node, coefficient)], ends)
            bound = min(ends) if coefficient < 0 else max(ends)
        return total

    def _quantized(self, op: str, node: gs.Node, inputs: Sequence[gs.Tensor], ends: tuple[float, float]) -> gs.Variable:
        result = gs.Variable(self.names.free(f"{node.name}_{op.lower()}"), np.float32, node.inputs[0].shape)
        self._add(op, node, inputs, result)
        like = gs.Node(qdq.QUANTIZE, "", {}, [gs.Variable(""), *self._grid(ends)])
        pair = qdq.insert_pair(self.graph, self.names, result, like, [])
        like.inputs.clear()
        return pair

    def _constant(self, node: gs.Node, value: float) -> gs.Variable:
        """A number on a grid that ends with it."""
        scale, zero_point = self._grid(_ends(0.0, value))
        code = lazy_values.constant(
            self.names.free(f"{node.name}_coefficient"), np.array(_LEVELS if value > 0 else 0, np.uint16)
        )
        result = gs.Variable(self.names.free(f"{node.name}_coefficient_dq"), np.float32, [])
        inputs = [code, scale, zero_point]
        self.graph.nodes.append(
            gs.Node(qdq.DEQUANTIZE, self.names.free(f"{node.name}/DequantizeLinear"), {}, inputs, [result])
        )
        return result

    def _add(self, op: str, node: gs.Node, inputs: Sequence[gs.Tensor], result: gs.Tensor) -> None:
        prefix = node.name.removesuffix(node.op)
        self.graph.nodes.append(gs.Node(op, self.names.free(f"{prefix}{op}"), {}, list(inputs), [result]))

    def _grid(self, ends: tuple[float, float]) -> list[gs.Constant]:
        """Scale and zero point of 16 bits."""
        scale = np.array((ends[1] - ends[0]) / _LEVELS, np.float32)
        zero_point = np.array(round(-ends[0] / float(scale)), np.uint16)
        return [self.constants.get(f"scale_{float(scale):.6g}", scale), self.constants.zero_point(zero_point)]


def _ends(*values: float) -> tuple[float, float]:
    return min(values), max(values)
