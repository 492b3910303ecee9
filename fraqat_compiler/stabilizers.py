"""Stabilizers: what keeps low-bit weights from wandering between codes while they are trained.

In text they are a list with commas, in the grammar of pipelines: `ema{decay=0.99},freeze-oscillations`. Each is a
frozen dataclass of options whose `bind` makes what acts in one fine-tune. They act in the last stage, at the end width:
only its codes are shipped, and a code of one grid means nothing on the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fraqat_compiler import quantizer
from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import WeightFakeQuantize

EVEN_SPAN = 0.5  # mean age of an average in which all steps weigh the same


class QuantizedWeight(NamedTuple):
    """A trained weight and its quantizer."""

    name: str
    parameter: Tensor
    fake_quant: WeightFakeQuantize

    def codes(self) -> Tensor:
        """Integer codes of the weight on its grid, as floats of its shape."""
        module, spec = self.fake_quant, self.fake_quant.spec
        weight = self.parameter.detach()
        bounds = spec.quant_min, spec.quant_max
        return quantizer.quantize(weight, module.scale, module.zero_point, *bounds, spec.axis, spec.group_size)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for on the grid."""
        module = self.fake_quant
        return quantizer.dequantize(codes, module.scale, module.zero_point, module.spec.axis, module.spec.group_size)

    def update_grid(self) -> None:
        """Let the grid follow the weight."""
        self.fake_quant.update_range(self.parameter.detach())


class Subjects(NamedTuple):
    """What stabilizers act on.

    Attributes:
        weights: trained and quantized.
        parameters: all that is trained, by name.
    """

    weights: Sequence[QuantizedWeight]
    parameters: Mapping[str, Tensor]


class Acting:
    """A stabilizer at work; the loop calls it in the last stage only.

    Attributes:
        state: all that it remembers, by name; it goes into checkpoints. Empty outside the last stage.
    """

    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        self.state: dict[str, Tensor] = {}

    def begin(self) -> None:
        """The last stage begins."""

    def add_gradients(self, progress: float) -> None:
        """Gradients of the loss are there; `progress` is the share of the stage that is done."""

    def after_step(self, progress: float) -> None:
        """The optimizer has moved the parameters."""

    def finish(self) -> None:
        """The fine-tune is over."""


@dataclass(frozen=True)
class Stabilizer:
    """Base of the stabilizers' options."""

    name: ClassVar[str]

    def bind(self, subjects: Subjects) -> Acting:
        """What acts in one fine-tune."""
        raise NotImplementedError


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class FreezeOscillations(Stabilizer):
    """Freeze a weight that flips between two codes at the code where it is most of the time.

    Nagel et al. 2022 (arXiv 2203.11086), Algorithm 1: a change of code that takes back the change before it is an
    oscillation; a weight whose moving average of them passes a threshold stays for good at the rounded moving average
    of its codes. A frozen weight keeps its code while its row's scale may still move.

    Options: `momentum` of both averages; `start` and `end`, the threshold, annealed along a cosine over the last stage.
    """

    name: ClassVar[str] = "freeze-oscillations"
    momentum: float = 0.01
    start: float = 0.1
    end: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.momentum < 1:
            raise UsageError(f"{self.name} cannot run with momentum={self.momentum:g}.", "It is between 0 and 1.")
        if not 0 < self.end <= self.start:
            raise UsageError(
                f"{self.name} cannot anneal its threshold from {self.start:g} to {self.end:g}.",
                "It falls and is positive.",
            )

    def bind(self, subjects: Subjects) -> Acting:
        return _Freezing(subjects, self)


class _Freezing(Acting):
    def __init__(self, subjects: Subjects, options: FreezeOscillations) -> None:
        super().__init__(subjects)
        self.options = options

    def begin(self) -> None:
        for weight in self.subjects.weights:
            weight.update_grid()
            codes = weight.codes()
            self.state |= {
                f"codes:{weight.name}": codes,
                f"average:{weight.name}": codes.clone(),
                f"frequency:{weight.name}": torch.zeros_like(codes),
                f"direction:{weight.name}": torch.zeros_like(codes, dtype=torch.int8),
                f"frozen:{weight.name}": torch.zeros_like(codes, dtype=torch.bool),
            }

    def after_step(self, progress: float) -> None:
        threshold = cosine(self.options.start, self.options.end, progress)
        for weight in self.subjects.weights:
            self._hold(weight)
            self._observe(weight, threshold)
            self._hold(weight)

    def finish(self) -> None:
        for weight in self.subjects.weights:
            weight.update_grid()
            self._hold(weight)

    @torch.no_grad()
    def _observe(self, weight: QuantizedWeight, threshold: float) -> None:
        """Take in the codes after a step, and freeze what oscillates too often."""
        state, name = self.state, weight.name
        average, frequency, direction = (state[f"{kind}:{name}"] for kind in ("average", "frequency", "direction"))
        frozen = state[f"frozen:{name}"]
        weight.update_grid()
        codes = weight.codes()
        turn = torch.sign(codes - state[f"codes:{name}"]).to(torch.int8)
        oscillates = (turn != 0) & (turn == -direction)
        frequency.lerp_(oscillates.to(frequency.dtype), self.options.momentum)
        average.copy_(torch.where(frozen, average, average.lerp(codes, self.options.momentum)))
        direction.copy_(torch.where(turn != 0, turn, direction))
        caught = (frequency > threshold) & ~frozen
        average.copy_(torch.where(caught, average.round(), average))
        frozen |= caught
        state[f"codes:{name}"] = codes

    @torch.no_grad()
    def _hold(self, weight: QuantizedWeight) -> None:
        """Put frozen weights on their codes of the grid as it is, then let the grid follow.

        Before the grid is taken anew too, or a frozen weight that an optimizer step has moved would stretch it.
        """
        frozen = self.state[f"frozen:{weight.name}"]
        held = weight.values(self.state[f"average:{weight.name}"])
        weight.parameter.copy_(torch.where(frozen, held, weight.parameter))


@dataclass(frozen=True)
class Dampen(Stabilizer):
    """Pull every weight towards the middle of its code's bin, so that it does not sit on a threshold.

    Nagel et al. 2022 (arXiv 2203.11086), Eq. 6: the loss grows by lambda times the sum over all weights of
    (clip(w) - s * code)^2, with the code held constant. Its gradient, 2 lambda (w - s * code) inside the grid, is added
    as it is; the reported loss is without it.

    Options: `strength`, lambda at the end of the last stage, to which it rises from 0 along a cosine. The paper has up
    to 0.1 for classification; the relative distillation loss is smaller, and so is the default.
    """

    name: ClassVar[str] = "dampen"
    strength: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise UsageError(f"{self.name} cannot run with strength={self.strength:g}.", "It is positive.")

    def bind(self, subjects: Subjects) -> Acting:
        return _Dampening(subjects, self)


class _Dampening(Acting):
    def __init__(self, subjects: Subjects, options: Dampen) -> None:
        super().__init__(subjects)
        self.options = options

    @torch.no_grad()
    def add_gradients(self, progress: float) -> None:
        strength = cosine(0.0, self.options.strength, progress)
        for weight in self.subjects.weights:
            if weight.parameter.grad is not None:
                weight.parameter.grad.add_(self._offset(weight), alpha=2 * strength)

    @staticmethod
    def _offset(weight: QuantizedWeight) -> Tensor:
        """Clip(w) - s * code; 0 outside the grid, where clip(w) is an end of it."""
        codes, spec = weight.codes(), weight.fake_quant.spec
        offset = weight.parameter.detach() - weight.values(codes)
        beyond = ((codes == spec.quant_min) & (offset < 0)) | ((codes == spec.quant_max) & (offset > 0))
        return offset.masked_fill_(beyond, 0)


@dataclass(frozen=True)
class Ema(Stabilizer):
    """End with a moving average of the parameters (Polyak and Juditsky 1992) over the last stage.

    Without `decay` the weight of step t of the stage's T grows as t^g, which needs no tuning to T: the average is
    m_t = b m_(t-1) + (1 - b) x_t with b = (1 - 1/t)^(g + 1) (Karras et al. 2024, arXiv 2312.02696, Eq. 1 and 2), whose
    mean age is T / (g + 2). With `decay` it is exponential; that of step t is min(decay, (1 + t) / (10 + t)), so that
    the average forgets where the stage began. Options: `span`, the mean age as a share of the stage; `decay`.
    """

    name: ClassVar[str] = "ema"
    span: float = 0.15
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise UsageError(f"{self.name} cannot run with decay={self.decay:g}.", "It is between 0 and 1.")
        if not 0 < self.span <= EVEN_SPAN:
            raise UsageError(f"{self.name} cannot run with span={self.span:g}.", f"It is above 0, {EVEN_SPAN} at most.")

    def kept(self, step: int) -> float:
        """Share of the average that stays when step `step` of the stage, counted from 1, enters it."""
        if self.decay is not None:
            return min(self.decay, (1 + step) / (10 + step))
        growth = 1 / self.span - 2
        return float((1 - 1 / step) ** (growth + 1))

    def bind(self, subjects: Subjects) -> Acting:
        return _Averaging(subjects, self)


class _Averaging(Acting):
    def __init__(self, subjects: Subjects, options: Ema) -> None:
        super().__init__(subjects)
        self.options = options

    def begin(self) -> None:
        self.state = {name: parameter.detach().clone() for name, parameter in self.subjects.parameters.items()}
        self.state["steps"] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        done = int(self.state["steps"].add_(1))
        share = 1 - self.options.kept(done)
        for name, parameter in self.subjects.parameters.items():
            self.state[name].lerp_(parameter.detach(), share)

    @torch.no_grad()
    def finish(self) -> None:
        for name, parameter in self.subjects.parameters.items():
            parameter.copy_(self.state[name])


STABILIZERS: dict[str, type[Stabilizer]] = {item.name: item for item in (Ema, Dampen, FreezeOscillations)}
