"""What each ATen op is to quantization: the one table that passes and targets look things up in."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


@dataclass(frozen=True)
class WeightedOp:
    """An op with a weight: where its operands stand among its arguments.

    Attributes:
        op_class: name that targets see.
        channel_axis: dimension of the weight that counts output channels.
        input: position of the activation; None for a lookup by integers.
        weight, bias: positions; bias None where the op has none.
    """

    op_class: str
    channel_axis: int
    input: int | None = 0
    weight: int = 1
    bias: int | None = 2


WEIGHTED_OPS: dict[str, WeightedOp] = {
    "aten.linear": WeightedOp("linear", 0),
    "aten.addmm": WeightedOp("linear", 1, input=1, weight=2, bias=0),
    "aten.conv1d": WeightedOp("conv", 0),
    "aten.conv2d": WeightedOp("conv", 0),
    "aten.conv3d": WeightedOp("conv", 0),
    "aten.conv_transpose1d": WeightedOp("conv_transpose", 1),
    "aten.conv_transpose2d": WeightedOp("conv_transpose", 1),
    "aten.conv_transpose3d": WeightedOp("conv_transpose", 1),
    "aten.embedding": WeightedOp("embedding", 0, input=None, weight=0, bias=None),
}
# The stride-padding-dilation-groups arguments of the convolutions; transposed ones put output_padding before groups.
_GROUPS_ARGUMENT = {"conv": 6, "conv_transpose": 6}

NORM_OPS: dict[str, WeightedOp] = {
    "aten.layer_norm": WeightedOp("norm", 0, weight=2, bias=3),
    "aten.group_norm": WeightedOp("norm", 0, weight=2, bias=3),
    "aten.rms_norm": WeightedOp("norm", 0, weight=2, bias=None),
    "aten.instance_norm": WeightedOp("norm", 0, weight=1, bias=2),
    "aten._native_batch_norm_legit_no_training": WeightedOp("norm", 0, weight=1, bias=2),
}

# They move values and compute none, or pick some of them: input and output hold the same codes.
PASS_THROUGH_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze expand expand_as slice "
        "select split split_with_sizes chunk unbind narrow clone contiguous alias detach repeat repeat_interleave tile "
        "roll flip "
        "index_select max_pool1d max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "pixel_shuffle pixel_unshuffle movedim swapaxes lift_fresh_copy diagonal unfold"
    ).split()
)

# They bound their input: a quantizer with the output's range does the same, so the input needs none of its own.
RANGE_LIMITING_OPS = frozenset({"aten.relu", "aten.relu6", "aten.hardtanh", "aten.clamp", "aten.clamp_min"})

_OP_CLASS_OF: dict[str, str] = {
    **{f"aten.{name}": "matmul" for name in ("matmul", "bmm", "baddbmm", "mm", "einsum")},
    **{
        f"aten.{name}": "elementwise"
        for name in ("add", "sub", "rsub", "mul", "div", "where", "masked_fill", "maximum")
    },
    **{f"aten.{name}": "concat" for name in ("cat", "stack")},
    **{f"aten.{name}": "softmax" for name in ("softmax", "_softmax")},
    **{
        f"aten.{name}": "activation"
        for name in (
            "gelu silu sigmoid tanh relu relu6 hardtanh hardswish hardsigmoid leaky_relu elu celu selu prelu mish "
            "softplus softsign logsigmoid clamp clamp_min clamp_max glu exp log sqrt rsqrt reciprocal pow abs neg "
            "sin cos log_softmax _log_softmax"
        ).split()
    },
    **{f"aten.{name}": "reduction" for name in ("mean", "sum", "amax", "amin", "avg_pool1d", "avg_pool2d")},
    **{
        f"aten.{name}": "reduction"
        for name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "var", "linalg_vector_norm")
    },
}

OP_CLASSES = (
    "linear",
    "conv",
    "conv_transpose",
    "embedding",
    "matmul",
    "elementwise",
    "concat",
    "norm",
    "softmax",
    "activation",
    "reduction",
    "shape",
    "input",
    "other",
)


def op_name(node: Node) -> str:
    """`aten.linear` for an ATen call; the function's own name for others; the opcode for what is no call."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))


_SECOND_FACTOR = {"aten.matmul": 1, "aten.mm": 1, "aten.bmm": 1, "aten.baddbmm": 2}


def op_class(node: Node) -> str:
    """One of OP_CLASSES."""
    name = op_name(node)
    if node.op == "placeholder":
        return "input"
    if name in PASS_THROUGH_OPS:
        return "shape"
    weighted = WEIGHTED_OPS.get(name) or NORM_OPS.get(name)
    return weighted.op_class if weighted else _OP_CLASS_OF.get(name, "other")


def second_factor(node: Node) -> Any:
    """The right-hand matrix of a product; None for other ops."""
    return argument(node, _SECOND_FACTOR.get(op_name(node)))


def argument(node: Node, position: int | None) -> Any:
    """The argument at a position of the op's schema, given by position or by name; None when absent."""
    if position is None:
        return None
    if position < len(node.args):
        return node.args[position]
    schema = node.target._schema  # type: ignore[union-attr]
    return node.kwargs.get(schema.arguments[position].name)


def set_argument(node: Node, position: int, value: Any) -> None:
    """Replace the argument at a position, wherever it was given."""
    if position < len(node.args):
        node.update_arg(position, value)
        return
    schema = node.target._schema  # type: ignore[union-attr]
    node.update_kwarg(schema.arguments[position].name, value)


def groups(node: Node) -> int:
    """Groups of a convolution; 1 for any other op."""
    position = _GROUPS_ARGUMENT.get(op_class(node))
    value = argument(node, position)
    return int(value) if value is not None else 1


def value_of(node: Node) -> Any:
    """The fake tensor (or tuple of them) that capture recorded for a node."""
    return node.meta.get("val")


def is_float_tensor(node: Node) -> bool:
    """Whether a node yields one tensor of floating-point numbers."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_pass_through(node: Node) -> bool:
    """Whether the node's output holds codes of its first input and nothing else."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_pass_through(node.args[0])  # type: ignore[arg-type]
    return op_name(node) in PASS_THROUGH_OPS


def module_path(node: Node) -> str:
    """Dotted name of the user's module that the node belongs to; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return str(path).removeprefix("L['self'].").removeprefix("L__self__.")


def parameter_name(node: Node) -> str | None:
    """Name of the parameter or buffer that a `get_attr` node reads; None for any other node."""
    return str(node.target) if node.op == "get_attr" else None
