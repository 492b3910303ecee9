"""The quantizers that HTP needs where the default ones are refused or computed wrongly; each with what was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.target import Role, TensorRequest

SIGMOIDS = frozenset({"aten.sigmoid", "aten.hardsigmoid"})
HIGHEST_SIGMOID = 65535 / 65536
SOFTMAX_AT_8_BITS = 10  # elements; one of n is at least 1 / n, and from 0.1 on the library is right at 8 bits
FACTOR_WINDOW = 16  # codes between a zero point and 128


def grid_for(request: TensorRequest, spec: QuantSpec) -> QuantSpec:
    """The default grid, or the one that HTP takes instead."""
    change = _CHANGES.get(request.role)
    return change(request, spec) if change else spec


def _activation(request: TensorRequest, spec: QuantSpec) -> QuantSpec:
    # The library gives a sigmoid at 16 bits the grid [0, 1) whatever the file says, and then scales the bias of a layer
    # behind it wrongly.
    if request.function in SIGMOIDS and spec.bit_width == 16:
        return dataclasses.replace(spec, range_max=HIGHEST_SIGMOID)
    # At 8 bits it computes a flat softmax too large, by 19 % at 256 elements and more than twofold at 1024.
    if request.op == "softmax" and request.shape[-1] > SOFTMAX_AT_8_BITS:
        return dataclasses.replace(spec, bit_width=max(spec.bit_width, 16))
    # Where the zero point of a product's second factor lies near 128, the op that computes the factor writes signed
    # bytes about it, which end 127 steps above it and not at 255: columns with larger codes stray by 5 to 8 steps.
    if request.factor and spec.bit_width == 8:
        return dataclasses.replace(spec, centred_within=FACTOR_WINDOW)
    return spec


def _bias(request: TensorRequest, spec: QuantSpec) -> QuantSpec:
    # That of a LayerNorm at 8 bits the library rounds to whole steps of the result; so the graph has it so too, and the
    # fine-tune makes up for it.
    if request.function == "aten.layer_norm" and request.activation_bit_width <= 8:
        return dataclasses.replace(spec, result_scale=True)
    return spec


def _weight(request: TensorRequest, spec: QuantSpec) -> QuantSpec:
    if request.op == "embedding":
        return _table(request)
    # Per channel, grouped transposed convolutions are wrong, or refused with a bias, as 4 bits per tensor are.
    if request.depthwise and request.op == "conv_transpose":
        return dataclasses.replace(spec, bit_width=max(spec.bit_width, 8), axis=None)
    # Depthwise kernels of 4 bits stray by 26 to 62 steps at 16-bit activations. Kernels of a resize are no weights that
    # a fine-tune could adapt to 4 bits: rounded so, an image of one value comes out up to 12 % off, and 0.7 % at 8.
    is_fine = request.depthwise and request.activation_bit_width > 8
    if is_fine or request.resampling or _makes_one_channel(request):
        return dataclasses.replace(spec, bit_width=max(spec.bit_width, 8))
    return spec


def _table(request: TensorRequest) -> QuantSpec:
    """A lookup table: per tensor and unsigned like activations, because a Gather has one grid.

    The zero point of a tied one is 128, because a 16-bit kernel that reads it too cuts off what is 128 or more steps
    above it; others keep theirs, because the library holds a table twice whose grid goes beyond that of what it is
    converted to.
    """
    return QuantSpec(bit_width=8, symmetric=False, signed=False, centred_within=128 if request.tied else None)


def _makes_one_channel(request: TensorRequest) -> bool:
    """Whether it is a convolution of images to one channel: its one scale is per tensor, and 4 bits are refused."""
    axis = request.channel_axis
    return request.op in ("conv", "conv_transpose") and len(request.shape) == 4 and request.shape[axis or 0] == 1


_CHANGES: dict[Role, Callable[[TensorRequest, QuantSpec], QuantSpec]] = {
    "activation": _activation,
    "bias": _bias,
    "weight": _weight,
}
