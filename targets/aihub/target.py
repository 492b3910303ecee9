"""The AI Hub target: compile, run and profile on a device that Qualcomm hosts."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from onnx import ValueInfoProto, helper

from fraqat_compiler.errors import TargetError
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.progress import Progress
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Target, TensorRequest
from fraqat_compiler.targets.aihub.ledger import Ledger
from fraqat_compiler.targets.aihub.model_package import (
    BINARY_FILE,
    CONTEXT_FILE,
    context_nodes,
    digest,
    model_files,
    packed,
    unpack,
)
from fraqat_compiler.targets.aihub.profile_detail import read_profile
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.context_binary import read_binary
from fraqat_compiler.targets.htp.rules import wrong_nodes
from fraqat_compiler.targets.model_file import read_model

if TYPE_CHECKING:
    from qai_hub import CompileJob, InferenceJob

    from fraqat_compiler.targets.aihub.desk import Desk

LEDGER_FILE = "aihub.json"
COMPILE_OPTIONS = "--target_runtime precompiled_qnn_onnx"
RUN_OPTIONS = "--compute_unit npu"


@dataclass(frozen=True)
class _Site:
    """Where the target works: what `Target.opened` was told."""

    ledger: Ledger
    progress: Progress
    resume: bool


@dataclass(frozen=True)
class AiHubTarget(Target):
    """A Snapdragon device in Qualcomm AI Hub.

    Compiles to a context binary there, and runs and times it on a real device. What the HTP can do is asked of the
    local library first, as target `htp` does. Needs an account; jobs are remembered in the output folder, and
    `--resume` takes them up again.

    Options: `device` is a device of AI Hub by its full name; `options` is added to those of the compile job, as in
    "--qairt_version 2.42".
    """

    name: ClassVar[str] = "aihub"
    _site: ClassVar[_Site] = _Site(Ledger(None), Progress(), resume=False)
    device: str = "Samsung Galaxy S25 Ultra"
    options: str = ""

    def __post_init__(self) -> None:
        self._htp()  # refuses an unknown device before anything else

    def _htp(self) -> HtpTarget:
        """The same hardware as far as it is here."""
        return HtpTarget(soc=self.device)

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("qai_hub") is None:
            return 'the package qai-hub is not installed: pip install "fraqat_compiler[aihub]".'
        from fraqat_compiler.targets.aihub.hub import missing_token

        return missing_token()

    def opened(self, folder: Path, progress: Progress, resume: bool) -> AiHubTarget:
        opened = dataclasses.replace(self)
        object.__setattr__(opened, "_site", _Site(Ledger(folder / LEDGER_FILE), progress, resume))
        return opened

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        return self._htp().quant_spec(request)

    def prepare_pipeline(self) -> str:
        return self._htp().prepare_pipeline()

    def lower_pipeline(self) -> str:
        return self._htp().lower_pipeline()

    def check(self, model: Path) -> list[Finding]:
        """Ask the local library; where there is none, only what is known to be computed wrongly is told."""
        if HtpTarget.missing() is None:
            return self._htp().check(model)
        wrong = {finding.node: finding for finding in wrong_nodes(model)}
        unasked = "not asked: the local compiler is missing, so that AI Hub's will be the first to tell"
        nodes = read_model(model).graph.node
        return [wrong.get(node.name) or Finding(node.name, node.op_type, "runs", unasked) for node in nodes]

    def compile(self, model: Path, output: Path) -> Artifact:
        files = model_files(model)
        desk = self._desk()
        desk.hub.require_device(self.device)
        job = self._compiled(desk, files, logs=output)
        with tempfile.TemporaryDirectory(prefix=".aihub-", dir=output) as folder:
            scratch = Path(folder)
            target_id, archive = desk.hub.download_compiled(job, scratch / "compiled")
            unpack(archive, scratch)
            _refuse_another_interface(model, scratch / CONTEXT_FILE)
            self._artifact(scratch)
            for name in (BINARY_FILE, CONTEXT_FILE):
                (scratch / name).replace(output / name)
        artifact = self._artifact(output)
        desk.ledger.uploaded(_model_key(digest(artifact.files)), target_id)
        return artifact

    def _compiled(self, desk: Desk, files: Sequence[Path], logs: Path) -> CompileJob:
        """A finished job that compiled these files for the device."""
        options = f"{COMPILE_OPTIONS} {self.options}".strip()
        source = digest(files)
        model_id = _uploaded(desk, files, source)

        def submit(name: str) -> str:
            return desk.hub.submit_compile(model_id, self.device, name, options)

        job = desk.finished("compile", f"compile {source} for {self.device}: {options}", submit, logs)
        return cast("CompileJob", job)

    def run(self, artifact: Artifact, inputs: Arrays) -> Arrays:
        return self.run_all(artifact, [inputs])[0]

    def run_all(self, artifact: Artifact, samples: Sequence[Arrays]) -> list[Arrays]:
        """All samples in one job, since a device is provisioned for each."""
        if not samples:
            return []
        desk, job = self._ran("inference", artifact, samples)
        outputs = desk.hub.outputs(job)
        wanted = {value.name: value for value in read_model(artifact.path).graph.output}
        if set(outputs) != set(wanted):
            raise TargetError(f"AI Hub returned {sorted(outputs)}, not {sorted(wanted)}.", f"See {job.url}")
        typed = {name: [array.astype(_dtype(wanted[name])) for array in arrays] for name, arrays in outputs.items()}
        return [{name: typed[name][index] for name in wanted} for index in range(len(samples))]

    def profile(self, artifact: Artifact, inputs: Arrays) -> Profile:
        desk, job = self._ran("profile", artifact, [inputs])
        return read_profile(desk.hub.profile(job), self.device, job.url)

    def _ran(self, kind: str, artifact: Artifact, samples: Sequence[Arrays]) -> tuple[Desk, InferenceJob]:
        """A finished job that ran the artifact on the device."""
        fed = [_fitted(artifact, inputs) for inputs in samples]
        desk, binary, data = self._desk(), digest(artifact.files), _digest_of(fed)
        model_id = _uploaded(desk, artifact.files, binary)
        dataset_id = desk.uploaded(f"inputs {data}", desk.hub.knows_samples, lambda: desk.hub.upload_samples(fed))

        def submit(name: str) -> str:
            where = self.device, name, RUN_OPTIONS
            return desk.hub.submit_inference(model_id, dataset_id, *where, profile=kind == "profile")

        job = desk.finished(kind, f"{kind} {binary} on {self.device} with {data}", submit)
        return desk, cast("InferenceJob", job)

    def load(self, folder: Path, target_text: str) -> Artifact:
        if not (folder / CONTEXT_FILE).is_file():
            raise TargetError(f"{folder.name} holds no {CONTEXT_FILE}.", "Compile with --target aihub first.")
        return self._artifact(folder)

    def _artifact(self, folder: Path) -> Artifact:
        """The artifact in a folder."""
        wrapper = read_model(folder / CONTEXT_FILE)
        on_cpu = len(wrapper.graph.node) - len(context_nodes(wrapper))
        details = {"device": self.device, "fallback_nodes": on_cpu, **self._facts(folder / BINARY_FILE)}
        files = (folder / CONTEXT_FILE, folder / BINARY_FILE)
        return Artifact(path=files[0], files=files, target_text=to_text(self), details=details)

    def _facts(self, binary: Path) -> dict[str, Any]:
        """What a binary says of itself.

        Raises:
            TargetError: it is missing, or says that it was built for another SoC.
        """
        try:
            facts = read_binary(binary)
        except TargetError:
            if not binary.is_file():
                raise
            return {"soc": None}  # AI Hub chooses the compiler's version, and not each need leave this text
        chip = self._htp().chip
        if (facts.soc.upper(), facts.htp_arch) != (chip.part.upper(), chip.htp_arch):
            raise TargetError(
                f"{binary.name} was built for {facts.soc} (v{facts.htp_arch}), not for {self.device} ({chip.part}).",
                "Compile for this device.",
            )
        return dataclasses.asdict(facts)

    def _desk(self) -> Desk:
        missing = self.missing()
        if missing:
            raise TargetError(f"the aihub target cannot run here: {missing}")
        from fraqat_compiler.targets.aihub.desk import Desk
        from fraqat_compiler.targets.aihub.hub import Hub

        return Desk(Hub(), self._site.ledger, self._site.progress, self._site.resume)


def _uploaded(desk: Desk, files: Sequence[Path], content: str) -> str:
    """Id of a model at AI Hub, an ONNX file and what belongs to it; `content` is their digest."""

    def upload() -> str:
        with tempfile.TemporaryDirectory() as folder:
            return desk.hub.upload_model(packed(files, Path(folder)))

    return desk.uploaded(_model_key(content), desk.hub.knows_model, upload)


def _model_key(content: str) -> str:
    return f"model {content}"


def _refuse_another_interface(model: Path, compiled: Path) -> None:
    """Inputs and outputs are told apart by their names."""
    wanted, found = _interface(model), _interface(compiled)
    if wanted != found:
        raise TargetError(
            f"AI Hub compiled inputs and outputs {found} from {wanted}.",
            "Give them names of letters, digits and underscores.",
        )


def _interface(model: Path) -> tuple[list[str], list[str]]:
    graph = read_model(model).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def _fitted(artifact: Artifact, inputs: Arrays) -> Arrays:
    """The inputs in the order and types of the artifact.

    Raises:
        TargetError: they do not fit; said here, since AI Hub would say it minutes later.
    """
    wanted = {value.name: value for value in read_model(artifact.path).graph.input}
    if set(inputs) != set(wanted):
        raise TargetError(f"the inputs are {sorted(inputs)}, not {sorted(wanted)}.", "Give every input by its name.")
    return {name: _fitted_array(value, inputs[name]) for name, value in wanted.items()}


def _fitted_array(wanted: ValueInfoProto, array: np.ndarray) -> np.ndarray:
    shape = tuple(dim.dim_value for dim in wanted.type.tensor_type.shape.dim)
    dtype = _dtype(wanted)
    if array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TargetError(
            f"input {wanted.name!r} is {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}.",
            "Give every input in its type and shape.",
        )
    return array.astype(dtype)


def _dtype(value: ValueInfoProto) -> np.dtype:
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _digest_of(samples: Sequence[Arrays]) -> str:
    """Hex digest of arrays with their names, types and shapes."""
    found = hashlib.sha256()
    for name, array in (item for sample in samples for item in sample.items()):
        found.update(f"{name}{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
