"""Observers: what a tensor's values were during calibration, and the range that follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fraqat_compiler.errors import DataError
from fraqat_compiler.quant_spec import QuantSpec, RangeMethod
from fraqat_compiler.quantizer import quantization_parameters

HISTOGRAM_BINS = 4096
PERCENTILE = 99.99
SIGMAS = 3.0
MSE_CANDIDATES = 64


class Observer(ABC):
    """Accumulates statistics of one tensor over batches, in memory that does not grow."""

    def __init__(self) -> None:
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))

    def observe(self, values: Tensor) -> None:
        """Take in one batch.

        Raises:
            DataError: a value is NaN or infinite.
        """
        values = values.detach()
        low, high = values.amin(), values.amax()  # each is many times faster than torch.aminmax on a CPU
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise DataError("calibration met NaN or infinite values.", "Check the model's weights and the data.")
        self._update(values.float(), low.float().cpu(), high.float().cpu())
        self.low = torch.minimum(self.low, low.float().cpu())
        self.high = torch.maximum(self.high, high.float().cpu())

    @property
    def seen(self) -> bool:
        return bool(self.high >= self.low)

    def _update(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in finite values, before `low` and `high` of the observer include them."""

    @abstractmethod
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range (low, high) to quantize, scalars."""


class MinMaxObserver(Observer):
    """The least and the greatest value seen."""

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class SigmaObserver(Observer):
    """mean +- 3 standard deviations, inside what was seen: the static ranges of FraQAT's phone build (section 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    def _update(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Chan's parallel update of mean and sum of squared deviations (1983)."""
        count = values.numel()
        mean = float(values.double().mean())
        squares = float((values.double() - mean).square().sum())
        total = self.count + count
        delta = mean - self.mean
        self.squares += squares + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        deviation = (self.squares / max(self.count, 1)) ** 0.5
        low = torch.tensor(self.mean - SIGMAS * deviation).clamp(min=self.low)
        high = torch.tensor(self.mean + SIGMAS * deviation).clamp(max=self.high)
        return low, high


class HistogramObserver(Observer):
    """A histogram whose bins widen when a batch goes past them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)

    def _update(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        new_low, new_high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if self.seen and (new_low < self.low or new_high > self.high):
            self._widen(float(new_low), float(new_high))
        if new_high > new_low:
            self.counts += torch.histc(values.cpu(), HISTOGRAM_BINS, float(new_low), float(new_high)).double()
        else:
            self.counts[0] += values.numel()

    def _widen(self, low: float, high: float) -> None:
        """Move the counts into bins over [low, high], by bin centres."""
        index = ((self.centres() - low) / (high - low) * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts)

    def centres(self) -> Tensor:
        """Middle of each bin, shape (HISTOGRAM_BINS,), float64."""
        width = (self.high.double() - self.low.double()) / HISTOGRAM_BINS
        return self.low.double() + (torch.arange(HISTOGRAM_BINS, dtype=torch.float64) + 0.5) * width


class PercentileObserver(HistogramObserver):
    """The central 99.99 % of the values."""

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        share = self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - PERCENTILE / 100) / 2
        low = self.centres()[torch.searchsorted(share, tail).clamp(max=HISTOGRAM_BINS - 1)]
        high = self.centres()[torch.searchsorted(share, 1 - tail).clamp(max=HISTOGRAM_BINS - 1)]
        return low.float(), high.float()


class MSEObserver(HistogramObserver):
    """The shrunken min-max range whose fake quant has the least squared error over the histogram."""

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        centres = self.centres().float()
        best, least = (self.low, self.high), float("inf")
        for step in range(MSE_CANDIDATES):
            ratio = 1 - step / MSE_CANDIDATES
            candidate = (self.low * ratio, self.high * ratio)
            error = float((self._rounded(centres, candidate, spec) - centres).double().square() @ self.counts)
            if error < least:
                best, least = candidate, error
        return best

    @staticmethod
    def _rounded(centres: Tensor, candidate: tuple[Tensor, Tensor], spec: QuantSpec) -> Tensor:
        scale, zero_point = quantization_parameters(*candidate, spec)
        codes = (torch.round(centres / scale) + zero_point).clamp(spec.quant_min, spec.quant_max)
        return (codes - zero_point) * scale


OBSERVERS: dict[RangeMethod, type[Observer]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "sigma3": SigmaObserver,
}
