"""Conformance: whether a target keeps the contract of `fraqat_compiler.target`, tried on a small real model.

from fraqat_compiler.conformance import check_target

check_target(MyTarget())  # raises VerificationError, naming the rule that does not hold
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import numpy as np
import onnx

from fraqat_compiler import parity
from fraqat_compiler.conformance_case import Case, make_case
from fraqat_compiler.errors import FraqatError, TargetError, VerificationError
from fraqat_compiler.ops import OP_CLASSES
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.pipeline_text import build, parse_one, to_text
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import Arrays, Artifact, Role, Sample, Source, Target, TensorRequest

# Outputs in float or at more than 8 bits are measured in steps of an 8-bit quantizer over the reference's range:
# integer hardware that works as it should strays by tens of 16-bit steps.
FINEST_STEPS = 255
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_ROUNDING = 1e-3  # LSB; float32 noise of the comparison itself


@dataclass(frozen=True)
class Result:
    """One rule that holds.

    Attributes:
        rule: what every target must do.
        detail: what was seen.
    """

    rule: str
    detail: str


class _BrokenRuleError(Exception):
    """A rule does not hold; becomes a VerificationError that names it."""


def check_target(target: Target) -> tuple[Result, ...]:
    """Take a target through its contract: text, specs, pipelines, check, compile, run, profile, load, bundle, errors.

    Returns:
        One result for each rule, in the order in which they were tried.

    Raises:
        VerificationError: a rule does not hold; the message names the target, the rule and what was seen.
    """
    with tempfile.TemporaryDirectory(prefix="fraqat-conformance-") as folder:
        trial = _Trial(target, Path(folder))
        return tuple(_tried(trial, rule, attempt) for rule, attempt in _RULES.items())


def _tried(trial: _Trial, rule: str, attempt: Callable[[_Trial], str]) -> Result:
    try:
        with _silent_stdout():
            return Result(rule, attempt(trial))
    except Exception as error:  # whatever a third party's code raises, the rule must be named
        seen = str(error) if isinstance(error, _BrokenRuleError) else f"{type(error).__name__}: {error}"
        raise VerificationError(f'target "{trial.target.name}" breaks the rule "{rule}": {seen}') from error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _BrokenRuleError(otherwise)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Hold what is called to an empty stdout, native libraries too: there the command line prints its one answer."""
    with tempfile.TemporaryFile() as caught:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
        caught.seek(0)
        printed = caught.read().decode(errors="replace")
    _require(not printed, f"it prints {printed[:80]!r} on stdout.")


@dataclass(frozen=True)
class _Trial:
    """One target under trial, with what its own methods made along the way."""

    target: Target
    folder: Path

    @cached_property
    def case(self) -> Case:
        return make_case(self.target, self.new_folder("case"))

    @cached_property
    def artifact(self) -> Artifact:
        return self.target.compile(self.case.model, self.new_folder("compiled"))

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def copied_artifact(self, name: str) -> Path:
        """A new folder with a copy of every file of the artifact."""
        folder, root = self.new_folder(name), self.folder / "compiled"
        for file in self.artifact.files:
            copy = folder / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        return folder

    def must_refuse(self, what: str, action: Callable[[], object]) -> None:
        """Require a FraqatError, and not just any, from an action."""
        try:
            action()
        except FraqatError:
            return
        except Exception as error:
            raise _BrokenRuleError(f"{what} ends in {type(error).__name__} ({error}), not in a FraqatError.") from error
        raise _BrokenRuleError(f"{what} is accepted.")


def _text(trial: _Trial) -> str:
    text = to_text(trial.target)
    item = parse_one(text, "a target")
    _require(item.name == trial.target.name, f"its text {text!r} begins with another name.")
    _require(build(type(trial.target), item.options) == trial.target, f"{text!r} parses back to another target.")
    return text


def _missing(trial: _Trial) -> str:
    missing = trial.target.missing()
    _require(missing is None, f"it cannot run here: {missing}")
    return "nothing"


def _quant_spec(trial: _Trial) -> str:
    widths = (4.0, 8.0, 5.5)
    cases = list(itertools.product(OP_CLASSES, get_args(Role), widths, (8.0, 16.0), (False, True)))
    for op, role, weight_width, activation_width, depthwise in cases:
        _require_usable(trial.target, _request(op, role, weight_width, activation_width, depthwise))
    return f"{len(cases)} requests"


def _request(op: str, role: Role, weight_width: float, activation_width: float, depthwise: bool) -> TensorRequest:
    is_weight = role == "weight"
    return TensorRequest(
        op=op,
        role=role,
        shape=(64,) if role in ("bias", "norm_weight") else (64, 32),
        bit_width=weight_width if is_weight else activation_width,
        activation_bit_width=activation_width,
        channel_axis=0 if is_weight else None,
        depthwise=depthwise and is_weight,
    )


def _require_usable(target: Target, request: TensorRequest) -> None:
    spec = target.quant_spec(request)
    if isinstance(spec, Unquantized):
        _require(bool(spec.reason), f"{request} is left in float without a reason.")
        return
    _require(isinstance(spec, QuantSpec), f"{request} is answered by {spec!r}.")
    rank = len(request.shape)
    _require(spec.axis is None or -rank <= spec.axis < rank, f"{request} gets the axis {spec.axis}.")
    whole = not float(request.bit_width).is_integer() or spec.is_integer
    _require(whole, f"{request} gets the fractional width {spec.bit_width}.")


def _pipelines(trial: _Trial) -> str:
    texts = trial.target.prepare_pipeline(), trial.target.lower_pipeline()
    prepare, lower = (PassManager.from_text(text).passes for text in texts)
    _require(all(item.writes == "fx" for item in prepare), "prepare_pipeline leaves the FX graph.")
    _require(bool(lower) and lower[0].reads == "fx", "lower_pipeline does not begin with an FX graph.")
    _require(lower[-1].writes == "onnx", "lower_pipeline does not end with an ONNX graph.")
    return f"{len(prepare)} and {len(lower)} passes"


def _check(trial: _Trial) -> str:
    before = trial.case.model.read_bytes()
    findings = trial.target.check(trial.case.model)
    graph = onnx.load(str(trial.case.model), load_external_data=False).graph
    nodes = {(node.name, node.op_type) for node in graph.node}
    found = {(finding.node, finding.op) for finding in findings}
    _require(found <= nodes, f"check speaks of {sorted(found - nodes)[:1]}, which the file does not hold.")
    unheard = [name for name, op in sorted(nodes - found) if op not in _QDQ]
    _require(not unheard, f"check says nothing of {unheard[:3]}.")
    refused = [f"{finding.node}: {finding.reason}" for finding in findings if finding.verdict != "runs"]
    _require(not refused, f"the model that its own pipelines made is refused at {refused[:1]}.")
    _require(trial.case.model.read_bytes() == before, "check changes the file.")
    return f"{len(findings)} nodes"


def _compile(trial: _Trial) -> str:
    artifact, root = trial.artifact, trial.folder / "compiled"
    _require(artifact.path in artifact.files, "the artifact's path is not among its files.")
    for file in artifact.files:
        _require(file.is_file() and file.is_relative_to(root), f"{file.name} is not in the output folder.")
    hidden = [path.name for path in root.rglob(".*")]
    _require(not hidden, f"scratch files are left behind: {hidden[:3]}.")
    _require(artifact.target_text == to_text(trial.target), f"the artifact says {artifact.target_text!r}.")
    details = json.dumps(dict(artifact.details))
    _require(str(trial.folder) not in details, "the details hold an absolute path.")
    return f"{len(artifact.files)} files, {artifact.bytes} bytes"


def _same_bytes(trial: _Trial) -> str:
    first = trial.artifact
    again = trial.target.compile(trial.case.model, trial.new_folder("again"))
    for one, other in zip(sorted(first.files), sorted(again.files), strict=True):
        _require(one.name == other.name, f"a second compile names its file {other.name}, not {one.name}.")
        _require(one.read_bytes() == other.read_bytes(), f"a second compile gives another {one.name}.")
    _require(again.details == first.details, "a second compile gives other details.")
    return f"{len(first.files)} files"


def _run(trial: _Trial) -> str:
    return _distance(trial, trial.artifact)


def _distance(trial: _Trial, artifact: Artifact) -> str:
    case = trial.case
    first, *others = case.inputs
    actuals = [trial.target.run(artifact, first), *trial.target.run_all(artifact, others)]
    for expected, actual in zip(case.outputs, actuals, strict=True):
        _require(set(actual) == set(expected), f"the outputs are called {sorted(actual)}, not {sorted(expected)}.")
        same_types = all(actual[name].dtype == array.dtype for name, array in expected.items())
        _require(same_types, "an output has another type than in the file.")
    found = parity.compare(case.outputs, actuals, {name: _step(case, name) for name in case.scales})
    distance = found.max_lsb or 0.0
    _require(distance <= parity.LSB_TOLERANCE + _ROUNDING, f"an output strays by {distance:.2f} LSB.")
    return f"{distance:.2f} LSB at most over {found.samples} inputs"


def _step(case: Case, name: str) -> float:
    """Step of an output's quantizer, or of an 8-bit one over the reference's range where that is coarser."""
    values = np.concatenate([output[name].ravel() for output in case.outputs])
    return max(case.scales[name] or 0.0, float(np.ptp(values)) / FINEST_STEPS)


def _profile(trial: _Trial) -> str:
    start = time.perf_counter()
    profile = trial.target.profile(trial.artifact, trial.case.inputs[0])
    milliseconds = 1e3 * (time.perf_counter() - start)
    _require(profile.source in get_args(Source), f"the source {profile.source!r} is none of {get_args(Source)}.")
    latency = profile.latency_ms
    if profile.source == "simulator":
        _require(latency is None, "a simulator claims to know a latency.")
    else:
        _require(latency is not None and latency > 0, f"the latency is {latency}.")
    if profile.source == "host" and latency is not None:
        _require(latency <= milliseconds, f"{latency} ms are claimed, but profiling took {milliseconds:.1f} ms in all.")
    unnamed = [op for op in profile.ops if "name" not in op or profile.unit not in op]
    _require(not unnamed, f'an op lacks "name" or the unit {profile.unit!r}: {unnamed[:1]}.')
    json.dumps(dataclasses.asdict(profile))
    estimate = trial.target.estimate(trial.case.model)
    _require(estimate is None or estimate.source == "estimate", "an estimate says that it is something else.")
    return f"source {profile.source}, {len(profile.ops)} ops"


def _load(trial: _Trial) -> str:
    folder = trial.copied_artifact("moved")
    loaded = trial.target.load(folder, trial.artifact.target_text)
    root = trial.folder / "compiled"
    expected = {folder / file.relative_to(root) for file in trial.artifact.files}
    _require(set(loaded.files) == expected, "load finds other files than compile made.")
    _require(loaded.details == trial.artifact.details, "load tells other details than compile.")
    return _distance(trial, loaded)


def _bundle(trial: _Trial) -> str:
    case, folder = trial.case, trial.new_folder("bundle")
    steps = {name: step for name, step in case.scales.items() if step is not None}
    sample = Sample(case.inputs[0], case.outputs[0], steps)
    try:
        trial.target.bundle(trial.artifact, sample, folder)
    except TargetError:
        _require(not any(folder.iterdir()), "it makes no bundle, but leaves files.")
        return "none"
    files = [path for path in folder.rglob("*") if path.is_file()]
    _require(bool(files), "the bundle is empty.")
    telling = [path.name for path in files if str(trial.folder).encode() in path.read_bytes()]
    _require(not telling, f"a path of this machine is in {telling[:1]} of the bundle.")
    return f"{len(files)} files"


def _refuse_nothing(trial: _Trial) -> str:
    empty, text = trial.new_folder("empty"), to_text(trial.target)
    trial.must_refuse("load of an empty folder", lambda: trial.target.load(empty, text))
    trial.must_refuse("check of a file that is not there", lambda: trial.target.check(empty / "no.onnx"))
    return "both refused"


def _refuse_broken_model(trial: _Trial) -> str:
    output, text = trial.new_folder("from_broken"), to_text(trial.target)
    broken = trial.new_folder("broken") / "model.onnx"
    broken.write_bytes(trial.case.model.read_bytes()[:-200])
    trial.must_refuse("check of a truncated model", lambda: trial.target.check(broken))
    trial.must_refuse("compile of a truncated model", lambda: trial.target.compile(broken, output))
    trial.must_refuse("load of what a failed compile left", lambda: trial.target.load(output, text))
    return "check, compile and load refused"


def _refuse_broken_artifact(trial: _Trial) -> str:
    for number, file in enumerate(trial.artifact.files):
        folder = trial.copied_artifact(f"damaged_{number}")
        damaged = folder / file.relative_to(trial.folder / "compiled")
        damaged.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        trial.must_refuse(f"{file.name} cut in half", partial(_load_and_run, trial, folder))
        damaged.unlink()
        trial.must_refuse(f"an artifact without {file.name}", partial(_load_and_run, trial, folder))
    return f"{len(trial.artifact.files)} files"


def _load_and_run(trial: _Trial, folder: Path) -> Arrays:
    artifact = trial.target.load(folder, trial.artifact.target_text)
    return trial.target.run(artifact, trial.case.inputs[0])


def _refuse_wrong_inputs(trial: _Trial) -> str:
    ((name, array),) = trial.case.inputs[0].items()
    wrong: dict[str, Arrays] = {
        "no input": {},
        "another name": {"no_such_input": array},
        "another shape": {name: array[..., :-1].copy()},
        "text for numbers": {name: array.astype(str)},  # a target may convert numbers, if the result is right
    }
    for what, inputs in wrong.items():
        trial.must_refuse(f"a run with {what}", partial(trial.target.run, trial.artifact, inputs))
    return _distance(trial, trial.artifact)


_RULES: dict[str, Callable[[_Trial], str]] = {
    "its text parses back to it": _text,
    "nothing is missing here": _missing,
    "quant_spec answers for every op, role and width": _quant_spec,
    "its pipelines lead from FX to ONNX": _pipelines,
    "check says of its own model that every node runs": _check,
    "compile leaves an artifact and no scratch files": _compile,
    "the same model gives the same bytes": _same_bytes,
    "run computes the model within 1 LSB": _run,
    "profile says where its figures come from": _profile,
    "load finds the artifact in another folder": _load,
    "a bundle is made, or refused and nothing left": _bundle,
    "what is not there is refused": _refuse_nothing,
    "a broken model is refused and leaves no artifact": _refuse_broken_model,
    "a broken artifact is refused": _refuse_broken_artifact,
    "wrong inputs are refused, and a run after them is right": _refuse_wrong_inputs,
}
