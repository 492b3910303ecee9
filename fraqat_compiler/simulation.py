"""Simulation: a model quantized and fine-tuned as in a compile, measured in torch, with no file at its end.

So it may do what no file can hold: fractional end widths, weights or activations of any width, ranges per token.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler.compile_options import make_options
from fraqat_compiler.job import Job
from fraqat_compiler.layers import parameter_counts
from fraqat_compiler.output_folder import SIMULATION_FILE, OutputFolder
from fraqat_compiler.progress import Progress
from fraqat_compiler.registry import parse_target
from fraqat_compiler.tuning import Tuned, Tuning, job_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation left.

    Attributes:
        output: the folder.
        student: the graph with fake quants, called like the model.
        teacher: the float graph.
        report: the content of simulation.json.
    """

    output: Path
    student: GraphModule
    teacher: GraphModule
    report: dict[str, Any]


def simulate(
    job: Job | nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    output: str | Path,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SimulationResult:
    """Quantize and fine-tune a model, and measure it in torch.

    Args:
        job, example_inputs, output, resume, progress, options: as those of `compile`; the target says what is
            quantized and how, and is not asked to compile. `output` gets simulation.json and the checkpoints.

    Raises:
        FraqatError: of a kind that says what is wrong.
    """
    settings = make_options(options, exported=False)
    target, loaded = parse_target(settings.target), job_of(job, example_inputs)
    with OutputFolder(Path(output)) as folder:
        tuning = Tuning(loaded, settings, target, folder, progress or Progress(), (), resume)
        tuned = tuning.tune()
        report = _report(tuning, tuned)
        (folder.path / SIMULATION_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
        return SimulationResult(folder.path, tuned.student, tuned.teacher, report)


def _report(tuning: Tuning, tuned: Tuned) -> dict[str, Any]:
    with torch.no_grad():
        simulated = tuning.metrics("evaluate", tuned.student)
    total, quantized = parameter_counts(tuned.student)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": tuning.job.name, "parameters": total, "quantized_parameters": quantized},
        "options": dataclasses.asdict(tuning.options),
        "pipeline": ",".join(tuning.pipelines),
        "layers": tuning.layers(tuned.student),
        **({"assignment": tuning.assignment} if tuning.assignment else {}),
        **({"compensation": tuning.compensation} if tuning.compensation is not None else {}),
        "schedule": tuned.history.schedule if tuned.history else [],
        "metrics": {"float": tuned.metrics, "quantized": simulated},
        "warnings": tuning.warnings,
    }
