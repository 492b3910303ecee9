"""flatten-tanh."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult


@dataclass(frozen=True)
class FlattenTanh(OnnxPass):
    """Compute a 16-bit Tanh on one row.

    Before: `Tanh(DQ(x [16, 64])) -> Q`. After: `Reshape [1, 1024] -> Q -> DQ -> Tanh -> Q -> DQ -> Reshape [16, 64] ->
    Q`, every pair with the parameters of the one beside it. The HTP library computes garbage where a 16-bit Tanh
    follows a linear layer in its shape. Does nothing at 8 bits, and to a Tanh of one row, at any rank.
    """

    name: ClassVar[str] = "flatten-tanh"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        names = qdq.Names(model)
        shapes = qdq.SharedConstants(model, names)
        wide = [node for node in model.nodes if node.op == "Tanh" and _is_wide(node)]
        for node in wide:
            _flatten(model, node, names, shapes)
        if wide:
            qdq.finish(model)
        return PassResult(model, bool(wide), tuple(f"flattened {node.name}" for node in wide))


def _is_wide(node: gs.Node) -> bool:
    source, shape = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE), node.inputs[0].shape
    readers = node.outputs[0].outputs
    if source is None or shape is None or not readers or any(reader.op != qdq.QUANTIZE for reader in readers):
        return False
    return qdq.code_type(source) == np.uint16 and prod(shape[:-1]) > 1


def _flatten(graph: gs.Graph, node: gs.Node, names: qdq.Names, shapes: qdq.SharedConstants) -> None:
    x, y = node.inputs[0], node.outputs[0]
    before, after = qdq.made_by(x, qdq.DEQUANTIZE), y.outputs[0]
    row = [1, prod(x.shape)]
    flat_x, flat_y = (gs.Variable(names.free(f"{tensor.name}_row"), np.float32, row) for tensor in (x, y))
    _reshape(graph, node, x, flat_x, names, shapes)
    node.inputs[0], node.outputs[0] = flat_x, flat_y
    qdq.insert_pair(graph, names, flat_x, before, [node])
    shaped = qdq.insert_pair(graph, names, flat_y, after, [])
    _reshape(graph, node, shaped, y, names, shapes)


def _reshape(
    graph: gs.Graph, node: gs.Node, source: gs.Tensor, result: gs.Tensor, names: qdq.Names, shapes: qdq.SharedConstants
) -> None:
    sizes = np.array(result.shape, np.int64)
    shape = shapes.get("shape_" + "x".join(map(str, result.shape)), sizes)
    graph.nodes.append(gs.Node("Reshape", names.free(f"{node.name}/Reshape"), {}, [source, shape], [result]))
