"""New ops in a quantized ONNX graph: a grid as numbers, and a writer of ops whose results have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of a whole tensor, and the type of its codes."""

    scale: float
    zero_point: int
    stored: np.dtype[np.generic]

    @staticmethod
    def of(quantizer: gs.Node) -> Grid:
        """That of a Q or DQ with one scale."""
        scale, zero_point = (lazy_values.values_of(item) for item in quantizer.inputs[1:3])
        return Grid(float(scale), int(zero_point), qdq.code_type(quantizer))

    @staticmethod
    def behind(tensor: gs.Tensor) -> Grid | None:
        """That of the DQ with one scale that a tensor comes from; None for other tensors."""
        source = qdq.made_by(tensor, qdq.DEQUANTIZE)
        return Grid.of(source) if source is not None and qdq.is_scalar(source) else None

    @staticmethod
    def spanning(lowest: float, highest: float, stored: np.dtype[np.generic]) -> Grid:
        """The one whose codes reach from `lowest`, 0 at most, to `highest`, above it, as nearly as zero allows."""
        first, last = lazy_values.type_range(stored)
        scale = float(np.float32((highest - lowest) / (last - first)))
        return Grid(scale, first + round(-lowest / scale), stored)

    @property
    def lowest(self) -> float:
        """The value of the first code."""
        return (lazy_values.type_range(self.stored)[0] - self.zero_point) * self.scale

    @property
    def highest(self) -> float:
        """The value of the last code."""
        return (lazy_values.type_range(self.stored)[1] - self.zero_point) * self.scale


class Writer:
    """Adds ops to a graph; nodes, tensors and constants have names of their own, equal constants one."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = qdq.Names(graph)
        self.constants = qdq.SharedConstants(graph, self.names)

    def op(self, kind: str, beside: str, inputs: Sequence[gs.Tensor], result: gs.Tensor) -> None:
        """An op in the module of the node named `beside`; `result` is what it computes."""
        module, slash, _ = beside.rpartition("/")
        self.graph.nodes.append(gs.Node(kind, self.names.free(f"{module}{slash}{kind}"), {}, list(inputs), [result]))

    def quantized_op(
        self, kind: str, beside: str, inputs: Sequence[gs.Tensor], shape: Sequence[int], grid: Grid
    ) -> gs.Variable:
        """The same with a result of that shape on a grid.

        Returns:
            The dequantized result.
        """
        result = gs.Variable(self.names.free(f"{beside}_{kind.lower()}"), np.float32, shape)
        self.op(kind, beside, inputs, result)
        return self.pair(result, grid)

    def pair(self, tensor: gs.Tensor, grid: Grid) -> gs.Variable:
        """Q and DQ behind a tensor, read by nothing yet.

        Returns:
            The dequantized tensor.
        """
        scale, zero_point = self.parameters(grid)
        like = gs.Node(qdq.QUANTIZE, "", {}, [gs.Variable(""), scale, zero_point])
        result = qdq.insert_pair(self.graph, self.names, tensor, like, [])
        like.inputs.clear()
        return result

    def number(self, value: float, beside: str, stored: np.dtype[np.generic]) -> gs.Variable:
        """A dequantized constant, on a grid that ends with it."""
        grid = Grid.spanning(min(value, 0.0), max(value, 0.0), stored)
        code = np.array(lazy_values.type_range(stored)[int(value > 0)], stored)
        constant = lazy_values.constant(self.names.free(f"{beside}_number"), code)
        result = gs.Variable(self.names.free(f"{beside}_number_dq"), np.float32, [])
        self.op(qdq.DEQUANTIZE, beside, [constant, *self.parameters(grid)], result)
        return result

    def parameters(self, grid: Grid) -> tuple[gs.Constant, gs.Constant]:
        """The constants of a grid: scale and zero point."""
        scale = self.constants.get(f"scale_{grid.scale:.6g}", np.array(grid.scale, np.float32))
        return scale, self.constants.zero_point(np.array(grid.zero_point, grid.stored))
