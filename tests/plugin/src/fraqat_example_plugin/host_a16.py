"""The target `host-a16`."""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import onnx
import onnxruntime as ort

from fraqat_compiler.errors import TargetError
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Target, TensorRequest

MODEL_NAME = "model.onnx"


@dataclass(frozen=True)
class HostA16Target(Target):
    """The host CPU through ONNX Runtime, with 16-bit activations whatever was asked."""

    name: ClassVar[str] = "host-a16"
    threads: int = 1

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        spec = super().quant_spec(request)
        if request.role != "activation" or isinstance(spec, Unquantized):
            return spec
        return replace(spec, bit_width=16)

    def check(self, model: Path) -> list[Finding]:
        self._session(model)
        nodes = onnx.load(model, load_external_data=False).graph.node
        return [Finding(node.name, node.op_type, "runs") for node in nodes]

    def compile(self, model: Path, output: Path) -> Artifact:
        self._session(model)
        shutil.copyfile(model, output / MODEL_NAME)
        return self.load(output, to_text(self))

    def run(self, artifact: Artifact, inputs: Arrays) -> Arrays:
        session = self._session(artifact.path)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise TargetError(f"{artifact.path.name} does not run: {error}.", "Check the inputs.") from error

    def profile(self, artifact: Artifact, inputs: Arrays) -> Profile:
        session = self._session(artifact.path)
        milliseconds = []
        for _ in range(5):
            start = time.perf_counter()
            session.run(None, inputs)
            milliseconds.append(1e3 * (time.perf_counter() - start))
        return Profile(source="host", latency_ms=statistics.median(milliseconds))

    def load(self, folder: Path, target_text: str) -> Artifact:
        path = folder / MODEL_NAME
        if not path.is_file():
            raise TargetError(f"{path} does not exist.", "Compile the model first.")
        return Artifact(path, (path,), target_text)

    def _session(self, model: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as above
            raise TargetError(f"onnxruntime refuses {model}: {error}.") from error
