"""The HTP target: check, compile, run and profile through QNN."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

from onnx import NodeProto

from fraqat_compiler.errors import OutputError, TargetError, UsageError
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Sample, Target, TensorRequest
from fraqat_compiler.targets.htp.advice import advise
from fraqat_compiler.targets.htp.bundle import write_bundle
from fraqat_compiler.targets.htp.client import NO_FALLBACK, QnnError, QnnProcess
from fraqat_compiler.targets.htp.context_binary import BinaryFacts, read_binary
from fraqat_compiler.targets.htp.context_model import note, read_context, weight_bytes
from fraqat_compiler.targets.htp.cost_model import estimate, known_models, to_profile
from fraqat_compiler.targets.htp.grids import grid_for
from fraqat_compiler.targets.htp.log_messages import explain
from fraqat_compiler.targets.htp.node_support import Refusal, refusals
from fraqat_compiler.targets.htp.op_counts import count_ops
from fraqat_compiler.targets.htp.op_table import load_table
from fraqat_compiler.targets.htp.profile_csv import NOTES, read_profile
from fraqat_compiler.targets.htp.quantized_io import Codes, dequantized, quantized, strip_boundary
from fraqat_compiler.targets.htp.rules import with_shapes, wrong_nodes
from fraqat_compiler.targets.htp.socs import Soc, find_soc
from fraqat_compiler.targets.htp.unit_probe import QDQ
from fraqat_compiler.targets.model_file import read_model

CONTEXT_FILE = "htp_context.onnx"
BINARY_FILE = "htp_context_qnn.bin"
LOG_FILE = "htp.log"
DEFAULT_SOC = "sm8750"
OLDEST_GLIBC = (2, 35)
SIGNED_FACTORS = 73  # the first architecture that multiplies unsigned by signed 16 bits
LEGALIZE = (  # the graph's ops that the library refuses or computes wrongly, each pass by itself
    "decompose-pad",
    "expand-outer-products",
    "transpose-cumsums",
    "mask-triangles",
    "convolve-average-pools",
    "convolve-unfolds",
    "resample-by-matrices",
    "scatter-rows",
    "weigh-norms",
)


@dataclass(frozen=True)
class HtpTarget(Target):
    """Snapdragon HTP (Hexagon Tensor Processor) through QNN.

    Compiles to a context binary for one SoC with fallback to the CPU forbidden, and runs it in the library's x86
    emulator, whose numbers are the hardware's and whose times are not.

    Options: `soc` is a part, a marketing name or a phone ("Galaxy S25 Ultra"; sm8750 if it is left out), and `device`
    another name of that option; `vtcm_mb` limits the memory the graph may plan with (0: the SoC's own);
    `performance_mode` is QNN's; `optimization` is the effort of the compiler, 1 to 3; `io` says whether the graph takes
    and gives floats, or the 8- or 16-bit codes of its quantizers (`run` takes and gives floats all the same);
    `spill_fill` lets graphs of one application share the memory that what does not fit the VTCM is spilled to.
    """

    name: ClassVar[str] = "htp"
    soc: str = ""
    vtcm_mb: int = 0
    performance_mode: Literal["burst", "balanced", "high_performance", "power_saver", "default"] = "burst"
    optimization: Literal[1, 2, 3] = 3
    io: Literal["float", "quantized"] = "float"
    spill_fill: bool = False
    device: str = ""

    def __post_init__(self) -> None:
        if self.device and self.soc:
            raise UsageError(f"soc={self.soc} and device={self.device} are both given.", "Give one of them.")
        if not 0 <= self.vtcm_mb <= self.chip.vtcm_mb:  # the library would plan with more than there is
            raise UsageError(
                f"vtcm-mb={self.vtcm_mb} does not fit {self.chip.part}.",
                f"It has {self.chip.vtcm_mb:g} MiB; 0 takes all of it.",
            )

    @property
    def chip(self) -> Soc:
        """The SoC that `soc` or `device` means."""
        return find_soc(self.device or self.soc or DEFAULT_SOC)

    @classmethod
    def missing(cls) -> str | None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return "the HTP compiler and emulator exist for Linux on x86-64 only."
        version = tuple(int(part) for part in (platform.libc_ver()[1] or "0").split(".")[:2])
        if platform.libc_ver()[0] == "glibc" and version < OLDEST_GLIBC:
            return f"it needs glibc 2.35 or newer, here is {platform.libc_ver()[1]}: use a newer system or a container."
        if importlib.util.find_spec("onnxruntime_qnn") is None:
            return 'the package onnxruntime-qnn is not installed: pip install "fraqat_compiler[htp]".'
        return None

    def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
        """Symmetric signed weights, unsigned activations, u8 norm weights; `grids` has what HTP needs beside."""
        spec = super().quant_spec(request)
        return spec if isinstance(spec, Unquantized) else grid_for(request, spec)

    def prepare_pipeline(self) -> str:
        """Shapes are simplified last: what the passes before them write out has some too."""
        fusions = "form-quotients,fuse-rms-norm,fuse-gelu,rotate-pairs"
        text = super().prepare_pipeline().replace("decompose-attention", f"{fusions},decompose-attention")
        return ",".join((text, *LEGALIZE, "merge-dimensions,flatten-silus,reduce-rank,simplify-shapes"))

    def lower_pipeline(self) -> str:
        """Opset 23 has RMSNormalization; the rest is what the library refuses or computes wrongly, pass by pass."""
        text = super().lower_pipeline().replace("export-onnx", "export-onnx{opset=23}")
        text = text.replace("share-qdq", "drop-negligible-addends,span-logarithms,share-qdq")
        grids = "convert-widths,align-concats"
        grids += ",sign-factors" if self.chip.htp_arch >= SIGNED_FACTORS else ""
        legalize = f"{grids},decompose-softplus,expand-tanh,flatten-tanh,span-softmax-inputs,expand-constants"
        return text.replace("pack-int4", f"{legalize},widen-codes,pack-int4")

    def check(self, model: Path) -> list[Finding]:
        """Ask the library itself: it prepares the whole graph, and names what it refuses."""
        self._require()
        _refuse_dynamic_shapes(model)
        refused, advice = self._refused(model), advise(with_shapes(model), load_table(self.chip.htp_arch))
        wrong = {(finding.node, finding.op): finding for finding in (*advice.wrong, *wrong_nodes(model))}
        nodes = [
            _finding(node, refused.get(index), wrong, advice.ways)
            for index, node in enumerate(read_model(model).graph.node)
            if node.op_type not in QDQ
        ]
        return [*nodes, *advice.notes]

    def _refused(self, model: Path) -> dict[int, Refusal]:
        try:
            QnnProcess().load(model, self.provider_options(), NO_FALLBACK)
        except QnnError as error:
            return refusals(model, self.provider_options(), error)
        return {}

    def compile(self, model: Path, output: Path) -> Artifact:
        self._require()
        _refuse_dynamic_shapes(model)
        scratch = Path(tempfile.mkdtemp(prefix=".htp-", dir=output))
        try:
            content, codes = self.boundary(model)
            self._compile(model, content, scratch, output / LOG_FILE)
            note(scratch / CONTEXT_FILE, codes, weight_bytes(read_model(model)))
            facts = self.proven(scratch / BINARY_FILE)
            for name in (BINARY_FILE, CONTEXT_FILE):
                (scratch / name).replace(output / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return self._artifact(output, facts)

    def boundary(self, model: Path) -> tuple[bytes | None, dict[str, Codes]]:
        """The model as it is compiled, where that is not what its file holds, and what its codes mean."""
        if self.io == "float":
            return None, {}
        given = read_model(model)
        codes = strip_boundary(given, model.parent)
        return given.SerializeToString(), codes

    def _compile(self, model: Path, content: bytes | None, scratch: Path, log: Path) -> None:
        config = NO_FALLBACK | {
            "ep.context_enable": "1",
            "ep.context_file_path": str((scratch / CONTEXT_FILE).resolve()),
            "ep.context_embed_mode": "0",
        }
        try:
            QnnProcess().load(model, self.provider_options(), config, content=content)
        except QnnError as error:
            if "context cache file" in str(error):  # the library's name for the binary
                raise OutputError(f"{BINARY_FILE} cannot be written.", "Free disk space.") from error
            log.write_text(f"{error}\n{error.log}", encoding="utf-8")
            refused = refusals(model, self.provider_options(), error)
            raise _refusal(model, refused, self.chip) from error

    def run(self, artifact: Artifact, inputs: Arrays) -> Arrays:
        self._require()
        process = self._loaded(artifact)
        codes = read_context(artifact.path).codes
        try:
            return dequantized(process.run(quantized(inputs, codes)), codes)
        except QnnError as error:
            _kept.cache_clear()
            raise _does_not_run(artifact, error) from error

    def _loaded(self, artifact: Artifact) -> QnnProcess:
        """The process that holds the artifact, kept for the next call.

        Raises:
            TargetError: the artifact is missing, damaged, or made for another SoC.
        """
        try:
            changed = tuple(file.stat().st_mtime_ns for file in artifact.files)
            return _kept(artifact.path, changed, self)
        except OSError as error:
            raise TargetError(f"{artifact.path.name} cannot be read: {error.strerror}.", "Compile again.") from error
        except QnnError as error:
            raise _does_not_run(artifact, error) from error

    def profile(self, artifact: Artifact, inputs: Arrays) -> Profile:
        self.run(artifact, inputs)  # what is wrong with the artifact or the inputs is said here
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.csv"
            options = self.provider_options() | {"profiling_level": "detailed", "profiling_file_path": str(path)}
            process = QnnProcess()
            process.load(artifact.path, options, NO_FALLBACK)
            process.run(quantized(inputs, read_context(artifact.path).codes))
            process.unload()
            ops = read_profile(path)
        return Profile(source="simulator", ops=ops, unit="cycles", notes=NOTES)

    def estimate(self, model: Path) -> Profile | None:
        """From what the graph has to do; None for a SoC or mode that was not measured, or where shapes are unknown."""
        known = known_models().get(self.chip.part)
        if known is None or self.performance_mode != "burst":
            return None
        try:
            ops = count_ops(read_model(model))
        except TargetError:  # a compile that the library took must not fail for want of an estimate
            return None
        return to_profile(ops, estimate(ops, known.rates, self.vtcm_mb or self.chip.vtcm_mb), known)

    def load(self, folder: Path, target_text: str) -> Artifact:
        if not (folder / CONTEXT_FILE).is_file():
            raise TargetError(f"{folder.name} holds no {CONTEXT_FILE}.", "Compile with --target htp first.")
        return self._artifact(folder, self.proven(folder / BINARY_FILE))

    def bundle(self, artifact: Artifact, sample: Sample, folder: Path) -> None:
        write_bundle(artifact, self.chip, self.provider_options(), sample, self.run(artifact, sample.inputs), folder)

    def _require(self) -> None:
        missing = self.missing()
        if missing:
            raise TargetError(f"the htp target cannot run here: {missing}")

    def provider_options(self) -> dict[str, str]:
        """The SoC's model and architecture always go together: without the second an unknown SoC silently means v68."""
        options = {
            "soc_model": str(self.chip.soc_model),
            "htp_arch": str(self.chip.htp_arch),
            "htp_performance_mode": self.performance_mode,
            "htp_graph_finalization_optimization_mode": str(self.optimization),
            "offload_graph_io_quantization": "0",
        }
        vtcm = {"vtcm_mb": str(self.vtcm_mb)} if self.vtcm_mb else {}
        return options | vtcm | ({"enable_htp_spill_fill_buffer": "1"} if self.spill_fill else {})

    def proven(self, binary: Path) -> BinaryFacts:
        """Facts of the binary, which must be for this target's SoC.

        Raises:
            TargetError: it was built for another SoC or architecture.
        """
        facts = read_binary(binary)
        if (facts.soc.upper(), facts.htp_arch) != (self.chip.part.upper(), self.chip.htp_arch):
            raise TargetError(
                f"{binary.name} was built for {facts.soc} (v{facts.htp_arch}), not for {self.chip.part} "
                f"(v{self.chip.htp_arch}).",
                "Compile for this SoC.",
            )
        return facts

    def _artifact(self, folder: Path, facts: BinaryFacts) -> Artifact:
        files = (folder / CONTEXT_FILE, folder / BINARY_FILE)
        context = read_context(files[0])
        details = {
            "fallback_nodes": 0,
            **dataclasses.asdict(facts),
            "quantized_io": sorted(context.codes),
            "weight_bytes": context.weight_bytes,
            "binary_bytes_per_weight_byte": round(files[1].stat().st_size / max(context.weight_bytes, 1), 3),
            "spill_fill_bytes": context.spill_fill_bytes,
        }
        return Artifact(path=files[0], files=files, target_text=to_text(self), details=details)


@lru_cache(maxsize=1)
def _kept(path: Path, changed: tuple[int, ...], target: HtpTarget) -> QnnProcess:
    """One process is kept, since a sampler runs one artifact many times; `changed` is part of the key only."""
    target.proven(path.with_name(BINARY_FILE))
    process = QnnProcess()
    process.load(path, target.provider_options(), NO_FALLBACK)
    return process


def _refuse_dynamic_shapes(model: Path) -> None:
    for value in read_model(model).graph.input:
        names = [dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim if not dim.HasField("dim_value")]
        if names:
            raise TargetError(
                f"input {value.name!r} has dynamic dimensions ({', '.join(names)}); the HTP needs static ones.",
                "Export with fixed example inputs.",
            )


def _finding(
    node: NodeProto,
    refusal: Refusal | None,
    wrong: Mapping[tuple[str, str], Finding],
    ways: Mapping[tuple[str, str], str],
) -> Finding:
    if refusal is not None:
        way = ways.get((node.name, node.op_type))
        remedy = f"{refusal.remedy} It runs {way}." if way else refusal.remedy
        return Finding(node.name, node.op_type, "refused", refusal.reason, remedy, refusal.log)
    return wrong.get((node.name, node.op_type)) or Finding(node.name, node.op_type, "runs")


def _refusal(model: Path, refused: dict[int, Refusal], chip: Soc) -> TargetError:
    (index, first), *others = refused.items()
    node = read_model(model).graph.node[index]
    more = f" and {len(others)} more" if others else ""
    return TargetError(
        f"{chip.part} refuses node {node.name or '(unnamed)'} ({node.op_type}){more}: {first.reason}.", first.remedy
    )


def _does_not_run(artifact: Artifact, error: QnnError) -> TargetError:
    return TargetError(
        f"{artifact.path.name} does not run: {explain(str(error), error.log)}.",
        "Give every input in its type and shape; compile again if the file is damaged.",
    )
