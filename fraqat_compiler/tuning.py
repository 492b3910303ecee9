"""From a job to a student that is calibrated and fine-tuned: the phases that a compile and a simulation share."""

from __future__ import annotations

import dataclasses
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import fx_graph, sensitivity_cache
from fraqat_compiler.assignment_report import assignment_report
from fraqat_compiler.auto_widths import parse_auto
from fraqat_compiler.calibration import Batch, calibrate, first_samples
from fraqat_compiler.capture import capture
from fraqat_compiler.compile_options import CompileOptions
from fraqat_compiler.default_recipe import activation_range_of, loss_of, weight_range_of
from fraqat_compiler.error_compensation import compensate, compensated_layers
from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.fine_tune import FineTuneResult, fine_tune
from fraqat_compiler.instruments import Instrument
from fraqat_compiler.job import Job, load_job
from fraqat_compiler.layers import end_widths, layers, set_weight_bit_width
from fraqat_compiler.learned_ranges import settle_ranges
from fraqat_compiler.mixed_precision import make_plan
from fraqat_compiler.output_folder import OutputFolder
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager, PassRecord
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.progress import Progress
from fraqat_compiler.recipe import Recipe, parse_recipe
from fraqat_compiler.schedule import BitWidthSchedule, parse_schedule
from fraqat_compiler.sensitivity import measure_for, measured_loss
from fraqat_compiler.target import Target
from fraqat_compiler.task import TaskObjective
from fraqat_compiler.training_setup import apply_recipe, budget, make_config, own_parameters


class Tuned(NamedTuple):
    """What the phases hand on.

    Attributes:
        teacher: the float graph.
        student: the graph with fake quants, calibrated and fine-tuned.
        batches: what it was calibrated on.
        history: of the fine-tune; None without one.
        metrics: the job's, of the float graph.
    """

    teacher: GraphModule
    student: GraphModule
    batches: list[Batch]
    history: FineTuneResult | None
    metrics: dict[str, float]


@dataclass
class Tuning:
    """The phases capture -> prepare (the target's pipeline) -> insert -> calibrate -> fine-tune, and their records.

    With `--weights auto` the layers' sensitivities are measured, and widths assigned, before the insertion; with `gptq`
    in the recipe rounding is compensated after the calibration.
    """

    job: Job
    options: CompileOptions
    target: Target
    folder: OutputFolder
    progress: Progress
    instruments: tuple[Instrument, ...]
    resume: bool
    records: list[PassRecord] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pipelines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        loss = loss_of(self.options.loss, self.job.outputs)
        self.options = dataclasses.replace(self.options, loss=loss)
        self.recipe: Recipe = parse_recipe(self.options.recipe)
        self.auto = parse_auto(self.options.weights)
        self.assignment: dict[str, Any] | None = None
        self.compensation: list[dict[str, Any]] | None = None
        if self.auto is not None and self.job.calibration_data is None:
            raise UsageError(
                "--weights auto measures the layers on calibration data, and the job defines no calibration_data().",
                "Define it, or name the widths: --weights 4,lm_head=8.",
            )

    def tune(self) -> Tuned:
        """Run them."""
        _seed_everything(self.options.seed)
        with self._phase("capture"):
            model, args, kwargs = self._load_model()
            teacher = capture(model, args, kwargs, tracer=self.options.tracer)
        self.context = PassContext(target=self.target, example_inputs=(args, kwargs), work_dir=self.folder.staging)
        with self._phase("prepare"):
            teacher, student = self._prepare(teacher)
        weights = self._weights(student)
        with self._phase("insert"):
            student = self._run_passes(to_text(self._insert_pass(weights)), student)
        batches = self._batches
        with self._phase("calibrate", len(batches)):
            calibrate(student, batches, self.progress.update)
        self._compensate(student, batches)
        metrics = self.metrics("evaluate float", teacher)
        return Tuned(teacher, student, batches, self._fine_tune(teacher, student), metrics)

    def layers(self, student: GraphModule) -> list[dict[str, Any]]:
        """Report key `layers`; a width that was assigned says why."""
        reasons = {entry["name"]: entry["reason"] for entry in self.assignment["layers"]} if self.assignment else {}
        return [
            entry | ({"reason": reasons[entry["name"]]} if entry["name"] in reasons and not entry["reason"] else {})
            for entry in layers(student)
        ]

    def before_training(self, student: GraphModule) -> None:
        """Called when all is ready for the fine-tune."""

    def _load_model(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        model = self.job.model()
        inputs = self.job.example_inputs()
        return (model, (), dict(inputs)) if isinstance(inputs, dict) else (model, _as_tuple(inputs), {})

    def _prepare(self, captured: GraphModule) -> tuple[GraphModule, GraphModule]:
        """The float graph that teaches, and the one that shall be quantized; they share every tensor."""
        prepared = self._run_passes(self.target.prepare_pipeline(), captured)
        student = fx_graph.shared_copy(prepared)
        if self.recipe.low_rank is not None:
            student = self._run_passes(to_text(self.recipe.low_rank), student)
        return prepared, student

    def _weights(self, student: GraphModule) -> str:
        """Widths by module: as asked for, or as the sensitivities of the layers and the budget have it."""
        if self.auto is None:
            return self._with_branches(self.options.weights, student)
        rules = self._with_branches("4", student).partition(",")[2]
        plan = make_plan(self.auto, rules, lambda weights: self._trial(weights, student))
        loss, seed = measure_for(self.options.loss), self.options.seed
        with self._phase("sensitivity", len(self._batches)):
            found = sensitivity_cache.measured(
                self.folder.sensitivity, student, self._batches, plan.candidates, loss, seed, self.progress.update
            )
        widths = plan.assign(found)
        with self._phase("assign"):
            self.assignment = assignment_report(
                plan, found, widths, loss, lambda chosen: measured_loss(student, self._batches, chosen, loss)
            )
        return plan.text(widths)

    def _with_branches(self, weights: str, student: GraphModule) -> str:
        return weights if self.recipe.low_rank is None else self.recipe.widths(weights, student)

    def _trial(self, weights: str, student: GraphModule) -> GraphModule:
        """A copy with fake quants, to see what the target makes of these widths."""
        trial: GraphModule = self._insert_pass(weights).run(fx_graph.shared_copy(student), self.context).model
        return trial

    def _insert_pass(self, weights: str) -> InsertFakeQuant:
        tuned, outputs = self._steps > 0, self.job.outputs
        activation_range = activation_range_of(
            self.options.range_method, outputs=outputs, fine_tuned=tuned, dynamic=self.options.dynamic
        )
        return InsertFakeQuant(
            weights=weights,
            activations=self.options.activations,
            skip=self.options.skip,
            range_method=activation_range,
            weight_range=weight_range_of(self.options.weight_range, outputs=outputs, fine_tuned=tuned),
            strict=self.options.strict,
            dynamic=self.options.dynamic,
        )

    @cached_property
    def _steps(self) -> int:
        """Of the fine-tune; asked of the data once."""
        return budget(self.job, self.options.steps, self.options.epochs)

    @cached_property
    def _batches(self) -> list[Batch]:
        """The calibration data."""
        assert self.context.example_inputs is not None
        args, kwargs = self.context.example_inputs
        if self.job.calibration_data is None:
            self.warnings.append(
                "The job defines no calibration_data(): activation ranges come from the example inputs alone."
            )
            return [kwargs or args]
        batches = list(first_samples(self.job.calibration_batches(), self.options.calibration_samples))
        if not batches:
            raise DataError("the calibration data is empty.", "Let calibration_data() yield at least one batch.")
        return batches

    def _compensate(self, student: GraphModule, batches: list[Batch]) -> None:
        """Let weights make up for each other's rounding at their end widths, where the recipe asks for it."""
        if self.recipe.gptq is None:
            return
        with self._phase("compensate", len(compensated_layers(student))):
            done = compensate(student, batches, self.recipe.gptq, self.progress.update)
        self.compensation = [layer.to_json() for layer in done]
        left = [layer for layer in done if layer.reason]
        if left:
            first = f"first {left[0].weight}: {left[0].reason}"
            self.warnings.append(f"gptq leaves {len(left)} of {len(done)} weights rounded to nearest, {first}.")
        if not done:
            self.warnings.append(
                "gptq finds nothing to compensate: no linear weight of up to 8 bits is read by one op."
            )

    def _fine_tune(self, teacher: GraphModule, student: GraphModule) -> FineTuneResult | None:
        steps, data = self._steps, self.job.train_data
        if not steps or data is None:
            return None
        ends = end_widths(student)
        schedule = self._schedule(ends, steps)
        self.before_training(student)
        trained = own_parameters(student, self.options.train)
        apply_recipe(student, self.recipe, trained)
        config = make_config(
            schedule,
            steps,
            self.recipe,
            self.options.loss,
            self.options.seed,
            lr=self.options.lr,
            checkpoint_every=self.options.checkpoint_every,
        )
        with self._phase("fine-tune", steps):
            result = fine_tune(
                student,
                teacher,
                data,
                config,
                folder=self.folder.checkpoints,
                resume=self.resume,
                progress=self.progress,
                task=self._task(),
            )
        settle_ranges(student)
        set_weight_bit_width(student, ends)
        return result

    def _schedule(self, ends: dict[str, float], steps: int) -> BitWidthSchedule:
        schedule = parse_schedule(self.options.schedule, end=min(ends.values(), default=8.0))
        schedule.steps(steps)  # refuses a budget that is too small before anything long begins
        return schedule

    def _task(self) -> TaskObjective | None:
        return TaskObjective(self.job.loss, self.job.example_inputs()) if self.job.loss else None

    def metrics(self, phase: str, run: Callable[..., Any]) -> dict[str, float]:
        """The job's metrics of a model, each from the same random state.

        The float model is measured before the fine-tune: an evaluate() that fails costs no hours.
        """
        if self.job.evaluate is None:
            return {}
        with self._phase(phase), torch.no_grad():
            _seed_everything(self.options.seed)
            metrics = self.job.metrics(run)
        _seed_everything(self.options.seed)
        return metrics

    def _run_passes(self, text: str, model: Any) -> Any:
        manager = PassManager.from_text(text)
        self.pipelines.append(str(manager))
        result = manager.run(model, self.context, self.instruments, reproducer=self.folder.reproducer)
        self.records.extend(result.records)
        return result.model

    @contextmanager
    def _phase(self, name: str, total: int | None = None) -> Iterator[None]:
        start = time.perf_counter()
        with self.progress.phase(name, total):
            yield
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        self.phases.append({"name": name, "seconds": time.perf_counter() - start, "peak_memory_bytes": peak * 1024})


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def job_of(job: Job | nn.Module | str | Path, example_inputs: Any) -> Job:
    """The job of what the front doors take: a Job, the text of one, or a module with example inputs."""
    if isinstance(job, Job):
        return job
    if isinstance(job, nn.Module):
        return Job.from_model(job, example_inputs)
    return load_job(str(job))
