"""split-products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.qdq_writer import Grid, Writer

_WIDE, _NARROW = np.dtype(np.uint16), np.dtype(np.uint8)
_RATIO = 257  # 65535 / 255
_SHARE = 16  # the part of the result's range that the second product may take


@dataclass(frozen=True)
class SplitProducts(OnnxPass):
    """Compute a 16-bit MatMul of two activations as two, with the high and the low byte of the second operand.

    Before: `MatMul(DQ16(a), DQ16(b))`. After: `MatMul(DQ16(a), DQ8(h)) + MatMul(DQ16(a), DQ8(b - h))`, h being b on a
    grid of 8 bits and b - h what that leaves, on one that spans two steps of it. The HTP library rounds b to 8 bits by
    itself: scores and contexts of attention stray by 31 steps in the mean, against 3 for the sum. It costs a second
    MatMul. Does nothing at 8 bits, and to products with a weight, whose width is chosen.
    """

    name: ClassVar[str] = "split-products"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        wide = [node for node in model.nodes if node.op == "MatMul" and _is_wide(node)]
        splitter = _Splitter(model)
        for node in wide:
            splitter.split(node)
        if wide:
            qdq.finish(model)
        return PassResult(model, bool(wide), tuple(f"split {node.name}" for node in wide))


def _is_wide(node: gs.Node) -> bool:
    sources = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs]
    readers = node.outputs[0].outputs
    if len(readers) != 1 or readers[0].op != qdq.QUANTIZE or any(source is None for source in sources):
        return False
    quantizers = [*(source for source in sources if source is not None), readers[0]]
    if any(qdq.is_constant(source.inputs[0]) for source in quantizers[:2]):
        return False
    return node.inputs[1].shape is not None and all(qdq.code_type(item) == _WIDE for item in quantizers)


class _Splitter:
    """One run: an operand that several products share is split once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.writer = Writer(graph)
        self.parts: dict[str, tuple[gs.Variable, gs.Variable, float]] = {}

    def split(self, node: gs.Node) -> None:
        """Let a product be the sum of two; the quantizer of its result stays."""
        first, second, result = node.inputs[0], node.inputs[1], node.outputs[0]
        if second.name not in self.parts:
            self.parts[second.name] = self._bytes(second)
        high, low, step = self.parts[second.name]
        whole = Grid.of(result.outputs[0])
        rest = _bound(first, int(second.shape[-2]) * step, whole)
        node.outputs.clear()
        grids = (Grid.spanning(whole.lowest - rest, whole.highest + rest, _WIDE), Grid.spanning(-rest, rest, _WIDE))
        products = [
            self.writer.quantized_op("MatMul", node.name, [first, part], result.shape, grid)
            for part, grid in zip((high, low), grids, strict=True)
        ]
        self.writer.op("Add", node.name, products, result)

    def _bytes(self, tensor: gs.Tensor) -> tuple[gs.Variable, gs.Variable, float]:
        """The two parts of an operand, and the step of the first, within which the second stays."""
        whole = _grid_of(tensor)
        step = (whole.highest - whole.lowest) / 254  # one code of 255 is left for rounding zero_point
        coarse = Grid(step, round(-whole.lowest / step), _NARROW)
        fine = Grid(step / _RATIO, coarse.zero_point * _RATIO, _WIDE)
        high = self.writer.pair(tensor, coarse)
        exact = self.writer.pair(high, fine)
        low = self.writer.quantized_op("Sub", f"{tensor.name}/Sub", [tensor, exact], tensor.shape, _centred(step))
        return high, low, step


def _grid_of(tensor: gs.Tensor) -> Grid:
    source = qdq.made_by(tensor, qdq.DEQUANTIZE)
    assert source is not None
    return Grid.of(source)


def _bound(first: gs.Tensor, most: float, whole: Grid) -> float:
    """What the second product stays below; where a sum of many could go beyond, its grid is kept fine instead."""
    grid = _grid_of(first)
    return min(most * max(-grid.lowest, grid.highest), (whole.highest - whole.lowest) / _SHARE)


def _centred(step: float) -> Grid:
    """8 bits over two steps around 0, since the library rounds to a grid less exactly than to half a step."""
    return Grid(step / 127, 127, _NARROW)
