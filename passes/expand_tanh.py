"""expand-tanh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.polynomial import chebyshev

from fraqat_compiler import qdq
from fraqat_compiler.lazy_values import Array
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.qdq_writer import Grid, Writer

_WIDE = np.dtype(np.uint16)
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
        writer = Writer(model)
        for node in near:
            _expand(node, writer)
        if near:
            qdq.finish(model)
        return PassResult(model, bool(near), tuple(f"expanded {node.name}" for node in near))


def _furthest(node: gs.Node) -> float:
    """How far from 0 the input of 16 bits goes; 0 for others."""
    grid = Grid.behind(node.inputs[0])
    if grid is None or grid.stored != _WIDE:
        return 0.0
    return max(-grid.lowest, grid.highest)


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


def _expand(node: gs.Node, writer: Writer) -> None:
    """Replace a Tanh; the quantizer of its result stays."""
    x, result = node.inputs[0], node.outputs[0]
    node.outputs.clear()
    writer.op("Mul", node.name, [x, _polynomial(node, x, writer)], result)


def _polynomial(node: gs.Node, x: gs.Tensor, writer: Writer) -> gs.Tensor:
    """tanh(x) / x by Horner's rule."""

    def quantized(op: str, inputs: Sequence[gs.Tensor], *ends: float) -> gs.Variable:
        return writer.quantized_op(op, node.name, inputs, x.shape, Grid.spanning(min(ends), max(ends), _WIDE))

    square, (lowest, *rest) = _furthest(node) ** 2, coefficients(_furthest(node))
    total = writer.number(rest[-1] if rest else lowest, node.name, _WIDE)
    if not rest:
        return total
    squared = quantized("Mul", [x, x], 0.0, square)
    bound = rest[-1]
    for coefficient in [*rest[-2::-1], lowest]:
        product = quantized("Mul", [squared, total], 0.0, bound * square)
        ends = (coefficient, coefficient + bound * square, 0.0)
        total = quantized("Add", [product, writer.number(coefficient, node.name, _WIDE)], *ends)
        bound = min(ends) if coefficient < 0 else max(ends)
    return total
