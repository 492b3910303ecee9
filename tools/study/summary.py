"""Tables and plots of the study, from the results of its runs alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from arms import ARMS
from PIL import Image
from scipy import stats
from study_config import StudyConfig
from torch import Tensor

mpl.use("Agg")
from matplotlib import pyplot as plt

BASELINE = "direct"
METRICS = {
    "frechet_teacher": "Frechet distance to the teacher's images",
    "paired_error": "error against the teacher's image of the same noise",
    "frechet_real": "Frechet distance to real images",
}
CONFIDENCE = 0.95
SAMPLE_ROWS, SAMPLE_COLUMNS, SAMPLE_ZOOM = 4, 10, 2
RESULTS = "study"  # folder beside study.md with a JSON file and a plot for each configuration

Run = dict[str, Any]
Groups = dict[tuple[str, str], list[Run]]


def write_summary(folder: Path, docs: Path, config: StudyConfig) -> None:
    """Write `docs/study/<config>.json` and its plot from `folder/runs`, then `docs/study.md` from all such files."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    results = docs / RESULTS
    results.mkdir(parents=True, exist_ok=True)
    content = {"config": asdict(config), "runs": runs}
    (results / f"{config.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _plot(_groups(runs), results / f"{config.name}.png")
    parts = [
        _section(json.loads(path.read_text(encoding="utf-8")), _notes(path)) for path in sorted(results.glob("*.json"))
    ]
    (docs / "study.md").write_text("\n".join([_HEAD, *parts]), encoding="utf-8")


def save_samples(images: Tensor, docs: Path, config: StudyConfig) -> None:
    """Write `docs/study/<config>-teacher.png`: the teacher's first images [N, C, H, W], a column for each class."""
    rows = images[: SAMPLE_ROWS * SAMPLE_COLUMNS].clamp(-1, 1).split(SAMPLE_COLUMNS)
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).add(1).mul(127.5).byte()
    (docs / RESULTS).mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(grid.permute(1, 2, 0).squeeze(-1).numpy())
    larger = (picture.width * SAMPLE_ZOOM, picture.height * SAMPLE_ZOOM)
    picture.resize(larger, Image.Resampling.NEAREST).save(docs / RESULTS / f"{config.name}-teacher.png")


_HEAD = """# What fractional bits buy

A class-conditional diffusion transformer, trained in float, is brought to few bits by every arm from the same teacher,
with the same number of steps, the same batches in the same order, and the learning rate of the same sweep that suits
the arm best (measured on noise that no table uses). Every figure is of the exported ONNX file, run by onnxruntime.
Mean with its 95 % interval (Student's t over seeds). Beside `direct`: the difference in percent with its 95 % interval
and p of the paired t-test, seed by seed.

`python tools/study CONFIG` runs it; this page is written from the JSON files in [study/](study/).
"""


def _groups(runs: Sequence[Run]) -> Groups:
    """Runs by precision and arm, the sweep's left out, arms in their own order."""
    groups: Groups = defaultdict(list)
    order = list(ARMS)
    measured = [run for run in runs if not run["sweep"] and run["arm"] in ARMS]
    for run in sorted(measured, key=lambda run: (run["precision"], order.index(run["arm"]), run["seed"])):
        groups[run["precision"], run["arm"]].append(run)
    return groups


def _notes(results: Path) -> list[str]:
    """What somebody wrote about the results, in a Markdown file beside them."""
    notes = results.with_suffix(".md")
    return [notes.read_text(encoding="utf-8").strip(), ""] if notes.is_file() else []


def _section(content: Mapping[str, Any], notes: list[str]) -> str:
    config, groups = StudyConfig(**_tuples(content["config"])), _groups(content["runs"])
    lines = [
        f"## `{config.name}`: {config.dataset}, {config.images:,} images, {config.steps:,} steps",
        "",
        f"DiT of width {config.width}, depth {config.depth}, patch {config.patch_size}; teacher trained for "
        f"{config.teacher_steps:,} batches of {config.teacher_batch}; fine-tune with batches of {config.batch}; "
        f"learning rates {', '.join(f'{rate:g}' for rate in config.learning_rates)}; "
        f"{config.sampling_steps} sampling steps.",
        "",
        *notes,
    ]
    for precision in dict.fromkeys(precision for precision, _ in groups):
        lines += [f"### {precision}", "", *_table(groups, precision), ""]
    lines += _agreement(groups)
    pictures = [f"![{config.name}](study/{config.name}.png)", "", "The teacher's images:", ""]
    return "\n".join([*lines, *pictures, f"![teacher](study/{config.name}-teacher.png)", ""])


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _table(groups: Groups, precision: str) -> list[str]:
    heads = ["arm", "lr", "seeds", *METRICS.values(), f"first distance beside `{BASELINE}`", "p"]
    rows = [
        _row(arm, runs, groups.get((precision, BASELINE), []))
        for (its_precision, arm), runs in groups.items()
        if its_precision == precision
    ]
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _row(arm: str, runs: list[Run], baseline: list[Run]) -> list[str]:
    rate = "-" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}"
    figures = [interval([run["metrics"][metric] for run in runs]) for metric in METRICS]
    return [f"`{arm}`: {ARMS[arm].says}", rate, str(len(runs)), *figures, *_beside(runs, baseline)]


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval, to three digits."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3g}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return f"{mean:.3g} ± {half:.2g}"


def _beside(runs: list[Run], baseline: list[Run]) -> tuple[str, str]:
    """Difference of the distance to the teacher in percent of the baseline's with its interval, and p; seed by seed."""
    theirs = {run["seed"]: run["metrics"]["frechet_teacher"] for run in baseline}
    pairs = [
        (run["metrics"]["frechet_teacher"], theirs[run["seed"]])
        for run in runs
        if run["seed"] in theirs and run["arm"] != BASELINE
    ]
    if len(pairs) < 2:
        return "-", "-"
    mine, others = map(np.asarray, zip(*pairs, strict=True))
    percent = interval(100 * (mine - others) / others.mean())
    return f"{percent} %", f"{stats.ttest_rel(mine, others).pvalue:.2g}"


def _agreement(groups: Groups) -> list[str]:
    """One line about the file and the graph it was made of, drawing the same images."""
    pairs = [run["agreement"] for runs in groups.values() for run in runs if "agreement" in run]
    if not pairs:
        return []
    apart = [abs(pair["file"] - pair["torch"]) / pair["torch"] for pair in pairs]
    return [
        f"The file in onnxruntime and the fake-quantized graph in torch, on the first {pairs[0]['images']} images: "
        f"their paired errors are {100 * float(np.median(apart)):.1f} % apart in the median of {len(apart)} runs, "
        f"{100 * max(apart):.1f} % at most.",
        "",
    ]


def _plot(groups: Groups, path: Path) -> None:
    """A dot for each run and a bar for each mean: distance to the teacher by arm, one panel for each precision."""
    precisions = list(dict.fromkeys(precision for precision, _ in groups)) or ["no results yet"]
    figure, panels = plt.subplots(1, len(precisions), figsize=(5.5 * len(precisions), 3.6), squeeze=False)
    for precision, panel in zip(precisions, panels[0], strict=True):
        arms = [arm for its_precision, arm in groups if its_precision == precision]
        for index, arm in enumerate(arms):
            values = [run["metrics"]["frechet_teacher"] for run in groups[precision, arm]]
            panel.barh(index, np.mean(values), color="#c9c4f2")
            panel.plot(values, [index] * len(values), "o", color="#4f46b5", markersize=4)
        panel.set_yticks(range(len(arms)), arms)
        panel.invert_yaxis()
        panel.set_xlabel(METRICS["frechet_teacher"])
        panel.set_title(precision)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
