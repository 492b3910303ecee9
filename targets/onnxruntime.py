"""The host CPU through ONNX Runtime."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import onnx
import onnxruntime as ort
from onnx import ModelProto

from fraqat_compiler.errors import OutputError, TargetError, UsageError
from fraqat_compiler.host_timing import milliseconds_of_runs
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Target, TensorRequest
from fraqat_compiler.targets.model_file import data_files, read_model
from fraqat_compiler.targets.node_probe import refusals
from fraqat_compiler.targets.op_times import op_times

Level = Literal["none", "basic", "extended", "all"]

MODEL_FILE = "model.onnx"
OFFLINE_FILE = "model.optimized.onnx"
HIGHEST_PROBABILITY = 255 / 256  # the kernel gives the highest code to 1.0 where the step is 1/256

_LEVELS: dict[Level, ort.GraphOptimizationLevel] = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_SILENT = 4  # ONNX Runtime prints what it also raises


@dataclass(frozen=True)
class OnnxRuntimeTarget(Target):
    """The host CPU through ONNX Runtime.

    Compiles to the ONNX file itself, which ONNX Runtime optimizes whenever it loads it.

    Options: `optimization` is the level of ONNX Runtime's graph optimizations; `offline` stores the optimized graph, so
    that loading is quick (at level `all` it is then for CPUs like this one); `threads` is for the ops, 0 for ONNX
    Runtime's own choice; `group_size` gives that many elements of a row of a linear layer's weight a scale of their own
    instead of the whole row, 0 does not.
    """

    name: ClassVar[str] = "onnxruntime"
    optimization: Level = "all"
    offline: bool = False
    threads: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise UsageError(f"group-size={self.group_size} is no number of elements.", "Give 16, 32, 64 ..., or 0.")

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        """The default's, and 8-bit probabilities in steps of 1/256 whatever calibration saw.

        QLinearSoftmax, which replaces Softmax between 8-bit quantizers, does not saturate: a probability above the
        calibrated range wraps around to a small one.
        """
        spec = super().quant_spec(request)
        if isinstance(spec, Unquantized):
            return spec
        if (request.role, request.op) == ("weight", "linear"):
            return self._grouped(spec, request.shape[-1])
        if (request.role, request.op) != ("activation", "softmax"):
            return spec
        return dataclasses.replace(spec, range_max=HIGHEST_PROBABILITY) if spec.bit_width == 8 else spec

    def _grouped(self, spec: QuantSpec, row: int) -> QuantSpec:
        """The same with a scale for each group, where groups fill a row."""
        fills = self.group_size and row % self.group_size == 0
        return dataclasses.replace(spec, axis=None, group_size=self.group_size) if fills else spec

    def prepare_pipeline(self) -> str:
        """An RMSNorm that is written out becomes one op: in between it is computed in float."""
        fused = "fuse-rms-norm{rows=false},decompose-attention"
        return super().prepare_pipeline().replace("decompose-attention", fused)

    def check(self, model: Path) -> list[Finding]:
        """Ask ONNX Runtime: first about the whole model, then, where it refuses, about each node."""
        graph = read_model(model)
        try:
            onnx.checker.check_model(str(model))
            _open(model, "none", self.threads)
        except Exception as error:  # onnxruntime's exceptions share no public base
            refused = refusals(graph, _against)
            if not refused:  # no node is to blame alone: the model is
                raise TargetError(f"{model.name} is refused: {plain(error)}.") from error
        else:
            refused = {}
        return [_finding(node.name, node.op_type, refused.get(index)) for index, node in enumerate(graph.graph.node)]

    def compile(self, model: Path, output: Path) -> Artifact:
        self._refuse(model)
        try:
            if self.offline:
                self._optimize(model, output)
            else:
                _place(model, output)
        except OSError as error:
            raise OutputError(f"{output} cannot be written: {error.strerror}.", "Free disk space.") from error
        return self.load(output, to_text(self))

    def _refuse(self, model: Path) -> None:
        refused = [finding for finding in self.check(model) if finding.verdict == "refused"]
        if refused:
            raise TargetError(
                f"ONNX Runtime refuses {len(refused)} nodes of {model.name}, first {refused[0].node} "
                f"({refused[0].op}): {refused[0].reason}.",
                refused[0].remedy,
            )

    def _optimize(self, model: Path, output: Path) -> None:
        """Let ONNX Runtime write the graph that it would run."""
        options = _options(self.optimization, self.threads)
        data = f"{OFFLINE_FILE}.data"
        with tempfile.TemporaryDirectory(prefix=".onnxruntime-", dir=output) as scratch:
            options.optimized_model_filepath = str(Path(scratch) / OFFLINE_FILE)
            if data_files(read_model(model)):  # what is large stays outside
                options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
            try:
                ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # as above; the model is known to load, so it is the writing that failed
                raise OutputError(f"{OFFLINE_FILE} cannot be written: {plain(error)}.", "Free disk space.") from error
            for name in (data, OFFLINE_FILE):
                if (Path(scratch) / name).exists():
                    (Path(scratch) / name).replace(output / name)

    def run(self, artifact: Artifact, inputs: Arrays) -> Arrays:
        session = self._session(artifact)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:  # as above
            raise TargetError(
                f"{artifact.path.name} does not run: {plain(error)}.", "Give every input, in its type and shape."
            ) from error

    def profile(self, artifact: Artifact, inputs: Arrays) -> Profile:
        self.run(artifact, inputs)  # what is wrong with the inputs is said here
        session = self._session(artifact)
        milliseconds = milliseconds_of_runs(lambda: session.run(None, inputs))
        with tempfile.TemporaryDirectory() as folder:
            options = _options(self._level, self.threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            observed = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
            milliseconds_of_runs(lambda: observed.run(None, inputs))
            ops = op_times(Path(observed.end_profiling()))
        threads = self.threads or "default"
        note = f"Median of {len(milliseconds)} runs on this host, ONNX Runtime {ort.__version__}, threads: {threads}."
        notes = (note, "Times of ops are of runs under the profiler, which slows them.")
        return Profile(source="host", latency_ms=statistics.median(milliseconds), ops=ops, unit="ms", notes=notes)

    def load(self, folder: Path, target_text: str) -> Artifact:
        path = folder / (OFFLINE_FILE if self.offline else MODEL_FILE)
        files = (path, *(folder / name for name in data_files(read_model(path))))
        details = {"fallback_nodes": 0, "runtime": f"onnxruntime {ort.__version__}"}
        return Artifact(path=path, files=files, target_text=target_text, details=details)

    @property
    def _level(self) -> Level:
        """Of the graph that is loaded: an offline one is optimized already."""
        return "none" if self.offline else self.optimization

    def _session(self, artifact: Artifact) -> ort.InferenceSession:
        """The session of an artifact, kept for the next call.

        Raises:
            TargetError: the file is missing or damaged.
        """
        try:
            changed = artifact.path.stat().st_mtime_ns
            return _kept(artifact.path, changed, self._level, self.threads)
        except Exception as error:  # as above
            raise TargetError(f"{artifact.path.name} cannot be loaded: {plain(error)}.", "Compile again.") from error


@lru_cache(maxsize=1)
def _kept(path: Path, changed: int, level: Level, threads: int) -> ort.InferenceSession:
    """One session is kept, since a sampler runs one many times; `changed` is part of the key only."""
    return _open(path, level, threads)


def _open(path: Path, level: Level, threads: int) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), _options(level, threads), providers=["CPUExecutionProvider"])


def _options(level: Level, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = _SILENT
    return options


def _against(model: ModelProto) -> str | None:
    try:
        ort.InferenceSession(model.SerializeToString(), _options("none", 1), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        return plain(error)
    return None


def plain(error: BaseException) -> str:
    """The runtime's words without its prefix of codes, as one line."""
    text = " ".join(str(error).split())
    words = text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
    return words.rstrip(". ")


def _finding(node: str, op: str, reason: str | None) -> Finding:
    if reason is None:
        return Finding(node, op, "runs")
    remedy = "Leave its module out with --skip, or change --weights or --activations for it."
    return Finding(node, op, "refused", reason, remedy)


def _place(model: Path, output: Path) -> None:
    """Copy the weights' files, if any, and then the model into `output`; each appears whole or not at all."""
    for name in data_files(read_model(model)):
        _copy(model.parent / name, output / name)
    _copy(model, output / MODEL_FILE)


def _copy(source: Path, to: Path) -> None:
    if to.exists() and to.samefile(source):
        return
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)
