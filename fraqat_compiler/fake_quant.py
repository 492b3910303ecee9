"""The fake-quant modules that a compiled graph holds, one for each tensor that has a quantizer.

A module's state is plain buffers (`scale`, `zero_point`), so it shards and checkpoints like any other. In training it
runs in-place kernels; while `torch.export` traces, it is one `fraqat::fake_quantize` call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fraqat_compiler import quantizer
from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.observers import OBSERVERS, Observer
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.target import Role

CLIP_RATIOS = tuple(1 - step / 40 for step in range(24))  # what range_method="mse" tries for a weight: 1.0 .. 0.425


class FakeQuantize(nn.Module):
    """Base of the fake-quant modules.

    Attributes:
        spec: how the tensor is quantized.
        role: what the tensor is.
        enabled: False lets the tensor through in float (calibration of what comes after it).
        scale: float32 buffer, compact (see `quantizer`).
        zero_point: int32 buffer, shaped like `scale`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, role: Role, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.role: Role = role
        self.enabled = True
        self.scale_shape = scale_shape
        self.register_buffer("scale", torch.ones(scale_shape))
        self.register_buffer("zero_point", torch.zeros(scale_shape, dtype=torch.int32))

    def set_bit_width(self, bit_width: float) -> None:
        """Change the width; the grid follows at the next forward."""
        self.spec = self.spec.with_bit_width(bit_width)

    def to_config(self) -> dict[str, Any]:
        """JSON form from which `from_config` rebuilds the module; tensors travel as its state."""
        return {
            "spec": dataclasses.asdict(self.spec),
            "role": self.role,
            "scale_shape": list(self.scale_shape),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FakeQuantize:
        return cls(QuantSpec(**config["spec"]), config["role"], tuple(config["scale_shape"]))

    def extra_repr(self) -> str:
        kind = "symmetric" if self.spec.symmetric else "asymmetric"
        return f"{self.role}, {self.spec.bit_width:g} bits, {kind}, {self.spec.granularity}"

    def _exported(self, x: Tensor) -> Tensor:
        """The one call that an exported graph holds."""
        spec = self.spec
        result: Tensor = torch.ops.fraqat.fake_quantize(
            x,
            self.scale,
            self.zero_point,
            spec.quant_min,
            spec.quant_max,
            -1 if spec.axis is None else spec.axis,
            spec.group_size or 0,
        )
        return result


class WeightFakeQuantize(FakeQuantize):
    """Fake quant of a tensor that the graph owns (weight, norm weight, constant): its range is the tensor's own.

    Until it is frozen the range is taken anew at every forward, so it follows the weight through training; `freeze`
    keeps the last one. With range_method "mse" each scale is shrunk by the ratio that has the least squared error.

    Attributes:
        clip_ratio: float32 buffer, shaped like `scale`: those ratios.
        fitted_bit_width: width that they were found at; None before. Another width has them found anew.
        least_scale: float32 buffer, shaped like `scale`: no symmetric scale falls below it.
    """

    clip_ratio: Tensor
    least_scale: Tensor

    def __init__(self, spec: QuantSpec, role: Role, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__(spec, role, scale_shape)
        self.frozen = False
        self.fitted_bit_width: float | None = None
        self.register_buffer("clip_ratio", torch.ones(scale_shape))
        self.register_buffer("least_scale", torch.zeros(scale_shape))

    def to_config(self) -> dict[str, Any]:
        return super().to_config() | {"frozen": self.frozen}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WeightFakeQuantize:
        module = cls(QuantSpec(**config["spec"]), config["role"], tuple(config["scale_shape"]))
        module.frozen = config["frozen"]
        return module

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if torch.compiler.is_exporting():
            return self._exported(weight)
        if not self.frozen:
            self.update_range(weight)
        spec = self.spec
        values = quantizer.grouped(weight, spec.group_size)
        zero_point = None if spec.symmetric else self._broadcast(self.zero_point, weight)
        rounded = quantizer.straight_through(
            values, self._broadcast(self.scale, weight), spec.quant_min, spec.quant_max, zero_point, clips=self._clips
        )
        return rounded.view(weight.shape)

    def _broadcast(self, parameter: Tensor, weight: Tensor) -> Tensor:
        return quantizer.broadcast(parameter, weight.ndim, self.spec.axis, self.spec.group_size)

    @property
    def _clips(self) -> bool:
        """At integer widths max|W| is a code itself, so Eq. 1 never clips unless the range was shrunk."""
        return self.frozen or not self.spec.symmetric or not self.spec.is_integer or self.spec.range_method == "mse"

    @torch.no_grad()
    def update_range(self, weight: Tensor) -> None:
        """Take scale and zero_point from the tensor."""
        spec = self.spec
        if spec.range_method == "mse" and self.fitted_bit_width != spec.bit_width:
            self._fit_clip_ratio(weight)
        if spec.symmetric:
            magnitude = quantizer.reduced_magnitude(weight, spec.axis, spec.group_size)
            scale = quantizer.symmetric_scale(magnitude, spec.bit_width, self.least_scale)
        else:
            low, high = quantizer.reduced_range(weight, spec.axis, spec.group_size)
            scale, zero_point = quantizer.asymmetric_parameters(low, high, spec)
            self.zero_point = zero_point
        if spec.range_method == "mse":
            scale = torch.maximum(scale * self.clip_ratio, self.least_scale)
        self.scale = scale.to(torch.float32)

    def _fit_clip_ratio(self, weight: Tensor) -> None:
        """For each scale the ratio in CLIP_RATIOS that gives the least squared error."""
        self.fitted_bit_width = self.spec.bit_width
        low, high = quantizer.reduced_range(weight, self.spec.axis, self.spec.group_size)
        least = torch.full_like(low, float("inf"))
        for ratio in CLIP_RATIOS:
            scale, zero_point = quantizer.quantization_parameters(low, high, self.spec)
            error = self._squared_error(weight, scale * ratio, zero_point)
            self.clip_ratio = torch.where(error < least, ratio, self.clip_ratio)
            least = torch.minimum(least, error)

    def _squared_error(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        spec = self.spec
        codes = quantizer.quantize(
            weight, scale, zero_point, spec.quant_min, spec.quant_max, spec.axis, spec.group_size
        )
        error = quantizer.dequantize(codes, scale, zero_point, spec.axis, spec.group_size).sub_(weight).square_()
        if spec.group_size is not None:
            return quantizer.grouped(error, spec.group_size).sum(-1)
        others = [dim for dim in range(weight.ndim) if spec.axis is None or dim != spec.axis % weight.ndim]
        return error.sum(others)

    def freeze(self, weight: Tensor) -> None:
        """Keep the scale for good.

        Raises:
            QuantizationError: the width is fractional or above 16 bits, so no file can hold the codes.
        """
        if not self.spec.is_exportable:
            raise QuantizationError(
                f"a weight at {self.spec.bit_width:g} bits cannot be exported: files hold integer widths up to 16.",
                "End the schedule at one.",
            )
        self.update_range(weight.detach())
        self.frozen = True


class ActivationFakeQuantize(FakeQuantize):
    """Fake quant of a tensor that the graph computes: a static range from calibration, or one per token.

    `observer` is set while calibrating: the tensor then passes in float and its values are recorded.
    """

    def __init__(self, spec: QuantSpec, role: Role = "activation", scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__(spec, role, scale_shape)
        self.observer: Observer | None = None
        self.scale.fill_(float("nan"))  # not calibrated
        self._static: tuple[float, int, int] | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x)
            return x
        if not self.enabled:
            return x
        if self.spec.dynamic:
            return self._per_token(x)
        if torch.compiler.is_exporting():
            return self._exported(x)
        step, lowest, highest = self._static or self._read_static()
        return quantizer.static_straight_through(x, self.scale, lowest, highest, step)

    def start_calibration(self) -> None:
        """Record values from now on; a second call starts anew."""
        self.observer = OBSERVERS[self.spec.range_method]()

    def finish_calibration(self) -> None:
        """Turn what was recorded into the static range.

        Raises:
            QuantizationError: nothing was recorded.
        """
        observer, self.observer = self.observer, None
        if self.spec.dynamic:
            return
        if observer is None or not observer.seen:
            raise QuantizationError("an activation saw no calibration data.", "Calibrate with at least one batch.")
        known = self.spec.range_max
        low, high = observer.range(self.spec) if known is None else (torch.tensor(0.0), torch.tensor(known))
        self.set_range(low, high)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix scale and zero_point to the grid over [low, high] (scalars)."""
        scale, zero_point = quantizer.quantization_parameters(low, high, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._forget()

    @property
    def calibrated(self) -> bool:
        return self.spec.dynamic or not bool(torch.isnan(self.scale).any())

    def _forget(self) -> None:
        self._static = None

    def _read_static(self) -> tuple[float, int, int]:
        """(scale, lowest, highest) as Python numbers, codes less zero_point; read once, a GPU would wait for each."""
        if not self.calibrated:
            raise QuantizationError(
                "an activation quantizer has no range yet.", "Calibrate the graph before running it."
            )
        zero_point = int(self.zero_point)
        self._static = (float(self.scale), self.spec.quant_min - zero_point, self.spec.quant_max - zero_point)
        return self._static

    def _per_token(self, x: Tensor) -> Tensor:
        """The range of each token (all of the last dimension), as in FraQAT's GPU runs; cannot be exported."""
        low, high = x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True)
        scale, zero_point = quantizer.quantization_parameters(low, high, self.spec)
        return quantizer.straight_through(x, scale, self.spec.quant_min, self.spec.quant_max, zero_point)


class _BiasStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return quantizer.round_bias(bias, input_scale, weight_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class BiasFakeQuantize(FakeQuantize):
    """Fake quant of a bias at int32 with scale input_scale * weight_scale, as the file will hold it.

    The scales come in as arguments, so the graph itself says which quantizers the bias depends on. Where its spec has
    `result_scale`, they are that of the op's result and this module's own, which stays 1.
    """

    def forward(self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        if not self.enabled:
            return bias
        if torch.compiler.is_exporting():
            exported: Tensor = torch.ops.fraqat.fake_quantize_bias(bias, input_scale, weight_scale)
            return exported
        result: Tensor = _BiasStraightThrough.apply(bias, input_scale, weight_scale)
        return result
