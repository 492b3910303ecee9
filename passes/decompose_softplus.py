"""decompose-softplus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.qdq_writer import Grid, Writer

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
        writer = Writer(model)
        for node in wide:
            _write_out(node, writer)
        if wide:
            qdq.finish(model)
        return PassResult(model, bool(wide), tuple(f"decomposed {node.name}" for node in wide))


def _is_wide(node: gs.Node) -> bool:
    grid = Grid.behind(node.inputs[0])
    return grid is not None and grid.stored == np.uint16


def _write_out(node: gs.Node, writer: Writer) -> None:
    """Replace a Softplus; the quantizer of its result stays."""
    x, result = node.inputs[0], node.outputs[0]
    whole = Grid.behind(x)
    assert whole is not None
    greatest = max(-whole.lowest, whole.highest, _LEAST_SPAN)

    def part(op: str, of: gs.Tensor, lowest: float, highest: float) -> gs.Variable:
        return writer.quantized_op(op, node.name, [of], x.shape, Grid.spanning(lowest, highest, whole.stored))

    sigmoid = part("Sigmoid", part("Abs", x, 0.0, greatest), *_SIGMOID)
    logarithm = part("Log", sigmoid, *_LOGARITHM)
    positive = part("Relu", x, 0.0, max(whole.highest, _LEAST_SPAN))
    node.outputs.clear()
    writer.op("Sub", node.name, [positive, logarithm], result)
