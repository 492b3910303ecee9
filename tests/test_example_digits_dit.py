"""The digits DiT: the example that `make demo` compiles."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "examples" / "digits_dit"
MODULES = ("model", "data", "sampling", "metrics", "train", "job", "show")
LARGEST_RANK = 5  # what the HTP takes


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, imported as its scripts import each other, and gone from sys.modules afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in MODULES:
            sys.modules.pop(name, None)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(example: SimpleNamespace) -> torch.nn.Module:
    model: torch.nn.Module = example.job.model()
    return model


@pytest.fixture(scope="module")
def figures(example: SimpleNamespace, trained: torch.nn.Module) -> dict[str, float]:
    torch.set_num_threads(1)
    result: dict[str, float] = example.job.evaluate(trained)
    return result


# The model


def test_model_has_about_a_million_parameters_and_a_small_file(trained: torch.nn.Module) -> None:
    assert 1.0e6 < sum(parameter.numel() for parameter in trained.parameters()) < 1.5e6
    assert (FOLDER / "weights.safetensors").stat().st_size <= 8e6


def test_weights_are_the_float32_state_of_the_model(example: SimpleNamespace) -> None:
    weights = load_file(FOLDER / "weights.safetensors")
    example.model.DiT().load_state_dict(weights, strict=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_untrained_model_predicts_zero(example: SimpleNamespace) -> None:
    """adaLN-zero: every block starts as the identity, and the output layer at zero."""
    inputs = example.job.example_inputs()
    velocity = example.model.DiT()(*inputs)
    assert velocity.shape == inputs[0].shape
    assert torch.count_nonzero(velocity) == 0


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16)])
def test_unpatchify_puts_each_patch_in_its_place(example: SimpleNamespace, channels: int, size: int) -> None:
    image = torch.arange(2.0 * channels * size * size).view(2, channels, size, size)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, -1, 4 * channels)
    model = example.model.DiT(image_size=size, channels=channels)
    assert torch.equal(model._unpatchify(patches), image)


def test_weights_are_the_trained_ones(example: SimpleNamespace, trained: torch.nn.Module) -> None:
    _, held_out = example.data.load()
    assert example.train.held_out_loss(trained, held_out) == pytest.approx(_readme_figure("held-out loss"), abs=2e-3)


def test_model_heeds_time_and_class(example: SimpleNamespace, trained: torch.nn.Module) -> None:
    x, t, y = example.job.example_inputs()
    with torch.no_grad():
        velocity = trained(x, t, y)
        assert not torch.allclose(velocity, trained(x, 1 - t, y), atol=0.1)
        assert not torch.allclose(velocity, trained(x, t, (y + 1) % 10), atol=0.1)


def test_export_equals_eager_and_stays_within_five_dimensions(
    example: SimpleNamespace, trained: torch.nn.Module
) -> None:
    inputs = example.job.example_inputs()
    exported = torch.export.export(trained, inputs).run_decompositions({}).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(*inputs), trained(*inputs), rtol=1e-5, atol=1e-5)
    values = [node.meta["val"] for node in exported.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert values
    assert max(value.dim() for value in values) <= LARGEST_RANK


# The data


def test_held_out_digits_are_not_trained_on(example: SimpleNamespace) -> None:
    digits, held_out = example.data.load()
    assert (len(digits.labels), len(held_out.labels)) == (1497, 300)
    assert digits.images.min() == -1 and digits.images.max() == 1
    distances = torch.cdist(held_out.images.flatten(1), digits.images.flatten(1))
    assert distances.min() > 0


def test_velocity_leads_from_the_noised_digit_to_the_digit(example: SimpleNamespace) -> None:
    digits, _ = example.data.load()
    batch = example.data.noise_digits(digits, torch.Generator().manual_seed(0))
    remaining = (1 - batch.t)[:, None, None, None]
    torch.testing.assert_close(batch.x + remaining * batch.velocity, digits.images, rtol=0, atol=1e-5)


def test_training_batches_follow_their_seed(example: SimpleNamespace) -> None:
    first, again, other = (next(example.job.train_data(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_some_training_labels_are_the_null_class(example: SimpleNamespace) -> None:
    digits, _ = example.data.load()
    labels = next(example.data.training_batches(digits, 4000, seed=0)).y
    share = (labels == example.model.NULL_CLASS).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.02)


# Sampling


def test_sampler_is_deterministic_and_follows_its_seed(example: SimpleNamespace, trained: torch.nn.Module) -> None:
    labels = torch.arange(10)
    first, again, other = (example.sampling.sample(trained, labels, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_euler_follows_a_straight_flow_exactly(example: SimpleNamespace) -> None:
    def towards_half(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (0.5 - x) / (1 - t)[:, None, None, None]

    drawn = example.sampling.sample(towards_half, torch.zeros(4, dtype=torch.int64), steps=7)
    torch.testing.assert_close(drawn, torch.full((4, 1, 8, 8), 0.5))


def test_guidance_goes_from_the_null_class_past_the_class(example: SimpleNamespace) -> None:
    def drift(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y == example.model.NULL_CLASS, 0.1, 0.3)[:, None, None, None].expand_as(x)

    labels = torch.zeros(2, dtype=torch.int64)
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    guided = example.sampling._guided_velocity(drift, x, t, labels, 2.0)
    torch.testing.assert_close(guided, torch.full_like(x, 0.5))


def test_image_grid_keeps_every_pixel(example: SimpleNamespace, tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    picture = example.sampling.image_grid(images, columns=2, zoom=1)
    assert (picture.shape, picture.dtype) == ((19, 19), np.uint8)
    third = ((images[2, 0] + 1) * 127.5).round().numpy()
    assert np.array_equal(picture[10:18, 1:9], third)
    example.sampling.save_png(picture, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), picture)


# The metrics


def test_frechet_distance_of_known_gaussians(example: SimpleNamespace) -> None:
    """Same shape, moved by 3: 9. Same mean, spread 2 for 1 in each of two dimensions: 2."""
    points = np.random.default_rng(0).standard_normal((50_000, 2))
    assert example.metrics.frechet_distance(points, points + np.array([3, 0])) == pytest.approx(9, rel=1e-6)
    assert example.metrics.frechet_distance(points, points * 2) == pytest.approx(2, rel=0.02)


def test_float_model_draws_digits_as_good_as_real_ones(figures: dict[str, float], example: SimpleNamespace) -> None:
    real = example.show.real_figures()
    assert figures["accuracy"] >= 0.95
    assert figures["frechet_distance"] < 1.2 * real["frechet_distance"]
    assert figures["paired_error"] == 0


def test_evaluate_sees_a_worse_model(figures: dict[str, float], example: SimpleNamespace) -> None:
    coarse = example.job.model()
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    worse = example.job.evaluate(coarse)
    assert worse["loss"] > figures["loss"]
    assert worse["accuracy"] < figures["accuracy"]
    assert worse["frechet_distance"] > figures["frechet_distance"]
    assert worse["paired_error"] > 0.1


# The job


def test_job_data_fits_its_example_inputs(example: SimpleNamespace) -> None:
    expected = [(tensor.shape, tensor.dtype) for tensor in example.job.example_inputs()]
    batches = [*example.job.calibration_data(), next(example.job.train_data())]
    assert len(batches) == 17
    for batch in batches:
        assert [(tensor.shape, tensor.dtype) for tensor in batch] == expected


def test_calibration_data_is_the_same_on_every_call(example: SimpleNamespace) -> None:
    first, second = example.job.calibration_data(), example.job.calibration_data()
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def test_samples_are_the_committed_picture(example: SimpleNamespace, trained: torch.nn.Module) -> None:
    drawn = example.job.samples(trained)
    committed = np.asarray(Image.open(FOLDER / "samples.png"))
    assert (drawn.shape, drawn.dtype) == (committed.shape, np.uint8)
    assert np.abs(drawn.astype(int) - committed).mean() < 1


def test_readme_figures_are_those_of_the_committed_weights(figures: dict[str, float], example: SimpleNamespace) -> None:
    text = (FOLDER / "README.md").read_text()
    block = re.search(r"```json\n(.*?)```", text, flags=re.DOTALL)
    assert block
    stated = json.loads(block[1])
    assert stated["float"] == pytest.approx(figures, rel=0.02)
    assert stated["real"] == pytest.approx(example.show.real_figures(), rel=0.02)


def _readme_figure(name: str) -> float:
    match = re.search(rf"{name} is (\d\.\d+)", (FOLDER / "README.md").read_text())
    assert match, f"README.md states no {name}"
    return float(match[1])


# The training script


def test_training_script_writes_weights_that_load(example: SimpleNamespace, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    command = [sys.executable, FOLDER / "train.py", "--steps", "2", "--seed", "3", "--output", weights]
    subprocess.run(command, check=True, capture_output=True)
    model = example.model.DiT()
    model.load_state_dict(load_file(weights), strict=True)
    assert torch.count_nonzero(model.proj_out.bias) > 0


def test_training_lowers_the_loss(example: SimpleNamespace) -> None:
    digits, _ = example.data.load()
    batch = next(example.data.training_batches(digits, 64, seed=0))
    trainer = example.train.Trainer(example.model.DiT(), steps=100)
    losses = [trainer.step(batch) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_training_script_refuses_no_steps(
    example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        example.train.main()
    assert "not a positive number" in capsys.readouterr().err
