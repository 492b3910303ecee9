"""One op between quantizers, for each op, variant, rank, width and granularity that `probe_htp_ops.py` asks about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Kind = Literal["activation", "weight", "norm_weight", "bias", "constant", "indices"]
Array = NDArray[Any]
Feeds = dict[str, Array]

OPSET, IR_VERSION = 23, 11
BLOCK = 64  # elements of the second last dimension of a weight with one scale
ROWS, COLUMNS = 16, 64
RANKS = (2, 3, 4, 5, 6)
CODE_TYPES = {4: TensorProto.INT4, 8: TensorProto.INT8}
UNSIGNED = {8: TensorProto.UINT8, 16: TensorProto.UINT16}
ACTIVATION_BITS = (8, 16)
WEIGHT_BITS = (4, 8)


@dataclass(frozen=True)
class Operand:
    """One input of the op.

    Attributes:
        kind: what it is; a bias has the scale of input times weight.
        shape: its shape.
        low, high: range of its values; indices are whole numbers in it, `high` left out.
        axis: output channels of a weight.
        value: of a constant.
    """

    kind: Kind
    shape: tuple[int, ...] = ()
    low: float = -4.0
    high: float = 4.0
    axis: int = 0
    value: Array | None = None


@dataclass(frozen=True)
class Case:
    """An op at one rank, before widths are chosen.

    Attributes:
        op: ONNX type.
        rank: of its first input.
        operands: its inputs.
        variant: what sets it apart from the plain op; empty for that.
        attributes: of the node.
        outputs: their number; the first is compared.
        moves_values: its result has the grid of its input.
    """

    op: str
    rank: int
    operands: tuple[Operand, ...]
    variant: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    moves_values: bool = False


@dataclass(frozen=True)
class Probe:
    """A case with its widths."""

    case: Case
    weight_bits: int | None
    activation_bits: int
    granularity: str

    @property
    def key(self) -> tuple[str, str, int, int | None, int, str]:
        """What sets its row apart in the table."""
        return self.case.op, self.case.variant, self.case.rank, self.weight_bits, self.activation_bits, self.granularity


@dataclass(frozen=True)
class Grid:
    """The parameters of an activation quantizer."""

    scale: np.float32
    zero_point: int

    @staticmethod
    def of(low: float, high: float, bits: int) -> Grid:
        """Asymmetric and unsigned, over a range that is widened to hold 0."""
        low, high, levels = min(low, 0.0), max(high, 0.0), 2**bits - 1
        scale = np.float32(max(high - low, 1e-6) / levels)
        return Grid(scale, int(np.clip(round(-low / float(scale)), 0, levels)))


class GraphBuilder:
    """Writes the model of one probe."""

    def __init__(self, probe: Probe, seed: int = 0) -> None:
        self._probe = probe
        self._random = np.random.default_rng(seed)
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._inputs: list[Any] = []
        self._names: list[str] = []
        self._grid: Grid | None = None
        self._weight_scale: Array | None = None
        self.feeds: Feeds = {}
        for operand in probe.case.operands:
            self._names.append(getattr(self, f"_{operand.kind}")(f"in{len(self._names)}", operand))

    def model(self, output_range: tuple[float, float] | None) -> tuple[ModelProto, np.float32 | None]:
        """The model and the step of its output; without a range the output stays in float."""
        case, nodes, constants = self._probe.case, list(self._nodes), list(self._constants)
        outputs = [f"y{index}" for index in range(case.outputs)]
        nodes.append(helper.make_node(case.op, self._names, outputs, name="probed", **case.attributes))
        grid = None
        if output_range is not None:
            grid = self._grid if case.moves_values else Grid.of(*output_range, self._probe.activation_bits)
            assert grid is not None
            for index, name in enumerate(outputs):
                made, parameters = _pair(name, grid, self._probe.activation_bits)
                nodes += made
                constants += parameters
                outputs[index] = f"{name}_dq"
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(nodes, "probe", self._inputs, values, initializer=constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), grid.scale if grid else None

    def _activation(self, name: str, operand: Operand) -> str:
        grid = Grid.of(operand.low, operand.high, self._probe.activation_bits)
        self._grid = self._grid or grid
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, operand.shape))
        self.feeds[name] = self._random.uniform(operand.low, operand.high, operand.shape).astype(np.float32)
        nodes, constants = _pair(name, grid, self._probe.activation_bits)
        self._nodes += nodes
        self._constants += constants
        return f"{name}_dq"

    def _weight(self, name: str, operand: Operand) -> str:
        bits = self._probe.weight_bits or 8
        codes = self._random.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), operand.shape)
        shape, attributes = self._scale_shape(operand)
        scale = self._random.uniform(0.5, 1.5, shape).astype(np.float32) * np.float32(0.1 / 2 ** (bits - 1))
        self._weight_scale = scale
        return self._dequantized(name, CODE_TYPES[bits], codes, scale, np.zeros(shape, int), attributes)

    def _scale_shape(self, operand: Operand) -> tuple[tuple[int, ...], dict[str, Any]]:
        if self._probe.granularity == "per_channel":
            return (operand.shape[operand.axis],), {"axis": operand.axis}
        if self._probe.granularity == "per_block":
            axis = len(operand.shape) - 2
            shape = tuple(size // BLOCK if place == axis else size for place, size in enumerate(operand.shape))
            return shape, {"axis": axis, "block_size": BLOCK}
        return (), {}

    def _norm_weight(self, name: str, operand: Operand) -> str:
        codes = self._random.integers(0, 256, operand.shape)
        self._weight_scale = np.array(1.5 / 255, np.float32)
        return self._dequantized(name, TensorProto.UINT8, codes, self._weight_scale, np.array(20), {})

    def _bias(self, name: str, operand: Operand) -> str:
        assert self._grid is not None and self._weight_scale is not None
        scale = self._grid.scale * self._weight_scale
        values = self._random.uniform(-1, 1, operand.shape)
        codes = np.round(values / scale).astype(np.int64)
        attributes = {"axis": 0} if scale.ndim else {}
        return self._dequantized(name, TensorProto.INT32, codes, scale, None, attributes)

    def _constant(self, name: str, operand: Operand) -> str:
        assert operand.value is not None
        self._constants.append(numpy_helper.from_array(operand.value, name))
        return name

    def _indices(self, name: str, operand: Operand) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, operand.shape))
        self.feeds[name] = self._random.integers(int(operand.low), int(operand.high), operand.shape)
        return name

    def _dequantized(
        self,
        name: str,
        code_type: int,
        codes: Array,
        scale: Array,
        zero_point: Array | None,
        attributes: Mapping[str, Any],
    ) -> str:
        names = [f"{name}_codes", f"{name}_scale"]
        self._constants += [_tensor(names[0], code_type, codes), numpy_helper.from_array(np.asarray(scale), names[1])]
        if zero_point is not None:
            names.append(f"{name}_zero")
            self._constants.append(_tensor(names[2], code_type, zero_point))
        self._nodes.append(helper.make_node("DequantizeLinear", names, [f"{name}_dq"], **attributes))
        return f"{name}_dq"


def _tensor(name: str, code_type: int, codes: Array) -> TensorProto:
    return helper.make_tensor(name, code_type, codes.shape, codes.ravel().tolist())


def _pair(name: str, grid: Grid, bits: int) -> tuple[list[NodeProto], list[TensorProto]]:
    scale, zero = f"{name}_scale", f"{name}_zero"
    nodes = [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"]),
    ]
    zero_point = _tensor(zero, UNSIGNED[bits], np.array(grid.zero_point))
    return nodes, [numpy_helper.from_array(np.asarray(grid.scale), scale), zero_point]


# Which cases there are


def probes() -> Iterator[Probe]:
    """Every probe, in the order of the table."""
    for case in cases():
        for bits in ACTIVATION_BITS:
            yield from _with_weights(case, bits)


def _with_weights(case: Case, bits: int) -> Iterator[Probe]:
    weights = [operand for operand in case.operands if operand.kind in ("weight", "norm_weight")]
    if not weights:
        yield Probe(case, None, bits, "")
        return
    if weights[0].kind == "norm_weight":
        yield Probe(case, 8, bits, "per_tensor")
        return
    blocks = case.op in ("MatMul", "Gemm")
    for weight_bits in WEIGHT_BITS:
        for granularity in ("per_tensor", "per_channel", *(("per_block",) if blocks else ())):
            biased = any(operand.kind == "bias" for operand in case.operands)
            if granularity == "per_block" and biased:  # an int32 bias has no scale there
                continue
            yield Probe(case, weight_bits, bits, granularity)


def cases() -> Iterator[Case]:
    """Every case."""
    yield from _unary()
    yield from _binary()
    yield from _along_an_axis()
    yield from _shape_ops()
    yield from _products()
    yield from _convolutions()
    yield from _images()
    yield from _norms()


def shape_of(rank: int) -> tuple[int, ...]:
    """A few rows of 64, behind dimensions of 1 and 2."""
    return (*(1, 2, 2, 2)[: rank - 2], ROWS, COLUMNS)


def _constant(*values: float, dtype: type = np.int64) -> Operand:
    return Operand("constant", value=np.array(values, dtype))


_POSITIVE = (0.05, 4.0)
_UNARY: tuple[tuple[str, tuple[float, float]], ...] = (
    *((name, (-4.0, 4.0)) for name in "Sigmoid Tanh Gelu Relu LeakyRelu Elu Selu Celu HardSwish HardSigmoid".split()),
    *((name, (-4.0, 4.0)) for name in "Softplus Softsign Mish ThresholdedRelu Erf Neg Abs Sin Cos Sign".split()),
    *((name, (-4.1, 4.0)) for name in "Floor Ceil Round".split()),
    *((name, _POSITIVE) for name in "Sqrt Log Reciprocal".split()),
    ("Exp", (-4.0, 1.0)),
)


def _unary() -> Iterator[Case]:
    for rank in RANKS:
        for op, (low, high) in _UNARY:
            yield Case(op, rank, (Operand("activation", shape_of(rank), low, high),))
        value, base = Operand("activation", shape_of(rank)), Operand("activation", shape_of(rank), *_POSITIVE)
        yield Case("Gelu", rank, (value,), "tanh", {"approximate": "tanh"})
        yield Case("Clip", rank, (value, *(Operand("constant", value=np.array(bound, np.float32)) for bound in (0, 3))))
        for exponent in (2.0, 3.0, 0.5, -0.5):
            operand = Operand("constant", value=np.array(exponent, np.float32))
            yield Case("Pow", rank, (base, operand), f"exponent {exponent:g}")


def _binary() -> Iterator[Case]:
    for rank in RANKS:
        left, right = Operand("activation", shape_of(rank)), Operand("activation", shape_of(rank), -3.0, 5.0)
        for op in ("Add", "Sub", "Mul", "Min", "Max"):
            yield Case(op, rank, (left, right))
            yield Case(op, rank, (left, Operand("activation", (1,) * (rank - 1) + (COLUMNS,))), "broadcast")
        yield Case("Div", rank, (left, Operand("activation", shape_of(rank), 0.5, 4.0)))
        yield Case("PRelu", rank, (left, Operand("norm_weight", (COLUMNS,))))
        mask = Operand("constant", value=np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 3 == 0)
        yield Case("Where", rank, (mask, left, right), "constant condition")


def _along_an_axis() -> Iterator[Case]:
    for rank in RANKS:
        value = Operand("activation", shape_of(rank))
        for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"):
            yield Case(op, rank, (value, _constant(rank - 1)))
        yield Case("ReduceMean", rank, (value, _constant(rank - 2)), "second last")
        for op in ("Softmax", "LogSoftmax"):
            yield Case(op, rank, (value,))
        # values that let one probability come near 1
        yield Case("Softmax", rank, (Operand("activation", shape_of(rank), -30.0, 30.0),), "peaked")
        yield Case("CumSum", rank, (value, Operand("constant", value=np.array(rank - 1))))
        yield Case("CumSum", rank, (value, Operand("constant", value=np.array(rank - 2))), "second last")
        yield Case("LpNormalization", rank, (value,), attributes={"axis": -1, "p": 2})


def _shape_ops() -> Iterator[Case]:
    for rank in RANKS:
        shape = shape_of(rank)
        value = Operand("activation", shape)
        turned = {"perm": [*range(rank - 2), rank - 1, rank - 2]}
        ends = [*[0] * (rank * 2 - 1), 1]
        rows = [
            Case("Transpose", rank, (value,), attributes=turned),
            Case("Transpose", rank, (value,), "all reversed", {"perm": [*reversed(range(rank))]}),
            Case("Reshape", rank, (value, _constant(*shape[:-2], COLUMNS, ROWS))),
            Case("Flatten", rank, (value,)),
            Case("Identity", rank, (value,)),
            Case("Unsqueeze", rank, (value, _constant(0))),
            Case("Squeeze", rank, (Operand("activation", (1, *shape[1:])), _constant(0))),
            Case("Slice", rank, (value, _constant(4), _constant(20), _constant(rank - 1))),
            Case("Slice", rank, (value, _constant(0), _constant(60), _constant(rank - 1), _constant(2)), "step 2"),
            Case("Split", rank, (value,), attributes={"axis": -1, "num_outputs": 2}, outputs=2),
            Case("Concat", rank, (value, value), attributes={"axis": -1}),
            Case("Expand", rank, (Operand("activation", (*shape[:-2], 1, COLUMNS)), _constant(*shape))),
            Case("Tile", rank, (value, _constant(*[1] * (rank - 1), 2))),
            Case("Gather", rank, (value, _constant(3, 1, 2)), attributes={"axis": rank - 1}),
            Case("GatherElements", rank, (value, Operand("constant", value=np.zeros(shape, np.int64)))),
            Case("Trilu", rank, (value,)),
            Case("Pad", rank, (value, _constant(*ends))),
            Case("Pad", rank, (value, _constant(*ends)), "reflect", {"mode": "reflect"}),
            Case("Pad", rank, (value, _constant(*ends)), "edge", {"mode": "edge"}),
        ]
        for case in rows:
            yield Case(case.op, rank, case.operands, case.variant, case.attributes, case.outputs, moves_values=True)


def _products() -> Iterator[Case]:
    weight = Operand("weight", (COLUMNS * 2, 32), axis=1)
    for rank in RANKS:
        shape = (*shape_of(rank)[:-1], COLUMNS * 2)
        right = Operand("activation", (*shape[:-2], COLUMNS * 2, 32))
        yield Case("MatMul", rank, (Operand("activation", shape), weight))
        yield Case("MatMul", rank, (Operand("activation", shape), right), "two activations")
    value, bias = Operand("activation", (ROWS, COLUMNS * 2)), Operand("bias", (32,))
    turned = Operand("weight", (32, COLUMNS * 2), axis=0)
    yield Case("Gemm", 2, (value, turned, bias), attributes={"transB": 1})
    yield Case("Gemm", 2, (value, weight), "no bias")
    rows = Operand("activation", (2, ROWS, COLUMNS))
    yield Case("Einsum", 3, (rows, rows), "bij,bkj->bik", {"equation": "bij,bkj->bik"})


def _convolutions() -> Iterator[Case]:
    for rank in (3, 4, 5):
        sides = (8,) * (rank - 2)
        value, bias = Operand("activation", (1, 16, *sides)), Operand("bias", (16,))
        for groups, variant in ((1, ""), (16, "depthwise"), (4, "grouped")):
            weight = Operand("weight", (16, 16 // groups, *[3] * (rank - 2)))
            attributes = {"group": groups, "pads": [1] * 2 * (rank - 2)}
            yield Case("Conv", rank, (value, weight, bias), variant, attributes)
            across = Operand("weight", (16, 16 // groups, *[4] * (rank - 2)), axis=1)
            attributes = {"group": groups, "pads": [1] * 2 * (rank - 2), "strides": [2] * (rank - 2)}
            if groups == 1:  # with groups the scales of one axis cannot be those of the output channels
                yield Case("ConvTranspose", rank, (value, across, bias), variant, attributes)
            else:
                yield Case("ConvTranspose", rank, (value, across), variant, attributes)


def _images() -> Iterator[Case]:
    for rank in (3, 4, 5):
        value = Operand("activation", (1, 8, *[8] * (rank - 2)))
        window = {"kernel_shape": [2] * (rank - 2), "strides": [2] * (rank - 2)}
        yield Case("AveragePool", rank, (value,), attributes=window)
        yield Case("MaxPool", rank, (value,), attributes=window, moves_values=True)
        yield Case("GlobalAveragePool", rank, (value,))
        yield Case("GlobalMaxPool", rank, (value,), moves_values=True)
    value = Operand("activation", (1, 8, 8, 8))
    yield Case("DepthToSpace", 4, (value,), attributes={"blocksize": 2}, moves_values=True)
    yield Case("SpaceToDepth", 4, (value,), attributes={"blocksize": 2}, moves_values=True)
    for attributes in _resizes():
        variant = " ".join(str(word) for word in attributes.values())
        operands = (value, *(Operand("constant", value=np.array(item, np.float32)) for item in ([], [1, 1, 2, 2])))
        yield Case("Resize", 4, operands, variant, attributes)
    table = Operand("weight", (64, 32))
    yield Case("Gather", 2, (table, Operand("indices", (8,), 0, 64)), "constant table")


def _resizes() -> Iterator[dict[str, str]]:
    for coordinates in ("half_pixel", "asymmetric"):
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
            yield {
                "mode": "nearest",
                "coordinate_transformation_mode": coordinates,
                "nearest_mode": rounding,
            }
    for mode in ("linear", "cubic"):
        for coordinates in ("half_pixel", "align_corners", "asymmetric"):
            yield {"mode": mode, "coordinate_transformation_mode": coordinates}


def _norms() -> Iterator[Case]:
    gamma, bias = Operand("norm_weight", (COLUMNS,)), Operand("bias", (COLUMNS,))
    for rank in RANKS:
        value = Operand("activation", shape_of(rank))
        yield Case("LayerNormalization", rank, (value, gamma, bias), attributes={"axis": -1})
        yield Case("LayerNormalization", rank, (value, gamma), "no bias", {"axis": -1})
        yield Case("RMSNormalization", rank, (value, gamma), attributes={"axis": -1})
    channels, shift = Operand("norm_weight", (8,)), Operand("bias", (8,))
    for rank in (3, 4, 5):
        value = Operand("activation", (1, 8, *[8] * (rank - 2)))
        yield Case("InstanceNormalization", rank, (value, channels, shift))
        yield Case("GroupNormalization", rank, (value, channels, shift), attributes={"num_groups": 4})
