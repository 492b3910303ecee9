"""Tables and plots of the study, from the results of its runs alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from arms import ARMS
from kinds import Kind
from PIL import Image
from scipy import stats
from study_config import StudyConfig, config_of
from torch import Tensor

mpl.use("Agg")
from matplotlib import pyplot as plt

BASELINE = "direct"
CONFIDENCE = 0.95
ROW_HEIGHT = 0.24  # inches of an arm in a plot
SAMPLE_ROWS, SAMPLE_COLUMNS, SAMPLE_ZOOM = 4, 10, 2
RESULTS = "study"  # folder beside study.md with a JSON file and a plot for each configuration

Run = dict[str, Any]
Groups = dict[tuple[str, str], list[Run]]


def write_summary(folder: Path, docs: Path, config: StudyConfig) -> None:
    """Write `docs/study/<config>.json` and its plot from `folder/runs`, then the page."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    results = docs / RESULTS
    results.mkdir(parents=True, exist_ok=True)
    content = {"config": config.to_json(), "runs": runs}
    if (folder / "float.json").is_file():
        content["float"] = json.loads((folder / "float.json").read_text(encoding="utf-8"))
    (results / f"{config.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _plot(_groups(runs, config.kind), config.kind, results / f"{config.name}.png")
    write_page(docs)


def write_page(docs: Path) -> None:
    """Write `docs/study.md` from the results and notes in `docs/study`."""
    parts = [_section(path) for path in sorted((docs / RESULTS).glob("*.json"))]
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

A float model, the teacher, is brought to few bits by every arm, with the same number of steps, the same batches in the
same order, and the learning rate of the same sweep that suits the arm best (measured on noise or text that no table
uses). Every figure is of the exported ONNX file, run by onnxruntime. Mean with its 95 % interval (Student's t over
seeds). Beside `direct`, and beside the float model: the difference of the first metric in percent, with its 95 %
interval and p of the paired t-test, seed by seed.

`python tools/study CONFIG` runs it; this page is written from the JSON files in [study/](study/).
"""


def _best_rates(runs: Sequence[Run], kind: Kind) -> dict[tuple[str, str], float]:
    """The learning rate that won the sweep, by precision and the arm that was swept."""
    swept: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["sweep"]:
            swept[run["precision"], run["arm"]][run["lr"]].append(run["metrics"][kind.swept])
    return {key: min(of, key=lambda rate: statistics.fmean(of[rate])) for key, of in swept.items()}


def _groups(runs: Sequence[Run], kind: Kind) -> Groups:
    """Runs by precision and arm, each in its own order; without the sweep's and those at a rate that has lost since."""
    groups: Groups = defaultdict(list)
    arms, precisions = list(ARMS), list(kind.precisions)
    best = _best_rates(runs, kind)

    def counts(run: Run) -> bool:
        if run["sweep"] or run["arm"] not in arms:
            return False
        swept = ARMS[run["arm"]].rate_of or run["arm"]
        return run["lr"] in (None, best.get((run["precision"], swept), run["lr"]))

    def rank(run: Run) -> tuple[int, int, int]:
        return precisions.index(run["precision"]), arms.index(run["arm"]), run["seed"]

    for run in sorted(filter(counts, runs), key=rank):
        groups[run["precision"], run["arm"]].append(run)
    return groups


def _notes(results: Path) -> list[str]:
    """What somebody wrote about the results, in a Markdown file beside them."""
    notes = results.with_suffix(".md")
    return [notes.read_text(encoding="utf-8").strip(), ""] if notes.is_file() else []


def _section(results: Path) -> str:
    content = json.loads(results.read_text(encoding="utf-8"))
    config = config_of(content["config"])
    groups = _groups(content["runs"], config.kind)
    lines = [f"## `{config.name}`: {config.title}", "", config.description, "", *_notes(results)]
    for precision in dict.fromkeys(precision for precision, _ in groups):
        note = config.kind.notes.get(precision)
        lines += [f"### {precision}", "", *([note, ""] if note else [])]
        lines += [*_table(groups, precision, config.kind, content.get("float")), ""]
    lines += [*_agreement(groups, config.kind), f"![{config.name}](study/{config.name}.png)", ""]
    if results.with_name(f"{config.name}-teacher.png").is_file():
        lines += ["The teacher's images:", "", f"![teacher](study/{config.name}-teacher.png)", ""]
    return "\n".join(lines)


def _table(groups: Groups, precision: str, kind: Kind, teacher: Mapping[str, float] | None) -> list[str]:
    baseline = groups.get((precision, BASELINE), [])
    goal = teacher[kind.first] if teacher else 0.0
    heads = [
        "arm",
        "lr",
        "seeds",
        *kind.metrics.values(),
        *(["beside float"] if goal else []),
        f"beside `{BASELINE}`",
        "p",
    ]
    rows = [heads, ["---"] * len(heads)]
    if goal and teacher:
        figures = [f"{teacher[metric]:.3g}" for metric in kind.metrics]
        rows.append(["the float model", "-", "-", *figures, "-", "-", "-"])
    for (its_precision, arm), runs in groups.items():
        if its_precision == precision:
            rows.append(_row(arm, runs, baseline, kind, goal))
    return ["| " + " | ".join(row) + " |" for row in rows]


def _row(arm: str, runs: list[Run], baseline: list[Run], kind: Kind, goal: float) -> list[str]:
    rate = "-" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}"
    figures = [interval([run["metrics"][metric] for run in runs]) for metric in kind.metrics]
    above = [f"{100 * (np.mean([run['metrics'][kind.first] for run in runs]) / goal - 1):+.3g} %"] if goal else []
    beside = _beside(runs, baseline, kind.first)
    return [f"`{arm}`: {ARMS[arm].says}", rate, str(len(runs)), *figures, *above, *beside]


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval, to three digits."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3g}"
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return f"{mean:.3g} ± {half:.2g}"


def _beside(runs: list[Run], baseline: list[Run], metric: str) -> tuple[str, str]:
    """Difference of a metric in percent of the baseline's with its interval, and p; seed by seed."""
    theirs = {run["seed"]: run["metrics"][metric] for run in baseline}
    pairs = [
        (run["metrics"][metric], theirs[run["seed"]])
        for run in runs
        if run["seed"] in theirs and run["arm"] != BASELINE
    ]
    if not pairs:
        return "-", "-"
    mine, others = map(np.asarray, zip(*pairs, strict=True))
    percent = interval(100 * (mine - others) / others.mean())
    return f"{percent} %", f"{stats.ttest_rel(mine, others).pvalue:.2g}" if len(pairs) > 1 else "-"


def _agreement(groups: Groups, kind: Kind) -> list[str]:
    """One line about the file and the graph it was made of, measured on the same."""
    pairs = [run["agreement"] for runs in groups.values() for run in runs if "agreement" in run]
    if not pairs:
        return []
    apart = [abs(pair["file"] - pair["torch"]) / pair["torch"] for pair in pairs]
    count = pairs[0][kind.unit]
    return [
        f"The file in onnxruntime and the fake-quantized graph in torch, on the first {count} {kind.unit}: "
        f"their {kind.agrees} are {100 * float(np.median(apart)):.1f} % apart in the median of {len(apart)} runs, "
        f"{100 * max(apart):.1f} % at most.",
        "",
    ]


def _plot(groups: Groups, kind: Kind, path: Path) -> None:
    """A dot for each run and a bar for each mean: the first metric by arm, one panel for each precision."""
    precisions = list(dict.fromkeys(precision for precision, _ in groups)) or ["no results yet"]
    rows = max((sum(of == precision for of, _ in groups) for precision in precisions), default=0)
    size = (5.5 * len(precisions), max(3.6, ROW_HEIGHT * rows))
    figure, panels = plt.subplots(1, len(precisions), figsize=size, squeeze=False)
    for precision, panel in zip(precisions, panels[0], strict=True):
        arms = [arm for its_precision, arm in groups if its_precision == precision]
        for index, arm in enumerate(arms):
            values = [run["metrics"][kind.first] for run in groups[precision, arm]]
            panel.barh(index, np.mean(values), color="#c9c4f2")
            panel.plot(values, [index] * len(values), "o", color="#4f46b5", markersize=4)
        panel.set_yticks(range(len(arms)), arms)
        panel.invert_yaxis()
        panel.set_xlabel(kind.metrics[kind.first])
        panel.set_title(precision)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
