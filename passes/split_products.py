"""split-products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.lazy_values import Array
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

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
        writer = _Writer(model)
        for node in wide:
            writer.split(node)
        if wide:
            qdq.finish(model)
        return PassResult(model, bool(wide), tuple(f"split {node.name}" for node in wide))


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of a tensor."""

    scale: float
    zero_point: int
    levels: int

    @staticmethod
    def of(quantizer: gs.Node) -> _Grid:
        scale, zero_point = (lazy_values.values_of(item) for item in quantizer.inputs[1:3])
        return _Grid(float(scale), int(zero_point), lazy_values.type_range(qdq.code_type(quantizer))[1])

    @staticmethod
    def spanning(lowest: float, highest: float, stored: np.dtype[np.generic]) -> _Grid:
        levels = lazy_values.type_range(stored)[1]
        scale = (highest - lowest) / levels
        return _Grid(scale, round(-lowest / scale), levels)

    @property
    def lowest(self) -> float:
        return -self.zero_point * self.scale

    @property
    def highest(self) -> float:
        return (self.levels - self.zero_point) * self.scale


def _is_wide(node: gs.Node) -> bool:
    sources = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs]
    readers = node.outputs[0].outputs
    if len(readers) != 1 or readers[0].op != qdq.QUANTIZE or any(source is None for source in sources):
        return False
    quantizers = [*(source for source in sources if source is not None), readers[0]]
    if any(qdq.is_constant(source.inputs[0]) for source in quantizers[:2]):
        return False
    return node.inputs[1].shape is not None and all(qdq.code_type(item) == _WIDE for item in quantizers)


class _Writer:
    """One run: an operand that several products share is split once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = qdq.Names(graph)
        self.constants = qdq.SharedConstants(graph, self.names)
        self.parts: dict[str, tuple[gs.Variable, gs.Variable, float]] = {}

    def split(self, node: gs.Node) -> None:
        """Let a product be the sum of two; the quantizer of its result stays."""
        first, second, result = node.inputs[0], node.inputs[1], node.outputs[0]
        if second.name not in self.parts:
            self.parts[second.name] = self._bytes(second)
        high, low, step = self.parts[second.name]
        whole = _Grid.of(result.outputs[0])
        rest = self._bound(first, int(second.shape[-2]) * step, whole)
        node.outputs.clear()
        above = _Grid.spanning(whole.lowest - rest, whole.highest + rest, _WIDE)
        products = [
            self._quantized("MatMul", node.name, [first, high], result.shape, above, _WIDE),
            self._quantized("MatMul", node.name, [first, low], result.shape, _Grid.spanning(-rest, rest, _WIDE), _WIDE),
        ]
        self._add("Add", node.name, products, result)

    def _bytes(self, tensor: gs.Tensor) -> tuple[gs.Variable, gs.Variable, float]:
        """The two parts of an operand, and the step of the first, within which the second stays."""
        source = qdq.made_by(tensor, qdq.DEQUANTIZE)
        assert source is not None
        whole, name = _Grid.of(source), source.outputs[0].name
        step = (whole.highest - whole.lowest) / 254  # one code of 255 is left for rounding zero_point
        coarse = _Grid(step, round(-whole.lowest / step), 255)
        fine = _Grid(step / _RATIO, coarse.zero_point * _RATIO, whole.levels)
        high = self._pair(tensor, coarse, _NARROW)
        exact = self._pair(high, fine, _WIDE)
        low = self._quantized("Sub", f"{name}/Sub", [tensor, exact], tensor.shape, _centred(step), _NARROW)
        return high, low, step

    def _bound(self, first: gs.Tensor, most: float, whole: _Grid) -> float:
        """What the second product stays below; where a sum of many could go beyond, its grid is kept fine instead."""
        source = qdq.made_by(first, qdq.DEQUANTIZE)
        assert source is not None
        grid = _Grid.of(source)
        return min(most * max(-grid.lowest, grid.highest), (whole.highest - whole.lowest) / _SHARE)

    def _quantized(
        self,
        op: str,
        name: str,
        inputs: Sequence[gs.Tensor],
        shape: Sequence[int],
        grid: _Grid,
        stored: np.dtype[np.generic],
    ) -> gs.Variable:
        result = gs.Variable(self.names.free(f"{name}_{op.lower()}"), np.float32, shape)
        self._add(op, name, inputs, result)
        return self._pair(result, grid, stored)

    def _add(self, op: str, name: str, inputs: Sequence[gs.Tensor], result: gs.Tensor) -> None:
        prefix = name.rpartition("/")[0]
        self.graph.nodes.append(gs.Node(op, self.names.free(f"{prefix}/{op}"), {}, list(inputs), [result]))

    def _pair(self, tensor: gs.Tensor, grid: _Grid, stored: np.dtype[np.generic]) -> gs.Variable:
        scale: Array = np.array(grid.scale, np.float32)
        constants = [
            self.constants.get(f"scale_{grid.scale:.6g}", scale),
            self.constants.zero_point(np.array(grid.zero_point, stored)),
        ]
        like = gs.Node(qdq.QUANTIZE, "", {}, [gs.Variable(""), *constants])
        result = qdq.insert_pair(self.graph, self.names, tensor, like, [])
        like.inputs.clear()
        return result


def _centred(step: float) -> _Grid:
    """8 bits over two steps around 0, since the library rounds to a grid less exactly than to half a step."""
    return _Grid(step / 127, 127, 255)
