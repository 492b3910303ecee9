"""The study's tool: its tables follow from its results, what is done is not done again, missing data is told."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
MODULES = (
    *(
        "arms",
        "data",
        "generator",
        "images",
        "judge",
        "kinds",
        "language_model",
        "metrics",
        "model",
        "runs",
        "sampling",
    ),
    *("sentence_encoder", "study_config", "subject", "summary", "teacher", "texts", "train"),
)
VOCABULARY, LENGTH = 24, 8


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The study's modules, which import one another by their bare names, as its command has them."""
    folders = [str(ROOT / "tools" / "study"), str(ROOT / "examples" / "digits_dit")]
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path[:0] = folders
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module is not None})


def run(arm: str, seed: int, distance: float, **changes: Any) -> dict[str, Any]:
    metrics = {"frechet_teacher": distance, "paired_error": 0.1, "frechet_real": 9.0}
    return {"precision": "W4A8", "arm": arm, "lr": 1e-3, "seed": seed, "sweep": False, "metrics": metrics} | changes


def test_the_tables_follow_from_the_results_alone(study: SimpleNamespace, tmp_path: Path) -> None:
    runs = [run("direct", seed, 2.0 + 0.1 * seed) for seed in (1, 2, 3)]
    runs += [run("fraqat", seed, 1.0 + 0.1 * seed + 0.01 * (seed % 2)) for seed in (1, 2, 3)]
    runs += [run("fraqat", 0, 77.0, sweep=True)]
    folder = tmp_path / "out" / "runs"
    folder.mkdir(parents=True)
    for index, content in enumerate(runs):
        (folder / f"{index}.json").write_text(json.dumps(content))
    study.summary.write_summary(folder.parent, tmp_path / "docs", study.study_config.CONFIGS["smoke"])
    page = (tmp_path / "docs" / "study.md").read_text()
    direct, fraqat = (line for line in page.splitlines() if line.startswith(("| `direct`", "| `fraqat`")))
    assert "2.2 ± 0.25" in direct
    assert "1.21 ± " in fraqat
    assert float(fraqat.split("|")[-2]) < 0.001
    assert fraqat.split("|")[-3].strip().startswith("-45.2 ± ")  # (1.207 - 2.2) / 2.2
    assert "77" not in fraqat
    assert (tmp_path / "docs" / "study" / "smoke.png").stat().st_size > 1000


def test_runs_at_a_rate_that_has_lost_are_left_out(study: SimpleNamespace) -> None:
    swept = [run("fraqat", 0, distance, lr=lr, sweep=True) for lr, distance in ((1e-3, 2.0), (3e-3, 1.0))]
    runs = [run("fraqat", 1, 5.0), run("fraqat", 1, 4.0, lr=3e-3), run("fraqat-ema", 1, 6.0, lr=3e-3)]
    groups = study.summary._groups(swept + runs, study.study_config.CONFIGS["smoke"].kind)
    assert {arm: [run["lr"] for run in of] for (_, arm), of in groups.items()} == {
        "fraqat": [3e-3],
        "fraqat-ema": [3e-3],
    }


def test_the_interval_is_student_s(study: SimpleNamespace) -> None:
    assert study.summary.interval([1.0, 2.0, 3.0]) == "2 ± 2.5"  # t(0.975, 2) = 4.303, s / sqrt(3) = 0.577
    assert study.summary.interval([1.5]) == "1.5"


def test_what_is_done_is_not_done_again(study: SimpleNamespace, tmp_path: Path) -> None:
    key = study.runs.RunKey("W4A8", "direct", 1e-3, 1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{key.name}.json").write_text('{"kept": true}')
    bench = study.runs.Bench(study.study_config.CONFIGS["smoke"], None, tmp_path)
    assert bench.result(key) == {"kept": True}


@pytest.mark.parametrize(
    ("distances", "best"),
    [
        ({6e-5: 3.0, 2e-4: 2.0, 6e-4: 4.0}, 2e-4),
        ({2e-5: 5.0, 6e-5: 3.0, 2e-4: 4.0, 6e-4: 4.0}, 6e-5),
        ({6e-5: 3.0, 2e-4: 2.0, 6e-4: 1.0, 2e-3: 0.5, 6e-3: 0.4}, 6e-3),  # and no further
    ],
)
def test_a_sweep_goes_on_where_its_best_lies_at_an_end(
    study: SimpleNamespace, tmp_path: Path, distances: dict[float, float], best: float
) -> None:
    (tmp_path / "runs").mkdir()
    for (rate, distance), (index, seed) in itertools.product(distances.items(), enumerate(study.runs.SWEEP_SEEDS)):
        name = study.runs.RunKey("W4A8", "direct", rate, seed, sweep=True).name
        noisy = distance + (index - 1) * (6 if rate == best else 3)  # their mean is what counts
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps({"metrics": {"frechet_teacher": noisy}}))
    bench = study.runs.Bench(study.study_config.CONFIGS["cpu"], None, tmp_path)
    assert bench.best_rate("W4A8", "direct") == best


def test_images_are_padded_and_scaled(study: SimpleNamespace, tmp_path: Path) -> None:
    pixels = np.zeros((2, 28, 28), np.uint8)
    pixels[1] = 255
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([3, 9])))
    digits = study.images.load_fashion(tmp_path, "train")
    assert digits.images.shape == (2, 1, 32, 32)
    assert digits.labels.tolist() == [3, 9]
    assert digits.images[1, 0, 2:-2, 2:-2].min() == 1.0
    assert digits.images[1, 0, 0].max() == -1.0


def test_missing_images_are_told_with_the_remedy(study: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(study.subject.MissingDataError, match="dataset-fashion-mnist"):
        study.images.load_fashion(tmp_path, "train")
    with pytest.raises(study.subject.MissingDataError, match="--data"):
        study.images.load_cifar10(tmp_path, "train")


def test_every_arm_is_a_set_of_the_product_s_options(study: SimpleNamespace) -> None:
    from fraqat_compiler.compile_options import make_options
    from fraqat_compiler.schedule import parse_schedule

    for kind, arm in itertools.product(study.kinds.KINDS.values(), study.arms.ARMS.values()):
        for weights, activations in kind.precisions.values():
            widths = {"weights": weights, "activations": activations}
            options = make_options(kind.options(arm) | widths, exported=True)
            parse_schedule(options.schedule, end=float(weights[0]))
    assert set(study.arms.HEADLINE) <= set(study.arms.ARMS)


def test_a_configuration_survives_json(study: SimpleNamespace) -> None:
    for config in study.study_config.CONFIGS.values():
        assert study.study_config.config_of(json.loads(json.dumps(config.to_json()))) == config
    images = study.study_config.CONFIGS["cpu"].to_json()
    del images["subject"]  # as files from before there were texts
    assert study.study_config.config_of(images) == study.study_config.CONFIGS["cpu"]


# Texts


class Causal(nn.Module):
    """A language model so small that its fine-tune takes no time, with one block of causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 16)
        self.project = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        query, key, value = (layer(x) for layer in self.project)
        logits: Tensor = self.lm_head(x + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))
        return logits


class Encoder(Causal):
    """The same as a sentence encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = self.embed_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).mean(1)


def windows(study: SimpleNamespace) -> Any:
    torch.manual_seed(0)
    train, sweep, sotu, moby = (torch.randint(VOCABULARY, (count, LENGTH)) for count in (32, 8, 8, 8))
    return study.texts.Windows(train, sweep, sotu, moby)


TINY = {"batch": 4, "steps": 10, "seeds": 1, "learning_rates": (1e-3,), "length": LENGTH, "windows": 8}


def test_a_language_model_is_tuned_and_measured_by_perplexity(study: SimpleNamespace, tmp_path: Path) -> None:
    config = study.study_config.LanguageConfig(name="tiny-lm", sweep_windows=8, agreement_windows=4, **TINY)
    torch.manual_seed(0)
    bench = study.runs.Bench(config, study.language_model.LanguageModel(config, Causal(), windows(study)), tmp_path)
    real = bench.float_metrics()
    run = bench.result(study.runs.RunKey("W4A8", "auto", 1e-3, 1))
    swept = bench.result(study.runs.RunKey("W4A8", "direct", 1e-3, 0, sweep=True))
    assert set(run["metrics"]) == set(real) == set(config.kind.metrics)
    for name, value in run["metrics"].items():
        assert value == pytest.approx(real[name], rel=0.05)
        assert value != real[name]
    assert run["agreement"]["file"] == pytest.approx(run["agreement"]["torch"], rel=1e-3)
    assert config.kind.swept in swept["metrics"]
    study.summary.write_summary(tmp_path, tmp_path / "docs", config)
    page = (tmp_path / "docs" / "study.md").read_text()
    assert f"| the float model | - | - | {real['perplexity_moby']:.3g} |" in page
    assert "on the first 4 windows: their perplexities are" in page


def test_an_encoder_is_held_against_its_own_float_embeddings(study: SimpleNamespace, tmp_path: Path) -> None:
    config = study.study_config.SentenceConfig(name="tiny-embed", sweep_windows=8, **TINY)
    torch.manual_seed(0)
    subject = study.sentence_encoder.SentenceEncoder(config, Encoder(), windows(study))
    assert subject.measure(subject.teacher) == pytest.approx(subject.float_metrics(), abs=1e-6)
    run = study.runs.Bench(config, subject, tmp_path).result(study.runs.RunKey("W4A8", "rtn", None, 0))
    assert all(0 < run["metrics"][name] < 0.5 for name in config.kind.metrics)


def test_addresses_are_tuned_on_swept_or_measured_on(study: SimpleNamespace, tmp_path: Path) -> None:
    """The text of address n is n, again and again, so that a window tells where it comes from."""
    for number in range(16):
        (tmp_path / f"{1800 + number}_somebody_r.txt").write_text(f"{number} " * 32)
    (tmp_path / "moby-dick").mkdir()
    (tmp_path / "moby-dick" / "data.txt").write_text("99 " * 64)
    config = study.study_config.LanguageConfig(name="tiny", sweep_windows=4, agreement_windows=1, **TINY)
    found = study.texts.load_windows(tmp_path, config, lambda text: [int(word) for word in text.split()], marks=(7, 8))
    assert found.train.shape[1] == LENGTH
    assert (found.moby[:, 0] == 7).all()
    assert (found.moby[:, -1] == 8).all()
    assert (found.moby[:, 1:-1] == 99).all()
    numbers = [set(part[:, 1:-1].flatten().tolist()) for part in (found.sotu, found.sweep, found.train)]
    assert numbers[0] == {0, 8}
    assert numbers[1] == {4, 12}
    assert numbers[2] == set(range(16)) - {0, 4, 8, 12}


def test_missing_texts_and_weights_are_told_with_the_remedy(study: SimpleNamespace, tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        with pytest.raises(study.subject.MissingDataError, match="npm"):
            study.texts.addresses_in(folder)
        with pytest.raises(study.subject.MissingDataError, match="npm"):
            study.texts.novel_in(folder)
    with pytest.raises(study.subject.MissingDataError, match="pip install"):
        study.texts.package_folder("no_such_package", study.language_model.INSTALL)
