"""The front door: one call takes a model to a compiled, verified artifact and its report.

The phases run in this order; each is a method of `_Compilation`:
capture -> insert (prepare pipeline) -> calibrate -> check a draft -> fine-tune -> lower -> compile ->
verify -> profile.
"""

from __future__ import annotations

import dataclasses
import math
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import fx_graph, layerwise, onnx_io, parity, survival
from fraqat_compiler.calibration import Batch, calibrate, first_samples, run_batch
from fraqat_compiler.capture import Tracer, capture
from fraqat_compiler.errors import DataError, TargetError, UsageError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.fine_tune import FineTuneResult, fine_tune
from fraqat_compiler.instruments import Instrument
from fraqat_compiler.job import Job, load_job
from fraqat_compiler.layers import demanded_bytes, end_widths, layers, parameter_counts, set_weight_bit_width
from fraqat_compiler.learned_ranges import settle_ranges
from fraqat_compiler.losses import parse_losses
from fraqat_compiler.manifest import write_manifest
from fraqat_compiler.output_folder import OutputFolder
from fraqat_compiler.parity import Parity, TorchRunner
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager, PassRecord
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.progress import Progress
from fraqat_compiler.quant_spec import MAX_EXPORTED_BIT_WIDTH, RangeMethod
from fraqat_compiler.recipe import Recipe, parse_recipe
from fraqat_compiler.registry import parse_target
from fraqat_compiler.report import write_report
from fraqat_compiler.schedule import BitWidthSchedule, parse_schedule
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Target
from fraqat_compiler.task import TaskObjective
from fraqat_compiler.training_setup import apply_recipe, budget, make_config, own_parameters
from fraqat_compiler.widths import Widths

SCHEMA_VERSION = 1
PARITY_SAMPLES = 4
SIZE_TOLERANCE = 0.03
MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.safetensors"
PIPELINE_FILE = "pipeline.txt"
_LOOK_CLOSER = " Whether one of its ops is to blame: fraqat verify DIR --layers."


@dataclass(frozen=True)
class CompileOptions:
    """What can be asked of a compile; the command line's flags have the same names.

    Attributes:
        weights, activations: widths with overrides by module name (`4,lm_head=8`).
        schedule: name or text of the bit-width schedule of the fine-tune.
        steps: optimizer steps of the fine-tune; 0 is post-training quantization; None is 400 where the job has
            training data, else 0.
        epochs: the same in passes over the training data, instead of `steps`.
        loss: what the student is told to do, terms with commas (`mse`, `kl{temperature=2},task{weight=0.5}`).
        train: which parameters are trained: `all`, or groups (`ff`, `attn`, `blocks`) and module patterns with commas.
        recipe: optimizer, stabilizers, learned ranges and more, with commas (`ema,freeze-oscillations,lsq`).
        target: target text.
        seed: of every random choice.
        strict: an op that stays in float unexpectedly is an error.
        skip: modules left in float, patterns joined by commas.
        range_method: how activation ranges follow from calibration.
        calibration_samples: of the calibration data only as many batches as hold so many samples; None is all.
        weight_range: how weight ranges follow from the weights; None is `mse` without a fine-tune, else `minmax`.
        lr: learning rate of the fine-tune; None is the loop's default.
        tracer: how the model is captured.
        checkpoint_every: steps between checkpoints of the fine-tune; None is the loop's default.
    """

    weights: str = "4"
    activations: str = "8"
    schedule: str = "fraqat"
    steps: int | None = None
    epochs: float | None = None
    loss: str = "mse"
    train: str = "all"
    recipe: str = ""
    target: str = "onnxruntime"
    seed: int = 0
    strict: bool = False
    skip: str = ""
    range_method: RangeMethod = "minmax"
    calibration_samples: int | None = None
    weight_range: RangeMethod | None = None
    lr: float | None = None
    tracer: Tracer = "export"
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class CompileResult:
    """What a compile left.

    Attributes:
        output: the folder.
        report: the content of report.json.
        artifact: what the target made.
    """

    output: Path
    report: dict[str, Any]
    artifact: Artifact


def compile(  # noqa: A001 - the product's verb; called as fraqat_compiler.compile
    job: Job | nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    output: str | Path,
    resume: bool = False,
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
    **options: Any,
) -> CompileResult:
    """Compile a model for a target.

    Args:
        job: a Job, the text of one (`job.py`, `package.module:function`), or a module with `example_inputs`.
        example_inputs: for a module: the tuple of positional or dict of keyword inputs it is captured on.
        output: folder for the results; made when missing.
        resume: go on from the checkpoints that an interrupted compile left in `output`.
        progress: hears of the phases.
        instruments: called around every pass.
        options: fields of CompileOptions, by name.

    Raises:
        FraqatError: of a kind that says what is wrong; nothing half-written is left that looks whole.
    """
    settings = _settings(options)
    target = parse_target(settings.target)
    missing = target.missing()
    if missing:
        raise TargetError(f'target "{target.name}" cannot run here: {missing}')
    loaded = _job(job, example_inputs)
    progress = progress or Progress()
    with OutputFolder(Path(output)) as folder:
        opened = target.opened(folder.remote_jobs, progress, resume)
        return _Compilation(loaded, settings, opened, folder, progress, tuple(instruments), resume).run()


def _settings(options: dict[str, Any]) -> CompileOptions:
    known = {item.name for item in dataclasses.fields(CompileOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}.", f"Known: {', '.join(sorted(known))}.")
    settings = CompileOptions(**options)
    settings = dataclasses.replace(settings, weights=str(settings.weights), activations=str(settings.activations))
    _refuse_unusable(settings)
    return settings


def _refuse_unusable(settings: CompileOptions) -> None:
    """Say before anything long begins what no compile could do."""
    for flag in ("weights", "activations"):
        text = getattr(settings, flag)
        for width in Widths.parse(text).all:
            if width is not None and not (width.is_integer() and width <= MAX_EXPORTED_BIT_WIDTH):
                raise UsageError(
                    f"--{flag} {text}: {width:g} bits cannot be exported, for files hold integer widths up to "
                    f"{MAX_EXPORTED_BIT_WIDTH}.",
                    "End at one of them, or at float; the schedule may pass through fractions on its way.",
                )
    parse_schedule(settings.schedule, end=min(filter(None, Widths.parse(settings.weights).all), default=8.0))
    _refuse_idle(settings)
    if settings.lr is not None and not 0 < settings.lr < math.inf:
        raise UsageError(f"--lr {settings.lr} is no learning rate.", "It is a positive number.")


def _refuse_idle(settings: CompileOptions) -> None:
    """Texts that do not parse, and ingredients of a fine-tune that is not asked for."""
    parse_losses(settings.loss)
    idle = parse_recipe(settings.recipe).needs_training
    if settings.steps == 0 and idle:
        raise UsageError(f"--recipe {idle[0]} needs a fine-tune, and --steps is 0.", "Leave one of them out.")
    if settings.calibration_samples is not None and settings.calibration_samples < 1:
        raise UsageError(f"--calibration-samples {settings.calibration_samples} are none.", "Give 1 or more.")
    if settings.epochs is not None and not 0 < settings.epochs < math.inf:
        raise UsageError(f"--epochs {settings.epochs:g} is no budget.", "It is a positive number.")


def _job(job: Job | nn.Module | str | Path, example_inputs: Any) -> Job:
    if isinstance(job, Job):
        return job
    if isinstance(job, nn.Module):
        return Job.from_model(job, example_inputs)
    return load_job(str(job))


@dataclass
class _Compilation:
    """One compile: its phases and what they hand to each other."""

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
        self.recipe: Recipe = parse_recipe(self.options.recipe)

    def run(self) -> CompileResult:
        _seed_everything(self.options.seed)
        with self._phase("capture"):
            model, args, kwargs = self._load_model()
            teacher = capture(model, args, kwargs, tracer=self.options.tracer)
        self.context = PassContext(target=self.target, example_inputs=(args, kwargs), work_dir=self.folder.staging)
        with self._phase("insert"):
            teacher, student = self._insert(teacher)
        batches = self._calibration_batches(args, kwargs)
        with self._phase("calibrate", len(batches)):
            calibrate(student, batches, self.progress.update)
        float_metrics = self._metrics("evaluate float", teacher)
        history = self._fine_tune(teacher, student)
        with self._phase("lower"):
            graph = self._lower(student, record=True)
        model_path = self._save(graph)
        if history is None:
            self._check(model_path)
        samples = batches[:PARITY_SAMPLES]
        with self._phase("compile"):
            artifact = self.target.compile(model_path, self.folder.staging)
        with self._phase("verify"):
            stages, references = self._verify(student, graph, model_path, artifact, samples)
        with self._phase("profile"):
            profile = self.target.profile(artifact, references[0][0])
        file_metrics, images = self._evaluate(teacher, graph, model_path, artifact)
        metrics = {"float": float_metrics, "quantized": file_metrics}
        report = self._report(student, graph, model_path, artifact, profile, stages, history, metrics)
        return self._finish(report, artifact, images)

    # Phases

    def _load_model(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        model = self.job.model()
        inputs = self.job.example_inputs()
        return (model, (), dict(inputs)) if isinstance(inputs, dict) else (model, _as_tuple(inputs), {})

    def _insert(self, captured: GraphModule) -> tuple[GraphModule, GraphModule]:
        """The float graph that teaches, and the same with fake quants; they share every tensor."""
        prepared = self._run_passes(self.target.prepare_pipeline(), captured)
        student = fx_graph.shared_copy(prepared)
        weights = self.options.weights
        if self.recipe.low_rank is not None:
            student = self._run_passes(to_text(self.recipe.low_rank), student)
            weights = self.recipe.widths(weights, student)
        return prepared, self._run_passes(to_text(self._insert_pass(weights)), student)

    def _insert_pass(self, weights: str) -> InsertFakeQuant:
        return InsertFakeQuant(
            weights=weights,
            activations=self.options.activations,
            skip=self.options.skip,
            range_method=self.options.range_method,
            weight_range=self.options.weight_range or ("minmax" if self._steps() else "mse"),
            strict=self.options.strict,
        )

    def _steps(self) -> int:
        return budget(self.job, self.options.steps, self.options.epochs)

    def _calibration_batches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Batch]:
        if self.job.calibration_data is None:
            self.warnings.append(
                "The job defines no calibration_data(): activation ranges come from the example inputs alone."
            )
            return [kwargs or args]
        batches = list(first_samples(self.job.calibration_batches(), self.options.calibration_samples))
        if not batches:
            raise DataError("the calibration data is empty.", "Let calibration_data() yield at least one batch.")
        return batches

    def _fine_tune(self, teacher: GraphModule, student: GraphModule) -> FineTuneResult | None:
        steps, data = self._steps(), self.job.train_data
        if not steps or data is None:
            return None
        ends = end_widths(student)
        schedule = self._schedule(ends, steps)
        self._check_draft(student)
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

    def _check_draft(self, student: GraphModule) -> None:
        """Lower and check before the fine-tune: a limit of the hardware surfaces now and not after hours."""
        draft = self.folder.staging / "draft"
        draft.mkdir()
        graph = self._lower(student, record=False)
        path = draft / MODEL_FILE
        onnx_io.save(graph, path)
        self._check(path)
        shutil.rmtree(draft)
        _thaw(student)

    def _check(self, model_path: Path) -> None:
        with self._phase("check"):
            findings = self.target.check(model_path)
        for finding in findings:
            if finding.log:
                (self.folder.staging / f"{self.target.name}.log").write_text(finding.log, encoding="utf-8")
        refuse(findings, self.target)
        self.warnings += wrong_results(findings, self.target)

    def _lower(self, student: GraphModule, *, record: bool) -> gs.Graph:
        text = self.target.lower_pipeline()
        if record:
            return self._run_passes(text, student)
        return PassManager.from_text(text).run(student, self.context).model

    def _save(self, graph: gs.Graph) -> Path:
        with self._phase("save"):
            path = self.folder.staging / MODEL_FILE
            onnx_io.save(graph, path)
            onnx_io.verify(path)
        return path

    def _verify(
        self, student: GraphModule, graph: gs.Graph, model_path: Path, artifact: Artifact, samples: list[Batch]
    ) -> tuple[dict[str, Parity], list[tuple[Arrays, Arrays]]]:
        """Parity of every stage, and the inputs and fake-quant outputs that it was measured on."""
        inputs, outputs = [i.name for i in graph.inputs], [o.name for o in graph.outputs]
        references = []
        with torch.no_grad():
            for batch in samples:
                results = parity.flat_inputs(run_batch(student, batch))
                feeds = parity.name_arrays(inputs, parity.input_tensors(student, batch))
                references.append((feeds, parity.name_arrays(outputs, results)))
        scales = dict(zip(outputs, parity.output_scales(student), strict=True))
        self.output_scales = scales
        inferences = [feeds for feeds, _ in references]
        computed: dict[str, list[Arrays]] = {
            "onnx_unoptimized": list(map(parity.onnx_runner(model_path, optimized=False), inferences)),
            "onnx_optimized": list(map(parity.onnx_runner(model_path, optimized=True), inferences)),
            "target": self.target.run_all(artifact, inferences),
        }
        expected = [reference for _, reference in references]
        stages = {name: parity.compare(expected, actual, scales) for name, actual in computed.items()}
        self.noise_floor = parity.noise_floor(student, samples, expected, scales)
        layers_alone = layerwise.compare_file(student, samples[0], model_path, inferences[0])
        self.layerwise = layerwise.summary(layers_alone)
        self._warn_of_distance(stages)
        self.optimizers = survival.survey(model_path, [references[0][0]], scales)
        self.warnings += [
            f"{entry['name']} breaks the file: {entry['reason']}"
            for entry in self.optimizers
            if entry["outcome"] == "breaks"
        ]
        _save_reference(self.folder.staging / REFERENCE_FILE, *references[0])
        return stages, references

    def _warn_of_distance(self, stages: dict[str, Parity]) -> None:
        if self.layerwise["strays"]:
            self.warnings.append(
                f"{self.layerwise['node']} ({self.layerwise['op']}) of {MODEL_FILE} computes something else than in "
                f"the trained graph: on the same inputs ops are up to {self.layerwise['max_lsb']:.2f} LSB apart."
            )
        floor = self.noise_floor
        for name, stage in stages.items():
            if parity.beyond_noise(stage, floor):
                self.warnings.append(
                    f"Parity of {name.replace('_', ' ')}: {stage.max_lsb:.2f} LSB at most, {stage.mean_lsb:.3f} in the "
                    f"mean, from the fake-quantized graph (cosine {stage.cosine:.6f}); the rounding of float32 alone "
                    f"makes {floor.max_lsb:.2f} and {floor.mean_lsb:.3f}.{_LOOK_CLOSER if name == 'target' else ''}"
                )

    def _parity(self, stages: dict[str, Parity]) -> dict[str, Any]:
        floor = {"max_lsb": self.noise_floor.max_lsb, "mean_lsb": self.noise_floor.mean_lsb}
        measured = {name: stage.to_json() for name, stage in stages.items()}
        return measured | {"noise_floor": floor, "layerwise": self.layerwise}

    def _evaluate(
        self, teacher: GraphModule, graph: gs.Graph, model_path: Path, artifact: Artifact
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The job's metrics of the file, and sample images of the float graph and the target."""
        names = [i.name for i in graph.inputs], [o.name for o in graph.outputs]
        images: dict[str, Any] = {}
        file = TorchRunner(teacher, parity.onnx_runner(model_path, optimized=True), *names)
        metrics = self._metrics("evaluate", file)
        if self.job.samples is not None:
            compiled = TorchRunner(teacher, lambda feeds: self.target.run(artifact, feeds), *names)
            with self._phase("sample"), torch.no_grad():
                images = {"float": self.job.samples(teacher), "compiled": self.job.samples(compiled)}
        return metrics, images

    def _metrics(self, phase: str, run: Callable[..., Any]) -> dict[str, float]:
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

    # Report

    def _report(
        self,
        student: GraphModule,
        graph: gs.Graph,
        model_path: Path,
        artifact: Artifact,
        profile: Profile,
        stages: dict[str, Parity],
        history: FineTuneResult | None,
        metrics: dict[str, dict[str, float]],
    ) -> dict[str, Any]:
        total, quantized = parameter_counts(student)
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {"name": self.job.name, "parameters": total, "quantized_parameters": quantized},
            "options": dataclasses.asdict(self.options),
            "pipeline": ",".join(self.pipelines),
            "layers": layers(student),
            "schedule": history.schedule if history else [],
            "metrics": metrics,
            "passes": [record.to_json() for record in self.records],
            "phases": self.phases,
            "onnx": self._file_summary(student, model_path),
            "parity": self._parity(stages),
            "optimizers": self.optimizers,
            "output_scales": self.output_scales,
            "target": {
                "name": self.target.name,
                "text": to_text(self.target),
                "artifact": artifact.path.name,
                "files": sorted(file.name for file in artifact.files),
                "bytes": artifact.bytes,
                "fallback_nodes": artifact.details.get("fallback_nodes"),
                "soc": artifact.details.get("soc"),
                "details": dict(artifact.details),
            },
            "profile": dataclasses.asdict(profile),
            "estimate": self._estimate(model_path),
            "warnings": self.warnings,
        }

    def _estimate(self, model_path: Path) -> dict[str, Any] | None:
        estimate = self.target.estimate(model_path)
        return dataclasses.asdict(estimate) if estimate else None

    def _file_summary(self, student: GraphModule, model_path: Path) -> dict[str, Any]:
        """Size of the file beside what the bit widths demand: their tensors, and the graph that holds them."""
        summary = onnx_io.summary(model_path)
        summary["expected_bytes"] = demanded_bytes(student) + summary["structure_bytes"]
        excess = summary["bytes"] / summary["expected_bytes"] - 1
        if excess > SIZE_TOLERANCE:
            self.warnings.append(f"{model_path.name} is {100 * excess:.1f} % larger than its bit widths demand.")
        return summary

    def _finish(self, report: dict[str, Any], artifact: Artifact, images: dict[str, Any]) -> CompileResult:
        staging = self.folder.staging
        (staging / PIPELINE_FILE).write_text(",".join(self.pipelines) + "\n")
        write_report(report, staging, images=images)
        write_manifest(staging, report)
        final = self.folder.commit()
        moved = {file: final / file.relative_to(staging) for file in artifact.files}
        placed = dataclasses.replace(artifact, path=moved[artifact.path], files=tuple(moved.values()))
        return CompileResult(output=final, report=report, artifact=placed)

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


def refuse(findings: list[Finding], target: Target) -> None:
    """Raise TargetError when a target's check refused a node."""
    refused = [finding for finding in findings if finding.verdict == "refused"]
    if not refused:
        return
    first = refused[0]
    raise TargetError(
        f'target "{target.name}" refuses {len(refused)} of {len(findings)} nodes, first {first.node} ({first.op}): '
        f"{first.reason}",
        first.remedy or None,
    )


def wrong_results(findings: list[Finding], target: Target) -> list[str]:
    """A warning for each thing that a target computes wrongly, with the nodes that it concerns."""
    nodes: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        if finding.verdict == "wrong":
            nodes.setdefault((finding.op, finding.reason, finding.remedy), []).append(finding.node)
    return [
        f"{target.name} computes {_listed(names)} ({op}) wrongly: {reason}. {remedy}"
        for (op, reason, remedy), names in nodes.items()
    ]


def _listed(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _thaw(student: GraphModule) -> None:
    """Let weight scales follow the weights again after a draft was frozen."""
    for module in student.modules():
        if isinstance(module, WeightFakeQuantize):
            module.frozen = False


def _save_reference(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    tensors = {f"input:{name}": array for name, array in inputs.items()}
    tensors |= {f"output:{name}": array for name, array in outputs.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
