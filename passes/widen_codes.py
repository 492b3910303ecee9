"""widen-codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.lazy_values import LazyArray
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult

_WEIGHTED = ("Gemm", "MatMul", "Conv", "ConvTranspose")
_BYTE = np.dtype(np.int8)
_FOUR_BITS = 8  # codes from -8 to 7


@dataclass(frozen=True)
class WidenCodes(OnnxPass):
    """Multiply the codes of narrow weights at 16-bit activations by a power of two, and divide their scale by it.

    Before: `Gemm(DQ16(x), DQ(codes -8..7, scale))`. After: `Gemm(DQ16(x), DQ(codes -128..112, scale / 16))`, the same
    weights in bytes, and the same bias. Of every sum of a layer with 16-bit activations the HTP library drops the low 8
    bits: with 8-bit codes that is nothing that the result could show, with 4-bit ones 8 steps of it in the mean at 64
    inputs. It costs a byte for a code instead of half of one, so it is done to layers of few inputs, which lose most by
    it, and to small ones; and to all codes of 5 to 7 bits, which lie in bytes anyway. Does nothing to layers with 8-bit
    activations, to grouped convolutions, and to codes that a zero point shifts.

    Options: a layer of 4-bit codes has few inputs, products that are summed to one output, up to `inputs` of them, and
    is small up to so many `codes`.
    """

    name: ClassVar[str] = "widen-codes"
    inputs: int = 128
    codes: int = 1 << 14

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        constants = qdq.SharedConstants(model, qdq.Names(model))
        changed = [
            name for name, layers in _weights(model).items() if self._is_worth_it(layers) and _widen(layers, constants)
        ]
        if changed:
            qdq.finish(model)
        return PassResult(model, bool(changed), tuple(f"widened {name}" for name in changed))

    def _is_worth_it(self, layers: list[gs.Node]) -> bool:
        codes = _source(layers[0].inputs[1]).inputs[0]
        packs = max(map(abs, lazy_values.code_range(codes))) <= _FOUR_BITS
        is_small = lazy_values.element_count(codes.shape) <= self.codes
        return not packs or is_small or max(map(_summed, layers)) <= self.inputs


def _weights(graph: gs.Graph) -> dict[str, list[gs.Node]]:
    """Name of each constant of codes that only layers with 16-bit activations read, and those layers."""
    weights: dict[str, list[gs.Node]] = {}
    for node in graph.nodes:
        if (
            node.op == qdq.DEQUANTIZE
            and qdq.is_constant(node.inputs[0])
            and lazy_values.dtype_of(node.inputs[0]) == _BYTE
        ):
            weights.setdefault(node.inputs[0].name, []).extend(node.outputs[0].outputs)
    return {name: readers for name, readers in weights.items() if all(_is_wide_layer(node, name) for node in readers)}


def _is_wide_layer(node: gs.Node, weight: str) -> bool:
    if node.op not in _WEIGHTED or node.attrs.get("group", 1) != 1:
        return False
    activation, weighted = (qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs[:2])
    if activation is None or weighted is None or weighted.inputs[0].name != weight:
        return False
    zero_points = lazy_values.values_of(weighted.inputs[2]) if len(weighted.inputs) > 2 else np.zeros(1)
    return qdq.code_type(activation).itemsize == 2 and not zero_points.any() and not weighted.attrs.get("block_size", 0)


def _summed(layer: gs.Node) -> int:
    """Products that make one output."""
    shape = layer.inputs[1].shape
    outputs = {"Gemm": -1 if not layer.attrs.get("transB", 0) else 0, "MatMul": -1, "Conv": 0, "ConvTranspose": 1}
    return lazy_values.element_count(shape) // int(shape[outputs[layer.op]])


def _widen(layers: list[gs.Node], constants: qdq.SharedConstants) -> bool:
    """Change the codes, and the scales of weights and biases; False where there is no room for a factor of two."""
    codes = _source(layers[0].inputs[1]).inputs[0]
    biases = [bias for layer in layers if (bias := _bias(layer)) is not None]
    factor = _factor(*lazy_values.code_range(codes), _BYTE)
    for bias in biases:
        values = lazy_values.values_of(bias.inputs[0])
        factor = min(factor, _factor(int(values.min()), int(values.max()), lazy_values.dtype_of(bias.inputs[0])))
    if factor < 2 or not _owns(biases, layers):
        return False
    quantizers = {id(node): node for node in (*(_source(layer.inputs[1]) for layer in layers), *biases)}
    for held in {id(node.inputs[0]): node.inputs[0] for node in quantizers.values()}.values():
        _multiply(held, factor)
    for node in quantizers.values():
        scale = lazy_values.values_of(node.inputs[1]) / np.float32(factor)
        node.inputs[1] = constants.get(f"{node.inputs[0].name}_wide_scale", scale.astype(np.float32))
    return True


def _bias(layer: gs.Node) -> gs.Node | None:
    """The DequantizeLinear of a layer's bias."""
    return qdq.made_by(layer.inputs[2], qdq.DEQUANTIZE) if len(layer.inputs) > 2 else None


def _owns(biases: list[gs.Node], layers: list[gs.Node]) -> bool:
    """Whether nothing else reads the biases' codes."""
    return all(
        reader in layers for bias in biases for other in bias.inputs[0].outputs for reader in other.outputs[0].outputs
    )


def _source(tensor: gs.Tensor) -> gs.Node:
    node = qdq.made_by(tensor, qdq.DEQUANTIZE)
    assert node is not None
    return node


def _factor(lowest: int, highest: int, stored: np.dtype[np.generic]) -> int:
    """The greatest power of two by which both ends still fit the type, up to a byte's width."""
    first, last = lazy_values.type_range(stored)
    factor = 1
    while factor < 1 << 7 and first <= 2 * factor * lowest and 2 * factor * highest <= last:
        factor *= 2
    return factor


def _multiply(codes: gs.Constant, factor: int) -> None:
    held, stored, ends = codes._values, lazy_values.dtype_of(codes), lazy_values.code_range(codes)
    codes.values = LazyArray(
        codes.shape,
        stored,
        lambda: lazy_values.load(held).astype(np.int64) * factor,
        (ends[0] * factor, ends[1] * factor),
    )
