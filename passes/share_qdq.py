"""share-qdq."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult
from fraqat_compiler.qdq import Names

# Every value of the output is a value of the first input.
_MOVES = frozenset(
    "Reshape Transpose Flatten Squeeze Unsqueeze Slice Split Gather GatherElements GatherND Expand Tile Identity "
    "DepthToSpace SpaceToDepth MaxPool".split()
)
_BOUNDS = frozenset({"Relu", "Clip"})
# Each element of the output depends on the element at the same place alone.
_ELEMENTWISE = _BOUNDS | frozenset(
    "Gelu Sigmoid Tanh LeakyRelu Elu Selu Celu HardSigmoid HardSwish Mish Softplus Softsign Erf Exp Log Sqrt "
    "Reciprocal Abs Neg Sin Cos".split()
)


@dataclass(frozen=True)
class ShareQdq(OnnxPass):
    """Give every op that moves or bounds values a quantizer on both sides, with one scale and zero point.

    Hardware that reads QDQ wants each op as DequantizeLinear (DQ) -> op -> QuantizeLinear (Q). Before:
    `DQ -> Transpose -> Softmax` and `Conv -> Relu -> Q`. After: `DQ -> Transpose -> Q -> DQ -> Softmax` and
    `Conv -> Q -> DQ -> Relu -> Q`, the new pairs with the parameters of the old. An elementwise op changes places with
    the Reshape before it, and two Reshapes that then follow each other become one, so that between the Gemms of a
    feed-forward net none is left. Does nothing where both sides are quantized already, and to quantizers of weights.

    No result changes. Let q be rounding to a grid and back: q(q(x)) = q(x), so a second q after an op that only moves
    values does nothing. And q is monotonic, so for an op f that clamps to [a, b], q(f(q(x))) = q(f(x)): where x <= a,
    q(x) <= q(a), so f(q(x)) lies between a and q(a) or is a, which q takes to q(a); likewise at b; between them both
    sides are q(x), or q of the bound that q(x) crossed, which is the same code.
    """

    name: ClassVar[str] = "share-qdq"

    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult:
        model.toposort()
        names = Names(model)
        changes = [f"moved {name} behind an elementwise op" for name in _sink_reshapes(model, names)]
        changes += [f"quantized before {name}" for name in _quantize_sources(model, names)]
        changes += [f"merged {name}" for name in _merge_reshapes(model)]
        changes += [f"quantized after {name}" for name in _quantize_results(model, names)]
        if changes:
            qdq.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


# Q after an op: the same Q before it


def _quantize_sources(graph: gs.Graph, names: Names) -> list[str]:
    done = []
    for node in list(graph.nodes)[::-1]:
        if node.op != qdq.QUANTIZE or not qdq.is_scalar(node):
            continue
        while (op := _op_to_precede(graph, node)) is not None:
            qdq.insert_pair(graph, names, op.inputs[0], node, [op])
            done.append(op.name)
            node = qdq.producer(qdq.producer(op.inputs[0]).inputs[0])  # type: ignore[union-attr]
    return done


def _op_to_precede(graph: gs.Graph, quantizer: gs.Node) -> gs.Node | None:
    """The op before Q, where only this Q reads it and its own input is computed in float for it alone."""
    result = quantizer.inputs[0]
    op = qdq.producer(result)
    if op is None or not (op.op in _BOUNDS or _moves(op)) or op.op == "Concat" or len(op.outputs) > 1:
        return None
    source = op.inputs[0]
    alone = len(result.outputs) == 1 and len(source.outputs) == 1
    if not alone or any(tensor in graph.outputs for tensor in (result, source)):
        return None
    if qdq.is_constant(source) or qdq.made_by(source, qdq.DEQUANTIZE) is not None:
        return None
    return op


# DQ before an op: the same pair after it


def _quantize_results(graph: gs.Graph, names: Names) -> list[str]:
    done = []
    for node in list(graph.nodes):
        shared = _shared_quantizer(node)
        results = node.outputs[:1] if node.op == "MaxPool" else node.outputs
        for result in [] if shared is None else results:
            if _quantize_readers(graph, names, result, shared):
                done.append(node.name)
    return done


def _shared_quantizer(node: gs.Node) -> gs.Node | None:
    """The DQ of the op's input, or of all inputs of a Concat when they are equal."""
    if node.op != "Relu" and not _moves(node):
        return None
    sources = node.inputs if node.op == "Concat" else node.inputs[:1]
    quantizers = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in sources]
    first = quantizers[0]
    if first is None or not qdq.is_activation(first):
        return None
    equal = all(other is not None and qdq.same_parameters(first, other) for other in quantizers)
    return first if equal and _keeps_grid(node, first) else None


def _quantize_readers(graph: gs.Graph, names: Names, result: gs.Tensor, like: gs.Node) -> bool:
    readers = [reader for reader in result.outputs if reader.op != qdq.QUANTIZE]
    is_output = any(tensor is result for tensor in graph.outputs)
    if not readers and not is_output:
        return False
    dequantized = qdq.insert_pair(graph, names, result, like, readers)
    if is_output:
        graph.outputs = [dequantized if tensor is result else tensor for tensor in graph.outputs]
        result.name, dequantized.name = names.free(f"{result.name}_float"), result.name
    return True


def _moves(node: gs.Node) -> bool:
    if node.op == "Resize":
        return bool(node.attrs.get("mode", "nearest") == "nearest")
    return node.op in _MOVES or node.op in ("Concat", "Pad")


def _keeps_grid(node: gs.Node, quantizer: gs.Node) -> bool:
    """Whether what a Pad adds is a value of the grid; the other ops add none."""
    if node.op != "Pad" or node.attrs.get("mode", "constant") != "constant":
        return True
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True  # it pads by 0, which every grid holds
    value = node.inputs[2]
    return qdq.is_constant(value) and _is_on_grid(float(lazy_values.values_of(value)), quantizer)


def _is_on_grid(value: float, quantizer: gs.Node) -> bool:
    scale, zero_point = (lazy_values.values_of(tensor) for tensor in quantizer.inputs[1:3])
    lowest, highest = lazy_values.type_range(zero_point.dtype)
    code = np.clip(np.round(np.float32(value) / scale) + np.float32(zero_point), lowest, highest)
    return bool((code - np.float32(zero_point)) * scale == np.float32(value))


# Reshapes


def _sink_reshapes(graph: gs.Graph, names: Names) -> list[str]:
    """`Reshape -> (Q -> DQ ->) elementwise` becomes `(Q -> DQ ->) elementwise -> Reshape`, as far down as it goes."""
    sunk = []
    for node in graph.nodes:
        chain = _chain_from_reshape(graph, node) if node.op in _ELEMENTWISE else []
        if chain:
            _sink(chain, names)
            sunk.append(chain[0].name)
    graph.toposort()
    return sunk


def _chain_from_reshape(graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """[Reshape, Q, DQ, node] or [Reshape, node], each read by the next alone; empty when there is none."""
    chain = [node]
    for op in (qdq.DEQUANTIZE, qdq.QUANTIZE):
        before = qdq.made_by(chain[0].inputs[0], op)
        if before is not None:
            chain.insert(0, before)
    reshape = qdq.made_by(chain[0].inputs[0], "Reshape")
    if reshape is None or len(chain) == 2:
        return []
    chain.insert(0, reshape)
    links = [link.outputs[0] for link in chain[:-1]]
    alone = all(len(link.outputs) == 1 and not any(link is tensor for tensor in graph.outputs) for link in links)
    return chain if alone else []


def _sink(chain: list[gs.Node], names: Names) -> None:
    """Let the Reshape at the head of a chain follow its last node."""
    reshape, first, last = chain[0], chain[1], chain[-1]
    source, result = reshape.inputs[0], last.outputs[0]
    for link in chain[1:-1]:
        link.outputs[0].shape = source.shape
    first.inputs[0] = source
    between = gs.Variable(names.free(f"{result.name}_flat"), dtype=result.dtype, shape=source.shape)
    last.outputs[0] = between
    reshape.inputs[0], reshape.outputs[0] = between, result


# Reshapes that follow each other


def _merge_reshapes(graph: gs.Graph) -> list[str]:
    merged = []
    for node in graph.nodes:
        if node.op != "Reshape":
            continue
        before, source = node.inputs[0], _unreshaped(node.inputs[0])
        if source is not before:
            node.inputs[0] = source
            _keep_names(graph, before, source)
            merged.append(node.name)
        if _is_no_op(node) and not any(tensor is node.outputs[0] for tensor in graph.outputs):
            qdq.replace_everywhere(graph, node.outputs[0], node.inputs[0])
    return merged


def _unreshaped(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before a Reshape that made this one, past a pair that only repeats the quantizer before it."""
    quantizer = qdq.made_by(tensor, qdq.DEQUANTIZE)
    inner = qdq.made_by(quantizer.inputs[0], qdq.QUANTIZE) if quantizer else None
    reshape = qdq.made_by(inner.inputs[0] if inner else tensor, "Reshape")
    if reshape is None:
        return tensor
    outer = qdq.made_by(reshape.inputs[0], qdq.DEQUANTIZE)
    if quantizer is not None and (outer is None or not qdq.same_parameters(outer, quantizer)):
        return tensor
    return reshape.inputs[0]


def _keep_names(graph: gs.Graph, bypassed: gs.Tensor, source: gs.Tensor) -> None:
    """Where nothing reads a pair any more, the pair before it, which holds the same values, takes over its names."""
    unread, kept = qdq.made_by(bypassed, qdq.DEQUANTIZE), qdq.made_by(source, qdq.DEQUANTIZE)
    if unread is None or kept is None or bypassed.outputs or len(unread.inputs[0].outputs) > 1:
        return
    if any(tensor is bypassed or tensor is source for tensor in graph.outputs):
        return
    for one, other in ((bypassed, source), (unread.inputs[0], kept.inputs[0])):
        one.name, other.name = other.name, one.name


def _is_no_op(node: gs.Node) -> bool:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return before is not None and after is not None and list(before) == list(after)
