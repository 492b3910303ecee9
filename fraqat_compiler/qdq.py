"""Small edits of ONNX graphs around QuantizeLinear (Q) and DequantizeLinear (DQ) that several passes need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values
from fraqat_compiler.lazy_values import Array

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def made_by(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that computes a tensor, if it is of that op."""
    node = producer(tensor)
    return node if node is not None and node.op == op else None


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor's values are part of the graph."""
    return isinstance(tensor, gs.Constant)


def is_scalar(quantizer: gs.Node) -> bool:
    """Whether a Q or DQ has one scale for the whole tensor."""
    return len(quantizer.inputs[1].shape) == 0


def is_activation(quantizer: gs.Node) -> bool:
    """Whether a Q or DQ has one scale, for a tensor that the graph computes."""
    return is_scalar(quantizer) and not is_constant(quantizer.inputs[0])


def axis_of(quantizer: gs.Node) -> int:
    """The axis attribute of a Q or DQ; 1 where it is left out, as ONNX says."""
    return int(quantizer.attrs.get("axis", 1))


def granularity(quantizer: gs.Node) -> tuple[int | None, int | None]:
    """axis and group_size as `fraqat_compiler.quantizer` takes them; groups lie along the last dimension."""
    block_size = int(quantizer.attrs.get("block_size", 0))
    if block_size:
        return None, block_size
    return (None if is_scalar(quantizer) else axis_of(quantizer)), None


def code_type(quantizer: gs.Node) -> np.dtype[np.generic]:
    """The integer type of the codes of a Q or DQ."""
    typed = quantizer.inputs[2] if len(quantizer.inputs) > 2 else quantizer.inputs[0]
    return lazy_values.dtype_of(typed)


def same_parameters(first: gs.Node, second: gs.Node) -> bool:
    """Whether two Qs or DQs have equal scales, zero points and granularity."""
    if first.attrs != second.attrs or len(first.inputs) != len(second.inputs):
        return False
    return all(_equal(one, other) for one, other in zip(first.inputs[1:], second.inputs[1:], strict=True))


def _equal(first: gs.Tensor, second: gs.Tensor) -> bool:
    if first is second:
        return True
    if not (is_constant(first) and is_constant(second)):
        return False
    if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
        return False
    return bool(np.array_equal(lazy_values.values_of(first), lazy_values.values_of(second)))


class Names:
    """Names that are free in a graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = set(graph.tensors()) | {node.name for node in graph.nodes}

    def free(self, wish: str) -> str:
        """The wished name, with a number after it where it is taken."""
        name, number = wish, 0
        while name in self._taken:
            number += 1
            name = f"{wish}_{number}"
        self._taken.add(name)
        return name


class SharedConstants:
    """Small constants of a graph, one for each value."""

    def __init__(self, graph: gs.Graph, names: Names) -> None:
        self._names = names
        self._known: dict[tuple[str, tuple[int, ...], bytes], gs.Constant] = {}
        for node in graph.nodes:
            if node.op in (QUANTIZE, DEQUANTIZE) and len(node.inputs) > 2 and is_constant(node.inputs[2]):
                self._known.setdefault(_key(lazy_values.values_of(node.inputs[2])), node.inputs[2])

    def get(self, wish: str, values: Array) -> gs.Constant:
        """The constant that holds `values`, newly named `wish` if there is none yet."""
        key = _key(values)
        if key not in self._known:
            self._known[key] = lazy_values.constant(self._names.free(wish), values)
        return self._known[key]

    def zero_point(self, values: Array) -> gs.Constant:
        """The same under the name `zero_point_uint8_128`, or `zero_point_int4_0x384` for one per channel."""
        count = f"x{values.size}" if values.ndim else ""
        return self.get(f"zero_point_{values.dtype}_{int(values.reshape(-1)[0])}{count}", values)


def _key(values: Array) -> tuple[str, tuple[int, ...], bytes]:
    return str(values.dtype), values.shape, values.tobytes()


def replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let a node read `new` wherever it reads `old`."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def replace_everywhere(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all readers of `old` read `new`; as a graph output too."""
    for reader in list(old.outputs):
        replace_input(reader, old, new)
    graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]


def insert_pair(
    graph: gs.Graph, names: Names, tensor: gs.Tensor, like: gs.Node, readers: Sequence[gs.Node]
) -> gs.Variable:
    """Put Q and DQ with the parameters of `like` between `tensor` and the given readers of it.

    Returns:
        The dequantized tensor.
    """
    codes = gs.Variable(names.free(f"{tensor.name}_q"), dtype=code_type(like), shape=tensor.shape)
    dequantized = gs.Variable(names.free(f"{tensor.name}_dq"), dtype=tensor.dtype, shape=tensor.shape)
    for reader in readers:
        replace_input(reader, tensor, dequantized)
    base = _module_prefix(tensor)
    for op, source, result in ((QUANTIZE, tensor, codes), (DEQUANTIZE, codes, dequantized)):
        node = gs.Node(op, names.free(base + op), dict(like.attrs), [source, *like.inputs[1:3]], [result])
        graph.nodes.append(node)
    return dequantized


def _module_prefix(tensor: gs.Tensor) -> str:
    """`blocks.0.attn/`, the module whose node computes a tensor."""
    node = producer(tensor)
    module, slash, _ = (node.name if node is not None else f"{tensor.name}/").rpartition("/")
    return module + slash


def finish(graph: gs.Graph) -> gs.Graph:
    """Drop what leads to no output and order nodes so that each comes after what it reads."""
    graph.cleanup(remove_unused_node_outputs=False)
    return graph.toposort()
