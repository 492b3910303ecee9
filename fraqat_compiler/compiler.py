"""The front door: one call takes a model to a compiled, verified artifact and its report.

The phases run in this order; each is a method of `_Compilation`, or of `Tuning` before it:
capture -> prepare (the target's pipeline) -> insert -> calibrate -> compensate (with `gptq`) -> check a draft ->
fine-tune -> lower -> compile -> verify -> profile.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import layerwise, onnx_io, parity, survival
from fraqat_compiler.auto_widths import parse_size
from fraqat_compiler.calibration import Batch, run_batch
from fraqat_compiler.compile_options import CompileOptions, make_options
from fraqat_compiler.errors import TargetError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.fine_tune import FineTuneResult
from fraqat_compiler.instruments import Instrument
from fraqat_compiler.job import Job
from fraqat_compiler.layers import demanded_bytes, parameter_counts
from fraqat_compiler.manifest import write_manifest
from fraqat_compiler.output_folder import OutputFolder
from fraqat_compiler.parity import Parity, TorchRunner
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.progress import Progress
from fraqat_compiler.registry import parse_target
from fraqat_compiler.report import format_bytes, write_report
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Target
from fraqat_compiler.tuning import Tuning, job_of

__all__ = ["CompileOptions", "CompileResult", "compile"]

SCHEMA_VERSION = 1
PARITY_SAMPLES = 4
SIZE_TOLERANCE = 0.03
MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.safetensors"
PIPELINE_FILE = "pipeline.txt"
_LOOK_CLOSER = " Whether one of its ops is to blame: fraqat verify DIR --layers."


@dataclass(frozen=True)
class CompileResult:
    """What a compile left.

    Attributes:
        output: the folder.
        report: the content of report.json.
        artifact: what the target made.
        student: the fake-quantized graph that the file was made of, called like the model.
    """

    output: Path
    report: dict[str, Any]
    artifact: Artifact
    student: GraphModule


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
    settings = make_options(options, exported=True)
    target = parse_target(settings.target)
    missing = target.missing()
    if missing:
        raise TargetError(f'target "{target.name}" cannot run here: {missing}')
    loaded = job_of(job, example_inputs)
    progress = progress or Progress()
    with OutputFolder(Path(output)) as folder:
        opened = target.opened(folder.remote_jobs, progress, resume)
        return _Compilation(loaded, settings, opened, folder, progress, tuple(instruments), resume).run()


class _Compilation(Tuning):
    """One compile: its phases and what they hand to each other."""

    def run(self) -> CompileResult:
        teacher, student, batches, history, float_metrics = self.tune()
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
        return self._finish(report, artifact, images, student)

    # Phases

    def before_training(self, student: GraphModule) -> None:
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
            count = self.layerwise["strays"]
            self.warnings.append(
                f"{count} op{'s' * (count > 1)} of {MODEL_FILE}, first {self.layerwise['node']} "
                f"({self.layerwise['op']}), round differently than in the trained graph: up to "
                f"{self.layerwise['max_lsb']:.2f} LSB on the same inputs. A pass that gives a tensor another grid for "
                "the target's sake does that, as a fault would."
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
        metrics = self.metrics("evaluate", file)
        if self.job.samples is not None:
            compiled = TorchRunner(teacher, lambda feeds: self.target.run(artifact, feeds), *names)
            with self._phase("sample"), torch.no_grad():
                images = {"float": self.job.samples(teacher), "compiled": self.job.samples(compiled)}
        return metrics, images

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
            "layers": self.layers(student),
            **({"assignment": self.assignment} if self.assignment else {}),
            **({"compensation": self.compensation} if self.compensation is not None else {}),
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
        self._warn_of_size(summary)
        excess = summary["bytes"] / summary["expected_bytes"] - 1
        if excess > SIZE_TOLERANCE:
            self.warnings.append(f"{model_path.name} is {100 * excess:.1f} % larger than its bit widths demand.")
        return summary

    def _warn_of_size(self, summary: dict[str, Any]) -> None:
        """The assignment knows the tensors alone; what the graph around them takes is known now."""
        asked = self.auto.auto.size if self.auto else None
        if asked and summary["bytes"] > parse_size(asked):
            self.warnings.append(
                f"{summary['path']} has {format_bytes(summary['bytes'])}: size={asked} went to its tensors, and the "
                f"graph around them takes {format_bytes(summary['structure_bytes'])}. Ask for that much less."
            )

    def _finish(
        self, report: dict[str, Any], artifact: Artifact, images: dict[str, Any], student: GraphModule
    ) -> CompileResult:
        staging = self.folder.staging
        (staging / PIPELINE_FILE).write_text(",".join(self.pipelines) + "\n")
        write_report(report, staging, images=images)
        write_manifest(staging, report)
        final = self.folder.commit()
        moved = {file: final / file.relative_to(staging) for file in artifact.files}
        placed = dataclasses.replace(artifact, path=moved[artifact.path], files=tuple(moved.values()))
        return CompileResult(output=final, report=report, artifact=placed, student=student)


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


def _thaw(student: GraphModule) -> None:
    """Let weight scales follow the weights again after a draft was frozen."""
    for module in student.modules():
        if isinstance(module, WeightFakeQuantize):
            module.frozen = False


def _save_reference(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    tensors = {f"input:{name}": array for name, array in inputs.items()}
    tensors |= {f"output:{name}": array for name, array in outputs.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
