"""The quantizer as functions: grids, codes, and the fake quant with its gradient.

Scales are compact: shape () per tensor, (C,) per channel, x.shape[:-1] + (groups,) per group. `broadcast` gives the
view that lines up with the tensor.

Gradient rule, one for every fake quant of this package: straight-through where the code lies inside the range before
clamping, that is where quant_min - 0.5 < x / scale + zero_point < quant_max + 0.5; zero elsewhere. The scale is a
constant to autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.quant_spec import QuantSpec, code_range

# Below this a scale is noise of empty rows. They take the grid of a range of 1: codes of 0, files without denormal
# scales, and steps near those of other tensors, for hardware cannot add what differs by a factor of 65,535.
SMALLEST_SCALE = 1e-20
# Float32 holds integer codes exactly up to 24 bits; wider codes are computed in float64.
EXACT_FLOAT32_BITS = 24


def grouped(tensor: Tensor, group_size: int | None) -> Tensor:
    """View with the last dimension split into groups: (..., K) -> (..., K / group_size, group_size).

    Raises:
        QuantizationError: K is not a multiple of group_size.
    """
    if group_size is None:
        return tensor
    if tensor.shape[-1] % group_size:
        raise QuantizationError(
            f"the last dimension of shape {tuple(tensor.shape)} is not a multiple of group_size {group_size}.",
            "Choose a group_size that divides it.",
        )
    groups: Tensor = tensor.unflatten(-1, (-1, group_size))
    return groups


def broadcast(parameter: Tensor, ndim: int, axis: int | None, group_size: int | None) -> Tensor:
    """View of a compact scale or zero_point that broadcasts against `grouped(tensor, group_size)`.

    Args:
        parameter: compact scale or zero_point.
        ndim: dimensions of the tensor before grouping.
    """
    if group_size is not None:
        return parameter.unsqueeze(-1)
    if axis is None:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)


def reduced_range(tensor: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Least and greatest value for each scale, compact."""
    if group_size is not None:
        groups = grouped(tensor, group_size)
        return groups.amin(-1), groups.amax(-1)
    if axis is None:
        return tensor.amin(), tensor.amax()
    others = [dim for dim in range(tensor.ndim) if dim != axis % tensor.ndim]
    return tensor.amin(others), tensor.amax(others)


def reduced_magnitude(tensor: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Greatest absolute value for each scale, compact."""
    if group_size is not None:
        return grouped(tensor, group_size).abs().amax(-1)
    if axis is None:
        return tensor.abs().amax()
    others = [dim for dim in range(tensor.ndim) if dim != axis % tensor.ndim]
    return tensor.abs().amax(others)


def _usable(scale: Tensor, steps: float = 1.0) -> Tensor:
    """The scale, or that of a range of 1 in so many steps where nothing was there."""
    return scale.masked_fill(scale < SMALLEST_SCALE, 1 / steps)


def symmetric_scale(magnitude: Tensor, bit_width: float, least: Tensor | None = None) -> Tensor:
    """S = max|W| / (2^(b-1) - 1), Eq. 1 of FraQAT (arXiv 2510.14823), b real, and no less than `least`.

    An all-zero row gets `least`, or the scale of a magnitude of 1 where that is 0.
    """
    steps = 2.0 ** (bit_width - 1) - 1
    scale = magnitude / steps
    return _usable(scale if least is None else torch.maximum(scale, least), steps)


def asymmetric_parameters(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and integer zero_point of a grid that holds 0 exactly and reaches both ends of [low, high].

    Eq. 2 of FraQAT puts code 0 at the minimum and divides by 2^b. A file stores an integer zero_point instead, so the
    range is widened to hold 0 and divided by the number of steps, quant_max - quant_min, which reaches both ends.

    Returns:
        scale, and zero_point as int32, both shaped like `low`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = spec.quant_max - spec.quant_min
    scale = _usable((high - low) / steps, steps)
    zero_point = (spec.quant_min - torch.round(low / scale)).clamp(spec.quant_min, spec.quant_max)
    middle = (spec.quant_max + 1) // 2
    centred = _usable(torch.maximum(-low / middle, high / (spec.quant_max - middle)))
    placed = centre(zero_point, spec)
    return torch.where(placed == zero_point, scale, centred), placed.to(torch.int32)


def centre(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """A zero point, or the middle of the codes where it lies near it and the spec wants it there (`centred_within`)."""
    if spec.centred_within is None:
        return zero_point
    middle = (spec.quant_max + 1) // 2
    return torch.where((zero_point - middle).abs() <= spec.centred_within, middle, zero_point)


def quantization_parameters(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero_point for a range, by the spec's grid."""
    if spec.symmetric:
        scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), spec.bit_width)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return asymmetric_parameters(low, high, spec)


def quantize(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Integer codes clamp(round(x / scale) + zero_point), nearest rounding with ties to even, in x's float dtype.

    It is what ONNX QuantizeLinear computes, so codes taken in training are the codes of the file.
    """
    values = grouped(tensor, group_size)
    step = broadcast(scale, tensor.ndim, axis, group_size)
    offset = broadcast(zero_point, tensor.ndim, axis, group_size)
    codes = torch.round(values / step).add_(offset).clamp_(quant_min, quant_max)
    return codes.view(tensor.shape)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """Values (codes - zero_point) * scale."""
    step = broadcast(scale, codes.ndim, axis, group_size)
    offset = broadcast(zero_point, codes.ndim, axis, group_size)
    return ((grouped(codes, group_size) - offset) * step).view(codes.shape)


class _StraightThrough(torch.autograd.Function):
    """Fake quant over broadcast parameters, with the module docstring's gradient rule.

    The kernels work in place on one fresh tensor: on a CPU that is many times faster than the per-element kernels of
    `torch.fake_quantize_per_tensor_affine`.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor | None, code_range: tuple[int, int], clips: bool
    ) -> Tensor:
        ctx.bounds = (code_range[0] - 0.5, code_range[1] + 0.5) if clips else None
        ctx.save_for_backward(*((values, scale, zero_point) if clips else ()))
        codes = values.div(scale).round_()
        if zero_point is not None:
            codes.add_(zero_point)
        if clips:
            codes.clamp_(*code_range)
        if zero_point is not None:
            codes.sub_(zero_point)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.bounds is None:
            return gradients[0], None, None, None, None
        values, scale, zero_point = ctx.saved_tensors
        codes = values.div(scale)
        if zero_point is not None:
            codes.add_(zero_point)
        inside = torch.ops.aten.hardtanh_backward(gradients[0], codes, *ctx.bounds)
        return inside, None, None, None, None


class _StaticStraightThrough(torch.autograd.Function):
    """The same for one scale per tensor whose value is known to Python: the backward needs one pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, lowest: int, highest: int, step: float) -> Tensor:
        ctx.bounds = ((lowest - 0.5) * step, (highest + 0.5) * step)
        ctx.save_for_backward(values)
        return values.div(scale).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (values,) = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(gradients[0], values, *ctx.bounds)
        return inside, None, None, None, None


class _LearnedStep(torch.autograd.Function):
    """Fake quant whose step and zero point get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        code_range: tuple[int, int],
        gradient_scale: float,
    ) -> Tensor:
        ctx.code_range, ctx.gradient_scale = code_range, gradient_scale
        ctx.save_for_backward(values, scale, zero_point)
        codes = values.div(scale).round_()
        if zero_point is None:
            return codes.clamp_(*code_range).mul_(scale)
        return codes.add_(zero_point).clamp_(*code_range).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        values, scale, zero_point = ctx.saved_tensors
        lowest, highest = ctx.code_range
        position = values.div(scale)
        if zero_point is not None:
            position.add_(zero_point)
        inside = torch.ops.aten.hardtanh_backward(gradients[0], position, lowest - 0.5, highest + 0.5)
        outside = gradients[0] - inside
        codes = position.round().clamp_(lowest, highest)
        level = codes if zero_point is None else codes - zero_point
        to_scale = inside.mul(codes - position).add_(outside * level)
        scale_gradient = to_scale.sum_to_size(scale.shape).mul_(ctx.gradient_scale)
        if zero_point is None:
            return inside, scale_gradient, None, None, None
        to_zero_point = outside.mul_(scale).neg_().sum_to_size(zero_point.shape).mul(ctx.gradient_scale)
        return inside, scale_gradient, to_zero_point, None, None


def learned_step(
    values: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    elements: float,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Fake quant that trains its step: LSQ (arXiv 1902.08153, Eq. 3), and its zero point: LSQ+ (arXiv 2004.09576).

    Gradient of the step: round(v / s) - v / s inside the code range, the code less the zero point outside; of the zero
    point: 0 inside, -s outside; both scaled by 1 / sqrt(elements * quant_max). Inside is as in the module's docstring.

    Args:
        values: any shape.
        scale: broadcasts against it.
        quant_min, quant_max: integer codes.
        elements: how many values share a scale.
        zero_point: floats of integer value, broadcast like `scale`; None is 0.
    """
    gradient_scale = 1 / math.sqrt(elements * quant_max)
    result: Tensor = _LearnedStep.apply(values, scale, zero_point, (quant_min, quant_max), gradient_scale)
    return result


def straight_through(
    values: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    zero_point: Tensor | None = None,
    *,
    clips: bool = True,
) -> Tensor:
    """Fake quant of `values` with broadcastable `scale` and `zero_point` (None is 0).

    `clips` False promises that no value lies outside the code range, which spares the clamp and the mask.
    """
    result: Tensor = _StraightThrough.apply(values, scale, zero_point, (quant_min, quant_max), clips)
    return result


def static_straight_through(values: Tensor, scale: Tensor, lowest: int, highest: int, step: float) -> Tensor:
    """`straight_through` for a scalar `scale` whose value `step` Python knows; codes are less the zero_point."""
    result: Tensor = _StaticStraightThrough.apply(values, scale, lowest, highest, step)
    return result


def fake_quantize(
    tensor: Tensor,
    bit_width: float,
    axis: int | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
) -> Tensor:
    """Round a tensor to a fractional-bit grid and back, by Eq. 1 and Eq. 2 of FraQAT (arXiv 2510.14823).

    Symmetric: S = max|W| / (2^(b-1) - 1), W_b = S * code, codes in [-floor(2^(b-1)), floor(2^(b-1) - 1)].
    Asymmetric: S = (wmax - wmin) / 2^b, W_b = S * code + wmin, codes in [0, floor(2^b - 1)].
    Codes are integers at every width and are clamped to their range (the paper prints no clamp, both need one).

    Args:
        tensor: any shape, floating point.
        bit_width: real number in [2, 32].
        axis: dimension with one scale per index; None is one scale for the tensor.
        group_size: elements along the last dimension that share a scale; overrides `axis`.
        symmetric: Eq. 1, otherwise Eq. 2.

    Returns:
        Tensor of the same shape and dtype; its gradient is straight-through inside the code range.

    Raises:
        QuantizationError: a bit width outside [2, 32], a group_size that does not divide the last dimension, an axis
            that the tensor does not have, an empty tensor or one that is not floating point.
    """
    quant_min, quant_max = code_range(bit_width, signed=symmetric)
    _refuse_unfit(tensor, axis)
    exact = tensor.double() if bit_width > EXACT_FLOAT32_BITS else tensor.float() if tensor.itemsize < 4 else tensor
    values = grouped(exact, group_size)
    if symmetric:
        magnitude = reduced_magnitude(exact.detach(), axis, group_size)
        scale = broadcast(symmetric_scale(magnitude, bit_width), exact.ndim, axis, group_size)
        result = straight_through(values, scale, quant_min, quant_max)
    else:
        low, high = reduced_range(exact.detach(), axis, group_size)
        scale = broadcast(_usable((high - low) / 2.0**bit_width), exact.ndim, axis, group_size)
        offset = broadcast(low, exact.ndim, axis, group_size)
        result = straight_through(values - offset, scale, quant_min, quant_max) + offset
    return result.reshape(tensor.shape).to(tensor.dtype)


def _refuse_unfit(tensor: Tensor, axis: int | None) -> None:
    if not tensor.is_floating_point():
        raise QuantizationError(f"a tensor of {tensor.dtype} cannot be fake-quantized.", "Convert it to float first.")
    if tensor.numel() == 0:
        raise QuantizationError(f"an empty tensor (shape {tuple(tensor.shape)}) has no range to quantize.")
    if axis is not None and not -tensor.ndim <= axis < tensor.ndim:
        raise QuantizationError(f"axis {axis} is outside a tensor of {tensor.ndim} dimensions.")


@torch.library.custom_op("fraqat::fake_quantize", mutates_args=())
def fake_quantize_op(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, group_size: int
) -> Tensor:
    """What an exported graph holds in place of a fake-quant module; it lowers to QuantizeLinear, DequantizeLinear.

    Args:
        x: any shape.
        scale: compact, float32.
        zero_point: compact, int32.
        quant_min, quant_max: integer codes.
        axis: dimension of a per-channel scale; meaningless for a scalar one.
        group_size: elements along the last dimension for each scale; 0 is no grouping.
    """
    channel_axis = axis if scale.ndim == 1 and not group_size else None
    codes = quantize(x, scale, zero_point, quant_min, quant_max, channel_axis, group_size or None)
    return dequantize(codes, scale, zero_point, channel_axis, group_size or None)


@fake_quantize_op.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, group_size: int
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fraqat::fake_quantize_bias", mutates_args=())
def fake_quantize_bias_op(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias at int32 with scale input_scale * weight_scale and zero_point 0, as integer kernels add it.

    Args:
        bias: shape (C,).
        input_scale: scalar, of the input activation.
        weight_scale: (C,) or scalar, of the weight.
    """
    return round_bias(bias, input_scale, weight_scale)


@fake_quantize_bias_op.register_fake
def _(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.empty_like(bias)


def round_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Values of a bias held as int32 codes; float64 inside because float32 does not hold 32-bit codes.

    The product of the scales is rounded to float32 and the code is multiplied as float32, as DequantizeLinear does.
    """
    scale = bias_scale(input_scale, weight_scale)
    codes = bias_codes(bias, scale)
    return codes.to(bias.dtype) * scale


def bias_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Scale of an int32 bias, float32: input_scale * weight_scale."""
    return _usable(input_scale * weight_scale)


def least_weight_scale(bias: Tensor, input_scale: Tensor, headroom: float = 1.0) -> Tensor:
    """Weight scales (C,) at which |bias| takes 1 / headroom of the int32 codes; below that of 1 it would saturate.

    Rows of next to no weight, as BatchNorm's dead channels leave them, would otherwise lose their bias.
    """
    return bias.abs().mul(headroom / 2.0**31).div(input_scale)


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """int32 codes of a bias, as float64."""
    return torch.round(bias.double() / scale.double()).clamp_(-(2.0**31), 2.0**31 - 1)
