"""The built-in targets keep the contract, and a target that does not is told which rule it breaks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from fraqat_compiler import conformance
from fraqat_compiler.conformance import check_target
from fraqat_compiler.conformance_case import Case, make_case
from fraqat_compiler.errors import TargetError, VerificationError
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import Arrays, Artifact, Finding, Profile, Sample, TensorRequest
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.onnxruntime import OnnxRuntimeTarget


@pytest.mark.parametrize(
    "text",
    [
        "onnxruntime",
        "onnxruntime{optimization=basic threads=1}",
        "onnxruntime{offline=true}",
        "htp",
        "htp{io=quantized}",
    ],
)
def test_a_built_in_target_keeps_every_rule(text: str) -> None:
    target = parse_target(text)
    if target.missing():
        pytest.skip(str(target.missing()))
    results = check_target(target)
    assert len({result.rule for result in results}) == len(results) == 15
    assert all(result.detail for result in results)


def test_each_precision_policy_is_lowered_as_asked() -> None:
    """A target that leaves everything in float, and one that asks for 16 bits, keep the contract too."""

    @dataclass(frozen=True)
    class InFloat(OnnxRuntimeTarget):
        def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
            return Unquantized("float only")

    @dataclass(frozen=True)
    class Wide(OnnxRuntimeTarget):
        def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
            spec = super().quant_spec(request)
            return spec if request.role == "bias" else dataclasses.replace(spec, bit_width=16)

    assert check_target(InFloat())
    assert check_target(Wide())


def breaking(method: str, replacement: Callable[..., Any]) -> OnnxRuntimeTarget:
    """A target with one method that errs."""
    broken = type("Broken", (OnnxRuntimeTarget,), {method: replacement})
    return dataclass(frozen=True)(broken)()


def negated(self: OnnxRuntimeTarget, artifact: Artifact, inputs: Arrays) -> Arrays:
    return {name: -array for name, array in OnnxRuntimeTarget.run(self, artifact, inputs).items()}


def renamed(self: OnnxRuntimeTarget, artifact: Artifact, inputs: Arrays) -> Arrays:
    return {f"{name}_": array for name, array in OnnxRuntimeTarget.run(self, artifact, inputs).items()}


def widened(self: OnnxRuntimeTarget, artifact: Artifact, inputs: Arrays) -> Arrays:
    return {k: array.astype(np.float64) for k, array in OnnxRuntimeTarget.run(self, artifact, inputs).items()}


def forgiving(self: OnnxRuntimeTarget, artifact: Artifact, inputs: Arrays) -> Arrays:
    try:
        return OnnxRuntimeTarget.run(self, artifact, inputs)
    except Exception:
        return {}


def printing(self: OnnxRuntimeTarget, artifact: Artifact, inputs: Arrays) -> Arrays:
    os.write(1, b"native chatter\n")
    return OnnxRuntimeTarget.run(self, artifact, inputs)


def raw_error(self: OnnxRuntimeTarget, folder: Path, target_text: str) -> Artifact:
    if not (folder / "model.onnx").exists():
        raise KeyError("model.onnx")
    return OnnxRuntimeTarget.load(self, folder, target_text)


def elsewhere(self: OnnxRuntimeTarget, model: Path, output: Path) -> Artifact:
    return dataclasses.replace(OnnxRuntimeTarget.compile(self, model, output), path=model, files=(model,))


def untidy(self: OnnxRuntimeTarget, model: Path, output: Path) -> Artifact:
    (output / ".scratch").write_text("")
    return OnnxRuntimeTarget.compile(self, model, output)


def unstable(self: OnnxRuntimeTarget, model: Path, output: Path) -> Artifact:
    artifact = OnnxRuntimeTarget.compile(self, model, output)
    return dataclasses.replace(artifact, details={"folder": output.name})


def leaking(self: OnnxRuntimeTarget, model: Path, output: Path) -> Artifact:
    artifact = OnnxRuntimeTarget.compile(self, model, output)
    return dataclasses.replace(artifact, details={"folder": str(output)})


def careless(self: OnnxRuntimeTarget, model: Path, output: Path) -> Artifact:
    onnx.save(onnx.ModelProto(), str(output / "model.onnx"))
    return OnnxRuntimeTarget.compile(self, model, output)


def trusting(self: OnnxRuntimeTarget, folder: Path, target_text: str) -> Artifact:
    """Loads the whole file of an earlier compile in place of a damaged one."""
    damaged = folder.name.startswith("damaged")
    return OnnxRuntimeTarget.load(self, folder.parent / "compiled" if damaged else folder, target_text)


def half_made(self: OnnxRuntimeTarget, artifact: Artifact, sample: Sample, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(artifact.path.read_bytes())
    raise TargetError("the phone is not known.", "Name another.")


def telling(self: OnnxRuntimeTarget, artifact: Artifact, sample: Sample, folder: Path) -> None:
    (folder / "run.sh").write_text(f"cat {artifact.path}")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """What every target with the default specs and pipelines is tried on, lowered once."""
    return make_case(OnnxRuntimeTarget(), tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize(
    ("method", "replacement", "rule"),
    [
        ("missing", classmethod(lambda cls: "a licence."), "nothing is missing here"),
        ("quant_spec", lambda self, request: None, "quant_spec answers"),
        ("quant_spec", lambda self, request: Unquantized(""), "quant_spec answers"),
        ("quant_spec", lambda self, request: QuantSpec(bit_width=4.5), "quant_spec answers"),
        ("quant_spec", lambda self, request: QuantSpec(axis=2), "quant_spec answers"),
        ("prepare_pipeline", lambda self: "no-such-pass", "its pipelines lead"),
        ("lower_pipeline", lambda self: "freeze-bit-width", "its pipelines lead"),
        ("check", lambda self, model: [], "check says"),
        ("check", lambda self, model: [Finding("0/Conv", "Conv", "refused", "no kernel")], "check says"),
        ("check", lambda self, model: [Finding("no_such_node", "Conv", "runs")], "check says"),
        ("check", lambda self, model: OnnxRuntimeTarget.check(self, model)[:-5], "check says"),
        ("compile", elsewhere, "compile leaves"),
        ("compile", untidy, "compile leaves"),
        ("compile", leaking, "compile leaves"),
        ("compile", unstable, "the same bytes"),
        ("run", negated, "run computes"),
        ("run", renamed, "run computes"),
        ("run", widened, "run computes"),
        ("run", printing, "run computes"),
        ("profile", lambda self, artifact, inputs: Profile(source="host", latency_ms=1e9), "profile says"),
        ("profile", lambda self, artifact, inputs: Profile(source="simulator", latency_ms=1.0), "profile says"),
        ("profile", lambda self, artifact, inputs: Profile(source="device"), "profile says"),
        ("profile", lambda self, artifact, inputs: Profile(source="guess", latency_ms=1.0), "profile says"),
        (
            "profile",
            lambda self, artifact, inputs: Profile(source="host", latency_ms=1e-3, ops=({"name": "a"},)),
            "profile says",
        ),
        ("bundle", lambda self, artifact, sample, folder: None, "a bundle is made"),
        ("bundle", half_made, "a bundle is made"),
        ("bundle", telling, "a bundle is made"),
        ("load", raw_error, "what is not there"),
        ("compile", careless, "a broken model"),
        ("load", trusting, "a broken artifact"),
        ("run", forgiving, "wrong inputs"),
    ],
)
def test_the_broken_rule_is_named(
    method: str, replacement: Callable[..., Any], rule: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "make_case", lambda target, folder: case)
    with pytest.raises(VerificationError, match=f'target "onnxruntime" breaks the rule ".*{rule}'):
        check_target(breaking(method, replacement))


def test_options_that_no_text_can_hold_are_a_broken_rule() -> None:
    @dataclass(frozen=True)
    class Odd(OnnxRuntimeTarget):
        name: ClassVar[str] = "odd"
        widths: dict[str, int] = dataclasses.field(default_factory=dict)

    with pytest.raises(VerificationError, match="its text parses back"):
        check_target(Odd(widths={"a": 4}))


def test_a_missing_package_is_the_first_thing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HtpTarget, "missing", classmethod(lambda cls: "the package onnxruntime-qnn is not installed."))
    with pytest.raises(VerificationError, match="onnxruntime-qnn is not installed"):
        check_target(HtpTarget())
