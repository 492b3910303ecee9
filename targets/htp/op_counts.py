"""What a graph has to do: multiply-accumulates, activations and weights of each op, counted from its shapes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onnx import ModelProto, NodeProto, TensorProto, helper, shape_inference

from fraqat_compiler.errors import TargetError

Kind = Literal["conv", "matmul", "depthwise", "softmax", "norm", "elementwise", "transpose", "rows", "copy"]

FLOAT_BITS = 16  # the HTP computes a float graph in half precision
TILE = 32  # channels that the matrix unit takes at once
_BITS: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT16: 16,
    TensorProto.UINT16: 16,
}
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_VIEWS = frozenset(
    "Reshape Flatten Squeeze Unsqueeze Identity Dropout Cast CastLike SequenceConstruct SequenceAt".split()
)
_PRODUCTS = frozenset("Conv ConvTranspose Gemm MatMul".split())
_GATHERS = frozenset("Gather GatherElements GatherND".split())
_LIMITS = frozenset("Relu Clip".split())  # done by the op before while it rounds its output
_TO_IMAGE_LAYOUT = ([0, 2, 3, 1], [0, 3, 1, 2])
_KINDS: dict[str, Kind] = {
    "Softmax": "softmax",
    "Transpose": "transpose",
    **dict.fromkeys(
        "LayerNormalization GroupNormalization InstanceNormalization RMSNormalization BatchNormalization "
        "LpNormalization".split(),
        "norm",
    ),
    **dict.fromkeys(
        "Concat Split Slice Pad Gather GatherElements GatherND Expand Tile Resize DepthToSpace SpaceToDepth".split(),
        "copy",
    ),
}


@dataclass(frozen=True)
class OpCount:
    """The work of one op.

    Attributes:
        name: of the node.
        op: ONNX op type.
        kind: which unit of the HTP does it, and how: `conv` (also a matrix product with constant weights) and `matmul`
            (of two activations) on the matrix unit, the others on the vector unit; `rows` is a transpose that keeps
            the last axis, as that of heads of attention; a gather by computed indices is a `transpose` of its table.
        macs: multiply-accumulates.
        tiled_macs: the same with channels rounded up to whole tiles of the matrix unit.
        read: elements of activations read.
        written: elements of activations written.
        weights: elements of weights.
        matrices: how many independent matrices a softmax or a product of activations works on, as heads of attention; 1
            for the others.
        activation_bits: width of the activations; 16 in float.
        weight_bits: width of the weights; 16 in float.
        quantized: the activations are integers.
    """

    name: str
    op: str
    kind: Kind
    macs: int
    tiled_macs: int
    read: int
    written: int
    weights: int
    matrices: int = 1
    activation_bits: int = FLOAT_BITS
    weight_bits: int = FLOAT_BITS
    quantized: bool = False

    @property
    def weight_bytes(self) -> float:
        return self.weights * self.weight_bits / 8

    @property
    def read_bytes(self) -> float:
        return self.read * self.activation_bits / 8

    @property
    def written_bytes(self) -> float:
        return self.written * self.activation_bits / 8


def count_ops(model: ModelProto) -> tuple[OpCount, ...]:
    """The ops that cost time, in the order of the graph.

    Quantizers belong to their neighbours; views, constants, and what the compiler fuses into the op before are left
    out.

    Args:
        model: weights that lie in other files are not needed.

    Raises:
        TargetError: a shape is not static.
    """
    return tuple(_Graph(shape_inference.infer_shapes(model, data_prop=True)).counts())


class _Graph:
    """A model with lookups by name, which see through quantizers."""

    def __init__(self, model: ModelProto) -> None:
        self._nodes = model.graph.node
        self._known: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, int] = {}
        self._constants: set[str] = set()
        self._producer = {name: node for node in self._nodes for name in node.output}
        self._readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        self._read_values(model)
        self._read_nodes()

    def _read_values(self, model: ModelProto) -> None:
        graph = model.graph
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            dims = tuple(dim.dim_value for dim in kind.shape.dim)
            if kind.HasField("shape") and all(dims):
                self._known[value.name] = dims
            self._types[value.name] = kind.elem_type
        for tensor in graph.initializer:
            self._known[tensor.name] = tuple(tensor.dims)
            self._types[tensor.name] = tensor.data_type
            self._constants.add(tensor.name)

    def _read_nodes(self) -> None:
        for node in self._nodes:
            for name in filter(None, node.input):
                self._readers[name].append(node)
            if self._constants.issuperset(filter(None, node.input)) or node.op_type == "Shape":
                self._constants.update(node.output)

    def counts(self) -> Iterator[OpCount]:
        for node in self._nodes:
            if node.op_type not in _QDQ and node.output[0] not in self._constants and not self._is_free(node):
                yield self._count(node)

    def _is_free(self, node: NodeProto) -> bool:
        if node.op_type == "BatchNormalization" or (node.op_type == "Add" and self._adds_vector(node)):
            return any(self._source(name) in _PRODUCTS for name in node.input)
        return node.op_type in _VIEWS | _LIMITS or (node.op_type == "Transpose" and self._is_layout(node))

    def _adds_vector(self, node: NodeProto) -> bool:
        shapes = [self._known.get(name, ()) for name in node.input if name in self._constants]
        return any(len(shape) > 0 and math.prod(shape) == shape[-1] for shape in shapes)

    def _source(self, name: str) -> str:
        """Type of the op that makes a tensor, seen through quantizers."""
        node = self._producer.get(name)
        while node is not None and node.op_type in _QDQ:
            node = self._producer.get(node.input[0])
        return node.op_type if node is not None else ""

    def _is_layout(self, node: NodeProto) -> bool:
        """A transpose that moves no data, or one between channels first and last.

        The hardware keeps channels last, so that the library cancels the latter.
        """
        shape = self._shape(node.input[0])
        order = _order(node, len(shape))
        moved = [axis for axis in order if shape[axis] != 1]
        return moved == sorted(moved) or order in _TO_IMAGE_LAYOUT

    def _keeps_rows(self, node: NodeProto) -> bool:
        rank = len(self._shape(node.input[0]))
        return _order(node, rank)[-1] == rank - 1

    def _count(self, node: NodeProto) -> OpCount:
        activations = [name for name in node.input if name and name not in self._constants]
        weight = self._weight(node)
        macs, tiled = self._macs(node)
        activation_bits, quantized = self._activation_bits(node)
        return OpCount(
            name=node.name,
            op=node.op_type,
            kind=self._kind(node),
            macs=macs,
            tiled_macs=tiled,
            read=sum(map(self._elements, activations)),
            written=self._written(node),
            weights=self._elements(weight) if weight else 0,
            matrices=math.prod(self._shape(node.output[0])[:-2]) if self._kind(node) in ("matmul", "softmax") else 1,
            activation_bits=activation_bits,
            weight_bits=self._bits(weight) if weight else FLOAT_BITS,
            quantized=quantized,
        )

    def _written(self, node: NodeProto) -> int:
        made = [node.input[0]] if self._relays_table(node) else filter(None, node.output)
        return sum(map(self._elements, made))

    def _relays_table(self, node: NodeProto) -> bool:
        """A gather by computed indices, for which a table of activations, kept in tiles, is first laid out in rows."""
        return node.op_type in _GATHERS and self._constants.isdisjoint(node.input[:2])

    def _kind(self, node: NodeProto) -> Kind:
        if self._relays_table(node):
            return "transpose"
        if node.op_type == "Transpose" and self._keeps_rows(node):
            return "rows"
        if node.op_type not in _PRODUCTS:
            return _KINDS.get(node.op_type, "elementwise")
        if node.op_type.startswith("Conv"):
            return "depthwise" if _groups(node) > 1 and 1 in self._channels(node) else "conv"
        return "conv" if self._weight(node) else "matmul"

    def _weight(self, node: NodeProto) -> str:
        """Name of the constant operand of a matrix product; empty where there is none."""
        if node.op_type not in _PRODUCTS:
            return ""
        return next((name for name in (node.input[1], node.input[0]) if name in self._constants), "")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._known:
            raise TargetError(f"the shape of {name!r} is not known.", "Export with fixed example inputs.")
        return self._known[name]

    def _elements(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _activation_bits(self, node: NodeProto) -> tuple[int, bool]:
        """Width of the widest quantized activation around the op, and whether there is one."""
        sides = [name for name in (*node.input, *node.output) if name not in self._constants]
        widths = [width for width in map(self._quantized_bits, sides) if width]
        return (max(widths), True) if widths else (FLOAT_BITS, False)

    def _quantized_bits(self, name: str) -> int:
        maker = self._producer.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            return self._stored_bits(maker.input[0])
        reader = next((node for node in self._readers[name] if node.op_type == "QuantizeLinear"), None)
        return self._stored_bits(reader.output[0]) if reader is not None else 0

    def _stored_bits(self, name: str) -> int:
        return _BITS.get(self._types.get(name, 0), 0)

    def _bits(self, weight: str) -> int:
        """Width that a weight is stored with, behind whatever reshapes it."""
        node = self._producer.get(weight)
        while node is not None and node.input and not self._stored_bits(weight):
            weight = node.input[0]
            node = self._producer.get(weight)
        return self._stored_bits(weight) or FLOAT_BITS

    def _macs(self, node: NodeProto) -> tuple[int, int]:
        """Multiply-accumulates, and what they become in whole tiles."""
        if node.op_type not in _PRODUCTS:
            return 0, 0
        if node.op_type.startswith("Conv"):
            return self._conv_macs(node)
        columns = self._shape(node.output[0])[-1]
        rows, depth = self._elements(node.output[0]) // columns, self._depth(node)
        return rows * depth * columns, rows * _tiled(depth) * _tiled(columns)

    def _depth(self, node: NodeProto) -> int:
        transposed = node.op_type == "Gemm" and _attribute(node, "transA", 0)
        return self._shape(node.input[0])[0 if transposed else -1]

    def _conv_macs(self, node: NodeProto) -> tuple[int, int]:
        """Groups narrower than a tile share one, so that the zeros between them are multiplied too."""
        deep, wide = self._channels(node)
        kernel = math.prod(self._shape(node.input[1])[2:])
        image = self._shape(node.input[0] if node.op_type == "ConvTranspose" else node.output[0])
        positions, groups = image[0] * math.prod(image[2:]), _groups(node)
        tiled = (
            _tiled(deep) * _tiled(groups * wide) if groups == 1 or deep < TILE else groups * _tiled(deep) * _tiled(wide)
        )
        return positions * kernel * groups * deep * wide, positions * kernel * tiled

    def _channels(self, node: NodeProto) -> tuple[int, int]:
        """Input and output channels of one group."""
        first, second = self._shape(node.input[1])[:2]
        if node.op_type == "ConvTranspose":
            return first // _groups(node), second
        return second, first // _groups(node)


def _groups(node: NodeProto) -> int:
    return _attribute(node, "group", 1)


def _order(node: NodeProto, rank: int) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), list(reversed(range(rank))))


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(helper.get_attribute_value(a)) for a in node.attribute if a.name == name), default)


def _tiled(channels: int) -> int:
    return -(-channels // TILE) * TILE
