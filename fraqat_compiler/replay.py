"""A finished compile, opened again: do its files still do what its report says?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from fraqat_compiler import layerwise, onnx_io, parity
from fraqat_compiler.errors import FraqatError, TargetError, VerificationError
from fraqat_compiler.layerwise import LEAST_COSINE, LayerDistance
from fraqat_compiler.manifest import changed_files
from fraqat_compiler.output_folder import REMOTE_JOBS
from fraqat_compiler.parity import LSB_TOLERANCE, Parity, Runner
from fraqat_compiler.progress import Progress
from fraqat_compiler.registry import parse_target
from fraqat_compiler.report import STAGES, read_report
from fraqat_compiler.target import Arrays, Artifact, Profile, Target

REFERENCE_FILE = "reference.safetensors"
ROUNDING = 1e-3  # of a step, or of a distance in float


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    Attributes:
        name: what.
        holds: whether it does.
        detail: the figures, or why not.
    """

    name: str
    holds: bool
    detail: str


def verify_folder(folder: Path, *, on_target: bool = True, progress: Progress | None = None) -> list[Check]:
    """Verify the output of a compile: its files, the ONNX file, and the distances that its report records.

    The stored inputs run through the file at ORT_DISABLE_ALL, at ORT's default level, and on the target; the outputs
    must be as near to the stored fake-quant outputs as the report says, or within one step of the output's quantizer.

    Args:
        folder: output folder of a compile.
        on_target: run on the target too.
        progress: hears of slow work.

    Raises:
        VerificationError: the folder holds no finished compile.
    """
    report = read_report(folder)
    changed = changed_files(folder)
    stages = [stage for stage in STAGES if on_target or stage != "target"]
    return [
        Check("files", not changed, "; ".join(changed) or "as the manifest says"),
        _attempt("onnx", partial(_verified_file, folder / report["onnx"]["path"])),
        *(
            _attempt(f"parity {stage}", partial(_replayed, folder, report, stage, progress or Progress()))
            for stage in stages
        ),
    ]


def layers_of_target(folder: Path, progress: Progress | None = None) -> list[LayerDistance]:
    """Compare each op of a compile's file on its target with ONNX Runtime, on the inputs it had there.

    Args:
        folder: output folder of a compile.
        progress: hears of slow work.

    Raises:
        VerificationError: the folder holds no finished compile.
        TargetError: the target cannot compile or run the file with its inner tensors as outputs.
    """
    report, progress = read_report(folder), progress or Progress()
    target = _opened(folder, report, progress)
    with progress.phase("compare layers"):
        return layerwise.compare_target(folder / report["onnx"]["path"], target, reference(folder)[0])


def taken_together(folder: Path, layers: Sequence[LayerDistance]) -> list[Check]:
    """A check that fails where each op is right by itself and the whole is not; none otherwise.

    Hardware compilers compute several ops as one, and move some past others. An inner tensor that is an output, as in
    `layers_of_target`, prevents that.

    Args:
        folder: output folder of a compile.
        layers: its ops on the target.

    Raises:
        VerificationError: the folder holds no finished compile.
    """
    whole = read_report(folder)["parity"]["target"]
    cosine = whole and whole["cosine"]
    if cosine is None or cosine >= LEAST_COSINE or any(layer.is_wrong for layer in layers):
        return []
    reason = "each op by itself is right, all of them are not: the target computes some together, wrongly."
    remedy = "Cut the model in two to find them; docs/htp.md names what is known of HTP."
    return [Check("ops together", False, f"cosine {cosine:.6f}; {reason} {remedy}")]


def profile_folder(folder: Path, progress: Progress | None = None) -> Profile:
    """Profile the artifact of a compile on its target, with the stored inputs.

    Args:
        folder: output folder of a compile.
        progress: hears of slow work.

    Raises:
        VerificationError: the folder holds no finished compile.
        TargetError: the target cannot load or run it here.
    """
    progress = progress or Progress()
    target, artifact = loaded(folder, read_report(folder), progress)
    with progress.phase("profile"):
        return target.profile(artifact, reference(folder)[0])


def estimate_folder(folder: Path) -> Profile | None:
    """What the target expects the compiled model to take on the real hardware; None where it cannot tell.

    Raises:
        VerificationError: the folder holds no finished compile.
    """
    report = read_report(folder)
    return parse_target(report["target"]["text"]).estimate(folder / report["onnx"]["path"])


def _attempt(name: str, verify: Callable[[], tuple[bool, str]]) -> Check:
    """A check that raises does not hold, and the others still run."""
    try:
        return Check(name, *verify())
    except FraqatError as error:
        return Check(name, False, str(error))


def _verified_file(path: Path) -> tuple[bool, str]:
    onnx_io.verify(path)
    return True, "the ONNX checker and onnxruntime take it; ONNX's own ops alone; no float copy of a quantized weight"


def _runner(folder: Path, report: dict[str, Any], stage: str, progress: Progress) -> Runner:
    if stage == "target":
        target, artifact = loaded(folder, report, progress)
        return lambda inputs: target.run(artifact, inputs)
    return parity.onnx_runner(folder / report["onnx"]["path"], optimized=stage == "onnx_optimized")


def _opened(folder: Path, report: dict[str, Any], progress: Progress) -> Target:
    target = parse_target(report["target"]["text"])
    missing = target.missing()
    if missing:
        raise TargetError(f'target "{target.name}" cannot run here: {missing}')
    return target.opened(folder / REMOTE_JOBS, progress, resume=False)


def loaded(folder: Path, report: dict[str, Any], progress: Progress) -> tuple[Target, Artifact]:
    """The target, and the artifact that it left in the folder."""
    target = _opened(folder, report, progress)
    try:
        return target, target.load(folder, report["target"]["text"])
    except NotImplementedError:
        raise TargetError(f'target "{target.name}" cannot load an artifact again: it defines no load().') from None


def _replayed(folder: Path, report: dict[str, Any], stage: str, progress: Progress) -> tuple[bool, str]:
    inputs, expected = reference(folder)
    with progress.phase(f"verify {stage.replace('_', ' ')}"):
        actual = _runner(folder, report, stage, progress)(inputs)
    now = parity.compare([expected], [actual], report.get("output_scales", {}))
    recorded = report["parity"][stage]
    return _as_near(now, recorded), f"{_distance(now.to_json())}; recorded {_distance(recorded)}"


def _as_near(now: Parity, recorded: dict[str, Any]) -> bool:
    if now.max_lsb is not None and recorded["max_lsb"] is not None:
        return now.max_lsb <= max(float(recorded["max_lsb"]), LSB_TOLERANCE) + ROUNDING
    return bool(now.max_abs <= recorded["max_abs"] * (1 + ROUNDING) + ROUNDING)


def _distance(figures: dict[str, Any]) -> str:
    unit = f"{figures['max_abs']:.4g}" if figures["max_lsb"] is None else f"{figures['max_lsb']:.2f} LSB"
    return f"at most {unit}, cosine {figures['cosine']:.6f}"


def reference(folder: Path) -> tuple[Arrays, Arrays]:
    """Stored inputs and fake-quant outputs."""
    try:
        stored = load_file(folder / REFERENCE_FILE)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{folder / REFERENCE_FILE} cannot be read: {error}.", "Compile again.") from error
    return dict(_named(stored, "input:")), dict(_named(stored, "output:"))


def _named(stored: Arrays, prefix: str) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix(prefix), array) for name, array in stored.items() if name.startswith(prefix))
