"""convert-widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.errors import PassError
from fraqat_compiler.lazy_values import LazyArray
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

_NARROW, _WIDE = np.dtype(np.uint8), np.dtype(np.uint16)
_RATIO = 257  # 65535 / 255: each 8-bit grid is every 257th value of a 16-bit one that ends where it ends
_KERNELS = frozenset(
    ("Gemm", "Conv", "ConvTranspose", "LayerNormalization", "InstanceNormalization", "RMSNormalization")
)
_ROUNDS_DOWN = "RMSNormalization"
_MOVES = frozenset(("Gather", "Reshape", "Transpose", "Slice", "Split", "Expand", "Tile", "Squeeze", "Unsqueeze"))


@dataclass(frozen=True)
class ConvertWidths(OnnxPass):
    """Give every op one activation width, by an explicit conversion where 8 and 16 bits meet.

    Before: `Gemm(DQ16(x)) -> Q8`. After: `Gemm(DQ16(x)) -> Q16 -> DQ16 -> Q8`. Before: `Add(DQ8(x), DQ16(y)) -> Q16`.
    After: the same of `DQ16(Q16(DQ8(x)))`. The HTP library refuses kernels and norms whose sides differ, and computes
    other ops that read 8 and write 16 bits as if all had 8. An RMSNormalization of 8 bits on both sides gets 16 on
    both: at 8 the library rounds its result down, half a step too low in the mean. An op that moves values keeps the
    grid of what it moves, and the conversion follows it: else the library holds a second, converted copy of an
    embedding table.

    A 16-bit grid made here spans what the 8-bit one spans in 257 times finer steps: widening is exact, and narrowing
    rounds twice, which matters to values within 1/514 step of a tie. Does nothing to other ops of one width, to those
    that only narrow, which the library computes rightly, and to a Softmax, which it computes as well from 8 bits.
    """

    name: ClassVar[str] = "convert-widths"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        conversion = _Conversion(model)
        changes = tuple(line for node in list(model.nodes) for line in conversion.convert(node))
        if changes:
            qdq.finish(model)
        return PassResult(model, bool(changes), changes)


class _Conversion:
    """One run: a tensor that several nodes want wider is converted once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = qdq.Names(graph)
        self.constants = qdq.SharedConstants(graph, self.names)
        self.wide: dict[str, gs.Variable] = {}

    def convert(self, node: gs.Node) -> list[str]:
        """Convert around one node; what was done."""
        results = [reader for output in node.outputs for reader in output.outputs if reader.op == qdq.QUANTIZE]
        types = {qdq.code_type(result) for result in results}
        if node.op == qdq.DEQUANTIZE or len(types) != 1 or not types <= {_NARROW, _WIDE}:
            return []
        width = types.pop()
        if _is_kernel(node):
            return self._convert_kernel(node, width, results)
        if node.op in _MOVES:
            return self._keep_grid(node, results)
        narrow = [tensor for tensor in node.inputs if _type(tensor) == _NARROW]
        if width == _NARROW or not narrow or node.op == "Softmax":
            return []
        return [self._widen(node, tensor) for tensor in narrow]

    def _convert_kernel(self, node: gs.Node, width: np.dtype[np.generic], results: Sequence[gs.Node]) -> list[str]:
        source = node.inputs[0]
        if _type(source) == _NARROW and width == _WIDE:
            self._refine_bias(node)
            return [self._widen(node, source)]
        if _type(source) == _WIDE and width == _NARROW:
            return [self._narrow(node, results)]
        if node.op == _ROUNDS_DOWN and _type(source) == _NARROW:
            return [self._widen(node, source), self._narrow(node, results)]
        return []

    def _narrow(self, node: gs.Node, results: Sequence[gs.Node]) -> str:
        """Let a node give 16 bits to its 8-bit quantizers."""
        like = self._widened(results[0])
        qdq.insert_pair(self.graph, self.names, results[0].inputs[0], like, results)
        like.inputs.clear()
        return f"narrowed the result of {node.name}"

    def _keep_grid(self, node: gs.Node, results: Sequence[gs.Node]) -> list[str]:
        source = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE)
        if source is None or _type(node.inputs[0]) not in (_NARROW, _WIDE):
            return []
        others = [result for result in results if not qdq.same_parameters(source, result)]
        for result in others:
            qdq.insert_pair(self.graph, self.names, result.inputs[0], source, [result])
        return [f"converted after {node.name}"] if others else []

    def _widen(self, node: gs.Node, tensor: gs.Tensor) -> str:
        """Let a node read a tensor at 16 bits."""
        source = qdq.made_by(tensor, qdq.DEQUANTIZE)
        assert source is not None
        if tensor.name not in self.wide:
            make = self._wide_constant if qdq.is_constant(source.inputs[0]) else self._wide_pair
            self.wide[tensor.name] = make(source)
        qdq.replace_input(node, tensor, self.wide[tensor.name])
        return f"widened {tensor.name} for {node.name}"

    def _wide_pair(self, source: gs.Node) -> gs.Variable:
        like = self._widened(source)
        result = qdq.insert_pair(self.graph, self.names, source.outputs[0], like, [])
        like.inputs.clear()
        return result

    def _wide_constant(self, source: gs.Node) -> gs.Variable:
        """A table of codes needs no conversion when the model runs."""
        codes, name = source.inputs[0], self.names.free(f"{source.name}_wide")
        values = codes._values
        lazy = LazyArray(codes.shape, _WIDE, lambda: lazy_values.load(values).astype(_WIDE) * np.uint16(_RATIO))
        result = gs.Variable(self.names.free(f"{source.outputs[0].name}_wide"), np.float32, list(codes.shape))
        wide = self._widened(source)
        wide.name, wide.outputs = name, [result]
        wide.inputs[0] = gs.Constant(self.names.free(f"{codes.name}_wide"), lazy)
        self.graph.nodes.append(wide)
        return result

    def _widened(self, quantizer: gs.Node) -> gs.Node:
        """A quantizer that spans the same at 16 bits."""
        tensor, scale, zero_point = quantizer.inputs
        fine = np.asarray(lazy_values.values_of(scale) / np.float32(_RATIO))
        offset = np.asarray(lazy_values.values_of(zero_point).astype(_WIDE) * np.uint16(_RATIO))
        inputs = [tensor, self.constants.get(f"{scale.name}_wide", fine), self.constants.zero_point(offset)]
        return gs.Node(quantizer.op, "", dict(quantizer.attrs), inputs)

    def _refine_bias(self, node: gs.Node) -> None:
        """The scale of an int32 bias follows that of the input."""
        source = qdq.made_by(node.inputs[2], qdq.DEQUANTIZE) if len(node.inputs) > 2 else None
        if source is None:
            return
        codes = lazy_values.values_of(source.inputs[0]).astype(np.int64) * _RATIO
        if np.abs(codes).max(initial=0) > np.iinfo(np.int32).max:
            raise PassError(
                f"the bias of {node.name} is too large to be added to a 16-bit input.",
                "Give its input 16 bits too: name the module before it in --activations.",
            )
        fine = np.asarray(lazy_values.values_of(source.inputs[1]) / np.float32(_RATIO))
        bias, scale = source.inputs[:2]
        exact = lazy_values.constant(self.names.free(f"{bias.name}_wide"), codes.astype(np.int32))
        inputs = [exact, lazy_values.constant(self.names.free(f"{scale.name}_wide"), fine), *source.inputs[2:]]
        result = gs.Variable(self.names.free(f"{source.outputs[0].name}_wide"), np.float32, list(bias.shape))
        name = self.names.free(f"{source.name}_wide")
        self.graph.nodes.append(gs.Node(qdq.DEQUANTIZE, name, dict(source.attrs), inputs, [result]))
        node.inputs[2] = result


def _is_kernel(node: gs.Node) -> bool:
    """An op with a weight of its own, whose two sides must have one width."""
    if node.op != "MatMul":
        return node.op in _KERNELS
    weight = qdq.made_by(node.inputs[1], qdq.DEQUANTIZE)
    return weight is not None and qdq.is_constant(weight.inputs[0])


def _type(tensor: gs.Tensor) -> np.dtype[np.generic] | None:
    """The type of the codes behind a tensor with one scale; None for others."""
    source = qdq.made_by(tensor, qdq.DEQUANTIZE)
    return qdq.code_type(source) if source is not None and qdq.is_scalar(source) else None
