"""The study's tool: its tables follow from its results, what is done is not done again, missing data is told."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MODULES = ("arms", "data", "images", "judge", "metrics", "model", "runs", "sampling", "study_config", "summary")


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


def test_the_interval_is_student_s(study: SimpleNamespace) -> None:
    assert study.summary.interval([1.0, 2.0, 3.0]) == "2 ± 2.5"  # t(0.975, 2) = 4.303, s / sqrt(3) = 0.577
    assert study.summary.interval([1.5]) == "1.5"


def test_what_is_done_is_not_done_again(study: SimpleNamespace, tmp_path: Path) -> None:
    key = study.runs.RunKey("W4A8", "direct", 1e-3, 1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{key.name}.json").write_text('{"kept": true}')
    bench = study.runs.Bench(study.study_config.CONFIGS["smoke"], None, None, None, None, tmp_path)
    assert bench.result(key) == {"kept": True}


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
    with pytest.raises(study.images.MissingDataError, match="dataset-fashion-mnist"):
        study.images.load_fashion(tmp_path, "train")
    with pytest.raises(study.images.MissingDataError, match="--data"):
        study.images.load_cifar10(tmp_path, "train")


def test_every_arm_is_a_set_of_the_product_s_options(study: SimpleNamespace) -> None:
    from fraqat_compiler.compile_options import make_options
    from fraqat_compiler.schedule import parse_schedule

    for arm in study.arms.ARMS.values():
        options = make_options(study.arms.PLAIN | arm.options, exported=True)
        parse_schedule(options.schedule, end=4.0)
    assert set(study.arms.HEADLINE) <= set(study.arms.ARMS)
