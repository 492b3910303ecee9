"""The target `openvino`."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import openvino as ov

from fraqat_compiler.errors import OutputError, TargetError
from fraqat_compiler.host_timing import milliseconds_of_runs
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Target, TensorRequest
from fraqat_openvino.loaded_model import LoadedModel, op_times
from fraqat_openvino.model_ir import convert, core, plain
from fraqat_openvino.node_support import findings

MODEL_FILE = "openvino_model.xml"
WEIGHTS_FILE = "openvino_model.bin"
WIDEST_ACTIVATION = 8
VERSION = ov.__version__.partition("-")[0]


@dataclass(frozen=True)
class OpenVinoTarget(Target):
    """Intel's OpenVINO: packed weights in its IR, int8 kernels where activations have 8 bits.

    Activations of more than 8 bits stay in float: its low-precision transformations drop 16-bit quantizers.

    Options: `device` is OpenVINO's name of it (CPU, GPU, NPU); `threads` is for the CPU, 0 for OpenVINO's own choice;
    `performance_hint` tunes for one inference at a time or for many; `precision` is of what is not computed in int8.
    """

    name: ClassVar[str] = "openvino"
    device: str = "CPU"
    threads: int = 0
    performance_hint: Literal["latency", "throughput"] = "latency"
    precision: Literal["f32", "bf16", "f16"] = "f32"

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        """The default's, but for wide activations and constants."""
        if request.role in ("activation", "constant") and request.bit_width > WIDEST_ACTIVATION:
            return Unquantized(f"OpenVINO computes activations of {request.bit_width:g} bits in float")
        return super().quant_spec(request)

    def check(self, model: Path) -> list[Finding]:
        self._require_device()
        return findings(model, self.device)

    def compile(self, model: Path, output: Path) -> Artifact:
        self._require_device()
        refused = [finding for finding in self.check(model) if finding.verdict != "runs"]
        if refused:
            raise _refusal(model, refused)
        _save(convert(model), output)
        return self.load(output, to_text(self))

    def load(self, folder: Path, target_text: str) -> Artifact:
        self._require_device()
        files = (folder / MODEL_FILE, folder / WEIGHTS_FILE)
        for file in files:
            if not file.is_file():
                raise TargetError(f"{folder.name} holds no {file.name}.", "Compile with --target openvino first.")
        artifact = Artifact(files[0], files, target_text)
        details = {
            "fallback_nodes": 0,
            "runtime": f"openvino {VERSION}",
            "device": str(core().get_property(self.device, "FULL_DEVICE_NAME")),
            "matrix_precisions": self._loaded(artifact).matrix_precisions(),
        }
        return Artifact(files[0], files, target_text, details)

    def run(self, artifact: Artifact, inputs: Arrays) -> Arrays:
        return self._loaded(artifact).run(inputs)

    def profile(self, artifact: Artifact, inputs: Arrays) -> Profile:
        milliseconds = milliseconds_of_runs(self._loaded(artifact).request(inputs).infer)
        observed = LoadedModel.open(artifact.path, self.device, self._options() | {"PERF_COUNT": True})
        note = (
            f"Median of {len(milliseconds)} runs on {self.device}, openvino {VERSION}, "
            f"threads: {self.threads or 'default'}."
        )
        return Profile(
            source="host",
            latency_ms=statistics.median(milliseconds),
            ops=op_times(observed.request(inputs)),
            notes=(note, "Times of ops are of runs under the profiler, which slows them."),
        )

    def _require_device(self) -> None:
        here = core().available_devices
        if self.device not in here:
            raise TargetError(
                f"OpenVINO finds no device {self.device!r} here, only {', '.join(here)}.", "Set device to one of them."
            )

    def _loaded(self, artifact: Artifact) -> LoadedModel:
        """The model of an artifact, kept for the next call.

        Raises:
            TargetError: a file is missing or damaged.
        """
        try:
            changed = tuple(file.stat().st_mtime_ns for file in artifact.files)
            return _kept(artifact.path, changed, self)
        except OSError as error:
            raise TargetError(f"{artifact.path.name} cannot be read: {error.strerror}.", "Compile again.") from error
        except RuntimeError as error:  # all that OpenVINO raises
            raise TargetError(f"{artifact.path.name} cannot be loaded: {plain(error)}.", "Compile again.") from error

    def _options(self) -> dict[str, Any]:
        """The plugin's properties; activations keep the grids of the file, so none is quantized on the fly."""
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": self.performance_hint.upper(),
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        return options | ({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})


def _refusal(model: Path, refused: Sequence[Finding]) -> TargetError:
    first, count = refused[0], len(refused)
    return TargetError(
        f"OpenVINO refuses {count} nodes of {model.name}, first {first.node} ({first.op}): {first.reason}.",
        first.remedy,
    )


@lru_cache(maxsize=1)
def _kept(path: Path, changed: tuple[int, ...], target: OpenVinoTarget) -> LoadedModel:
    """One is kept, since a sampler runs one artifact many times; `changed` is part of the key only."""
    return LoadedModel.open(path, target.device, target._options())


def _save(model: ov.Model, output: Path) -> None:
    """Write the IR; what is large first, so that an .xml is never without its .bin."""
    try:
        with tempfile.TemporaryDirectory(prefix=".openvino-", dir=output) as scratch:
            ov.save_model(model, Path(scratch) / MODEL_FILE, compress_to_fp16=False)
            for name in (WEIGHTS_FILE, MODEL_FILE):
                (Path(scratch) / name).replace(output / name)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{MODEL_FILE} cannot be written: {plain(error)}.", "Free disk space.") from error
