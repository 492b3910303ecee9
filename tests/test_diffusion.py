"""Jobs of denoisers: what is drawn follows the process, and a model, data and a process are enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler import Job
from fraqat_compiler.diffusion import Ddpm, FlowMatching, NoiseProcess, denoising_loss, diffusion_job, noised_batches
from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.job import load_job
from fraqat_compiler.siblings import siblings

DIGITS = Path(__file__).parents[1] / "examples" / "digits_dit"


@pytest.mark.parametrize("noise_at", [0, 1])
def test_flow_matching_moves_along_the_velocity_from_noise_to_data(noise_at: int) -> None:
    torch.manual_seed(0)
    clean = torch.randn(64, 3, 4)
    noisy, times, velocity = FlowMatching(noise_at=noise_at, time_scale=1000).noised(clean)  # type: ignore[arg-type]
    left = ((1 - noise_at) - times / 1000).view(-1, 1, 1)
    torch.testing.assert_close(noisy + left * velocity, clean, rtol=1e-4, atol=1e-4)
    assert float(times.min()) >= 0 and float(times.max()) <= 1000


def test_times_are_drawn_as_named() -> None:
    torch.manual_seed(0)
    clean = torch.zeros(20_000, 1)
    uniform, normal, shifted = (
        process.noised(clean)[1]
        for process in (FlowMatching(), FlowMatching(times="logit-normal"), FlowMatching(shift=3.0))
    )
    quarters = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(uniform.quantile(quarters), quarters, rtol=0, atol=0.02)
    torch.testing.assert_close(normal.logit().quantile(quarters), torch.tensor([-0.674, 0, 0.674]), rtol=0, atol=0.04)
    torch.testing.assert_close(shifted.quantile(quarters), 3 * quarters / (1 + 2 * quarters), rtol=0, atol=0.02)


@pytest.mark.parametrize("betas", ["linear", "scaled-linear", "cosine"])
def test_ddpm_keeps_the_variance_and_its_predictions_agree(betas: str) -> None:
    torch.manual_seed(0)
    clean = torch.randn(4000, 8)
    found = []
    for prediction in ("epsilon", "sample", "v"):
        torch.manual_seed(1)
        process = Ddpm(betas=betas, prediction=prediction)  # type: ignore[arg-type]
        found.append(process.noised(clean))
    (noisy, times, noise), (_, _, sample), (_, _, v) = found
    assert float(noisy.var()) == pytest.approx(1, abs=0.03)
    assert torch.equal(sample, clean) and times.dtype == torch.int64
    signal = process.alphas()[times].float()[:, None]
    torch.testing.assert_close(noisy, signal.sqrt() * clean + (1 - signal).sqrt() * noise)
    torch.testing.assert_close(signal.sqrt() * noisy - (1 - signal).sqrt() * v, clean, rtol=1e-4, atol=1e-4)
    alphas = process.alphas()
    assert bool((alphas[1:] < alphas[:-1]).all()) and float(alphas[-1]) < 0.01 < 0.99 < float(alphas[0])


def test_conditions_stay_with_their_batch_and_odd_batches_are_left_out() -> None:
    data = [
        (torch.zeros(4, 2), torch.arange(4)),
        (torch.ones(4, 2), torch.arange(4)),
        (torch.ones(1, 2), torch.ones(1)),
    ]
    batches = list(noised_batches(data, FlowMatching()))
    assert len(batches) == 2
    assert [entry.shape for entry in batches[0]] == [(4, 2), (4,), (4,), (4, 2)]


class Denoiser(nn.Module):
    """Knows the time and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(3, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
        self.lift, self.clock = nn.Linear(8, 16), nn.Linear(1, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.body(self.lift(x) + self.clock(t[:, None].float()) + self.label(y))


def _data() -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(30):
        yield torch.randn(16, 8), torch.randint(3, (16,))


def _job(process: NoiseProcess) -> Job:
    torch.manual_seed(0)
    model = Denoiser().eval()
    return diffusion_job(lambda: model, _data, process)


@pytest.mark.parametrize("process", [FlowMatching(times="logit-normal"), Ddpm(steps=10, prediction="v")], ids=repr)
def test_a_denoiser_compiles_from_model_data_and_process(process: NoiseProcess, tmp_path: Path) -> None:
    options = {"schedule": "8x1,4x2", "loss": "mse,task{weight=0.01}", "lr": 1e-3}
    report = fraqat_compiler.compile(_job(process), output=tmp_path, steps=30, **options).report
    assert report["parity"]["onnx_unoptimized"]["max_lsb"] <= 1
    metrics = report["metrics"]
    assert metrics["quantized"]["denoising_loss"] == pytest.approx(metrics["float"]["denoising_loss"], rel=0.1)


def test_what_is_measured_and_calibrated_on_is_always_the_same() -> None:
    job = _job(FlowMatching())
    assert job.calibration_data is not None
    first, second = list(job.calibration_data()), list(job.calibration_data())
    assert all(
        torch.equal(a, b) for mine, other in zip(first, second, strict=True) for a, b in zip(mine, other, strict=True)
    )
    assert len(first) == 16 and len(first[0]) == 3


def test_the_example_of_digits_is_such_a_job() -> None:
    """Written by hand there, with its own noise: the losses of the trained model agree."""
    job = load_job(str(DIGITS / "job.py"))
    with siblings(DIGITS):
        from data import load

        _, held_out = load()
    clean = [(held_out.images[start : start + 40], held_out.labels[start : start + 40]) for start in range(0, 280, 40)]
    made = diffusion_job(job.model, lambda: clean, FlowMatching(noise_at=0))
    assert job.evaluate is not None and made.evaluate is not None
    model = job.model()
    with torch.no_grad():
        assert made.evaluate(model)["denoising_loss"] == pytest.approx(job.evaluate(model)["loss"], rel=0.15)


def test_empty_data_and_bad_processes_are_refused() -> None:
    job = diffusion_job(Denoiser, list, FlowMatching())
    with pytest.raises(DataError, match="the denoiser's data is empty"):
        job.example_inputs()
    with pytest.raises(UsageError, match="positive shift"):
        FlowMatching(shift=0)
    with pytest.raises(UsageError, match="beta_start"):
        Ddpm(beta_start=0.5, beta_end=0.1)
    with pytest.raises(UsageError, match="scaled-linear"):
        Ddpm(betas="square")  # type: ignore[arg-type]


def test_the_loss_is_of_the_first_output() -> None:
    target = torch.zeros(2, 3)
    assert float(denoising_loss({"sample": torch.ones(2, 3)}, (target, target))) == 1
