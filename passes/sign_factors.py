"""sign-factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.qdq_writer import Grid, Writer

_UNSIGNED, _SIGNED = np.dtype(np.uint16), np.dtype(np.int16)
_HIGHEST = 127 * 257  # of two signed bytes, 127 * 256 + 127: columns with codes beyond it stray by 30 to 75 steps


@dataclass(frozen=True)
class SignFactors(OnnxPass):
    """Give the second factor of a 16-bit MatMul of two activations a signed grid around 0.

    Before: `MatMul(DQ16(a), DQ16(b))`. After: `MatMul(DQ16(a), DQ(Q(DQ16(b))))`, the new pair of int16 with zero point
    0, over as much as b goes to either side. An unsigned second factor the HTP library rounds to 8 bits: scores and
    contexts of attention stray by 31 to 70 steps in the mean; a signed one it takes as it is, from v73 on, and is right
    within a step in the mean. The pair is a conversion on the device, once for each b, and costs b half a step. Does
    nothing at 8 bits, and to products with a weight.
    """

    name: ClassVar[str] = "sign-factors"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        wide = [node for node in model.nodes if node.op == "MatMul" and _is_wide(node)]
        signer = _Signer(model)
        for node in wide:
            node.inputs[1] = signer.signed(node.inputs[1])
        if wide:
            qdq.finish(model)
        return PassResult(model, bool(wide), tuple(f"signed the second factor of {node.name}" for node in wide))


def _is_wide(node: gs.Node) -> bool:
    sources = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs]
    return all(
        source is not None and qdq.is_activation(source) and qdq.code_type(source) == _UNSIGNED for source in sources
    )


class _Signer:
    """One run: a tensor that several products read is converted once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.writer = Writer(graph)
        self.known: dict[str, gs.Variable] = {}

    def signed(self, tensor: gs.Tensor) -> gs.Variable:
        """The values of a dequantized tensor, through a pair of int16."""
        if tensor.name not in self.known:
            self.known[tensor.name] = self.writer.pair(tensor, _around_zero(tensor))
        return self.known[tensor.name]


def _around_zero(tensor: gs.Tensor) -> Grid:
    """As far to both sides as the tensor's own grid goes to one."""
    whole = Grid.behind(tensor)
    assert whole is not None
    return Grid(max(-whole.lowest, whole.highest) / _HIGHEST, 0, _SIGNED)
