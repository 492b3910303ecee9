"""span-logarithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.qdq_writer import Grid

LEAST_SPAN = 4.0  # of the result: a step of 2 ** -14, the least normal number of float16
_MARGIN = 1.001


@dataclass(frozen=True)
class SpanLogarithms(OnnxPass):
    """Give the result of a 16-bit Log a grid that is wide enough for the HTP library.

    Before: `Log -> Q(-3 ... 0.4) -> DQ`. After: the same with the range -3.6 ... 0.4. Where it spans less than 4,
    whatever that of the input, all of the library's result is garbage. A wider range makes coarser steps, of 6e-5. Does
    nothing at 8 bits and to a result that spans enough.
    """

    name: ClassVar[str] = "span-logarithms"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        names, changes = qdq.Names(model), []
        for node in model.nodes:
            range_ = spanning(node) if node.op == "Log" else None
            if range_ is not None:
                _set_range(node, *range_, names)
                changes.append(f"widened the result of {node.name} to {range_[0]:.3g} ... {range_[1]:.3g}")
        return PassResult(model, bool(changes), tuple(changes))


def spanning(node: gs.Node) -> tuple[float, float] | None:
    """The range that the result of a Log needs at 16 bits; None where it has it."""
    results = [reader for reader in node.outputs[0].outputs if reader.op == qdq.QUANTIZE]
    if not results or qdq.code_type(results[0]) != np.uint16 or not qdq.is_scalar(results[0]):
        return None
    grid = Grid.of(results[0])
    too_narrow = grid.highest - grid.lowest < LEAST_SPAN
    return (grid.highest - LEAST_SPAN * _MARGIN, grid.highest) if too_narrow else None


def _set_range(node: gs.Node, lowest: float, highest: float, names: qdq.Names) -> None:
    """Constants of their own for the quantizers of the result, under the names that tell whose they are."""
    quantizers = [reader for reader in node.outputs[0].outputs if reader.op == qdq.QUANTIZE]
    grid = Grid.spanning(lowest, highest, np.dtype(np.uint16))
    name = quantizers[0].inputs[1].name
    quantizers[0].inputs[1].name = names.free(f"{name}_narrow")
    wide = lazy_values.constant(name, np.array(grid.scale, np.float32))
    offset = lazy_values.constant(names.free(f"{name}_zero_point"), np.array(grid.zero_point, grid.stored))
    for quantizer in quantizers:
        for item in (quantizer, *quantizer.outputs[0].outputs):
            item.inputs[1], item.inputs[2] = wide, offset
