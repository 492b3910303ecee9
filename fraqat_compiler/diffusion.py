"""Jobs of denoisers: a model, clean data and its noise process are all that a fine-tune needs.

Timesteps and noise are drawn as in the denoiser's own training, anew for every batch, and the noisy input is a part of
the batch: teacher and student see the same one. The example inputs, the calibration data, the loss `task` (the
denoiser's own) and a metric come with it:

    job = diffusion_job(load_model, clean_images, FlowMatching(times="logit-normal"), name="sana")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.job import Job

CALIBRATION_SEED, HELD_OUT_SEED = 1, 2


class NoiseProcess(Protocol):
    """How clean data becomes a denoiser's input and what it should predict."""

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy input, timesteps (B,), what to predict) for clean data (B, ...), drawn from torch's random numbers."""
        ...


@dataclass(frozen=True)
class FlowMatching:
    """Straight paths from data to noise: x_t = (1 - t) x + t e, and the model predicts the velocity e - x.

    Flow matching (Lipman et al. 2023, arXiv 2210.02747), as rectified flow (Liu et al. 2023, arXiv 2209.03003).

    Attributes:
        times: "uniform" in [0, 1], or "logit-normal", the sigmoid of a normal number (Esser et al. 2024, arXiv
            2403.03206).
        shift: of times towards noise, t' = s t / (1 + (s - 1) t), as Esser et al. do at large images.
        time_scale: the model is given t times this; diffusers' models want 1000.
        noise_at: the time that is pure noise, 1 or 0: at 0 paths are x_t = (1 - t) e + t x and the velocity is x - e.

    Raises:
        UsageError: a shift or scale that is not positive.
    """

    times: Literal["uniform", "logit-normal"] = "uniform"
    shift: float = 1.0
    time_scale: float = 1.0
    noise_at: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        if not (0 < self.shift < math.inf and 0 < self.time_scale < math.inf):
            raise UsageError("flow matching needs a positive shift and time_scale.")
        if self.times not in ("uniform", "logit-normal") or self.noise_at not in (0, 1):
            raise UsageError("flow matching takes times uniform or logit-normal, and noise_at 0 or 1.")

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = clean.shape[0]
        times = torch.rand(count) if self.times == "uniform" else torch.randn(count).sigmoid()
        times = self.shift * times / (1 + (self.shift - 1) * times)
        noise, share = torch.randn_like(clean), _over(times, clean)
        noisy = (1 - share) * clean + share * noise
        if self.noise_at == 1:
            return noisy, times * self.time_scale, noise - clean
        return noisy, (1 - times) * self.time_scale, clean - noise


@dataclass(frozen=True)
class Ddpm:
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) e with a_t the product of 1 - beta up to t: DDPM (Ho et al. 2020, 2006.11239).

    Attributes:
        steps: timesteps are whole numbers from 0 to steps - 1, all equally likely.
        betas: "linear" from beta_start to beta_end; "scaled-linear", linear in the square root (latent diffusion,
            arXiv 2112.10752); "cosine" (Nichol and Dhariwal 2021, arXiv 2102.09672), which takes no ends.
        beta_start, beta_end: of the first and the last step.
        prediction: the noise "epsilon", the clean "sample", or "v" = sqrt(a) e - sqrt(1 - a) x (arXiv 2202.00512).
        integer_times: timesteps as int64, else as float32.

    Raises:
        UsageError: numbers that make no noise schedule.
    """

    steps: int = 1000
    betas: Literal["linear", "scaled-linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    prediction: Literal["epsilon", "sample", "v"] = "epsilon"
    integer_times: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError("a DDPM needs at least one step and 0 < beta_start <= beta_end < 1.")
        if self.betas not in _BETAS or self.prediction not in _TARGETS:
            raise UsageError(f"a DDPM takes betas {', '.join(_BETAS)} and prediction {', '.join(_TARGETS)}.")

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        times, noise = torch.randint(self.steps, (clean.shape[0],)), torch.randn_like(clean)
        signal = _over(self.alphas()[times].to(clean.dtype), clean)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        target = _TARGETS[self.prediction](clean, noise, signal)
        return noisy, times if self.integer_times else times.float(), target

    def alphas(self) -> Tensor:
        """Share of the signal's variance at each timestep, (steps,), float64."""
        return torch.cumprod(1 - _BETAS[self.betas](self), 0)


def _linear(process: Ddpm) -> Tensor:
    return torch.linspace(process.beta_start, process.beta_end, process.steps, dtype=torch.float64)


def _scaled_linear(process: Ddpm) -> Tensor:
    ends = process.beta_start**0.5, process.beta_end**0.5
    return torch.linspace(*ends, process.steps, dtype=torch.float64).square()


def _cosine(process: Ddpm) -> Tensor:
    """Eq. 17 of arXiv 2102.09672, with its offset 0.008 and its limit 0.999."""
    times = torch.linspace(0, 1, process.steps + 1, dtype=torch.float64)
    signal = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


_BETAS = {"linear": _linear, "scaled-linear": _scaled_linear, "cosine": _cosine}
_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda clean, noise, signal: noise,
    "sample": lambda clean, noise, signal: clean,
    "v": lambda clean, noise, signal: signal.sqrt() * noise - (1 - signal).sqrt() * clean,
}


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def noised_batches(data: Iterable[Any], process: NoiseProcess) -> Iterator[tuple[Tensor, ...]]:
    """Batches (noisy, timesteps, *conditions, target) from clean ones.

    Args:
        data: clean tensors (B, ...), or tuples of one and what the model is conditioned on (labels, text embeddings).
            A graph has fixed shapes: batches of another shape than the first, as the last of an epoch, are left out.
        process: how they get noisy.
    """
    shape = None
    for batch in data:
        clean, *conditions = (batch,) if isinstance(batch, Tensor) else batch
        shape = shape or clean.shape
        if clean.shape == shape:
            noisy, times, target = process.noised(clean)
            yield noisy, times, *conditions, target


class _NoisedData:
    """Noised batches of clean data, drawn anew in every pass."""

    def __init__(self, data: Iterable[Any], process: NoiseProcess) -> None:
        self.data, self.process = data, process

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return noised_batches(self.data, self.process)


class _SizedNoisedData(_NoisedData):
    """The same of data that tells its length, so that a budget can be given in epochs."""

    def __len__(self) -> int:
        assert isinstance(self.data, Sized)
        return len(self.data)


def denoising_loss(outputs: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error of a denoiser's prediction (its first output) against the target, a batch's last entry."""
    return F.mse_loss(pytree.tree_leaves(outputs)[0], batch[-1])


def diffusion_job(
    model: Callable[[], nn.Module],
    data: Callable[[], Iterable[Any]],
    process: NoiseProcess,
    *,
    name: str = "denoiser",
    calibration_batches: int = 16,
    held_out: Callable[[], Iterable[Any]] | None = None,
    **functions: Any,
) -> Job:
    """A job from a denoiser that is called as model(noisy, timesteps, *conditions).

    Args:
        model: gives the trained denoiser.
        data: gives a fresh iterable of clean batches at each call, see `noised_batches`. What conditions are dropped
            for classifier-free guidance is up to it.
        process: the noise process that the denoiser was trained with.
        name: of the model.
        calibration_batches: noisy batches for the activation ranges, over all timesteps.
        held_out: clean batches for the metric `denoising_loss`; None measures on the calibration's.
        functions: further functions of the job, by name; they replace the ones made here.

    Raises:
        DataError: when the job is used: the data is empty.
    """

    def inputs(source: Callable[[], Iterable[Any]], seed: int) -> list[tuple[Tensor, ...]]:
        """The first batches, noised always alike."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            batches = noised_batches(source(), process)
            found = [batch for batch, _ in zip(batches, range(calibration_batches), strict=False)]
        if not found:
            raise DataError("the denoiser's data is empty.", "Let data() yield at least one batch.")
        return found

    def train() -> _NoisedData:
        clean = data()
        return (_SizedNoisedData if isinstance(clean, Sized) else _NoisedData)(clean, process)

    def evaluate(run: Callable[..., Any]) -> dict[str, float]:
        batches = inputs(held_out or data, HELD_OUT_SEED)
        losses = [float(denoising_loss(run(*batch[:-1]), batch)) for batch in batches]
        return {"denoising_loss": sum(losses) / len(losses)}

    parts: dict[str, Any] = {
        "example_inputs": lambda: inputs(data, CALIBRATION_SEED)[0][:-1],
        "calibration_data": lambda: [batch[:-1] for batch in inputs(data, CALIBRATION_SEED)],
        "train_data": train,
        "loss": denoising_loss,
        "evaluate": evaluate,
    }
    return Job(name, model, **(parts | functions))
