"""A third party's pass and target, installed for real and used from another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = Path(__file__).parent / "plugin"


def install(project: Path, site: Path, scratch: Path) -> None:
    """From a copy, because a build leaves files beside the sources."""
    copy = shutil.copytree(project, scratch / project.name, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(copy)], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("example")
    install(PROJECT, site, tmp_path_factory.mktemp("scratch"))
    return site


@pytest.fixture(scope="module")
def misfits(example: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH with the good plug-in and both bad ones."""
    sites = [example]
    for name in ("broken", "clashing"):
        sites.append(tmp_path_factory.mktemp(name))
        install(PROJECT / name, sites[-1], tmp_path_factory.mktemp("scratch"))
    return os.pathsep.join(map(str, sites))


def run(script: str, path: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def errors(misfits: str) -> dict[str, str]:
    """What the use of each bad name says, asked in one process."""
    script = """
import json
from fraqat_compiler import registry
from fraqat_compiler.errors import UsageError
def error_of(name):
    try:
        registry.parse_pipeline(f"remove-no-ops,{name}")
    except UsageError as error:
        return str(error)
names = ["shatter", "missing-class", "not-a-pass", "unfinished", "misnamed", "pack-int4"]
print(json.dumps({name: error_of(name) for name in names}))
"""
    texts: dict[str, str] = json.loads(run(script, misfits))
    return texts


def test_the_pass_runs_in_a_pipeline(example: Path) -> None:
    script = """
import torch
from fraqat_compiler.instruments import Verification
from fraqat_compiler.pass_manager import PassManager
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.GELU()).eval()
inputs = torch.linspace(-3, 3, 8).reshape(2, 4)
program = torch.export.export(model, (inputs,)).run_decompositions({})
pipeline = PassManager.from_text("approximate-gelu{skip=2}")
assert str(pipeline) == "approximate-gelu{skip=2}"
graph, (record,) = pipeline.run(program.module(check_guards=False), instruments=[Verification()])
model[1] = torch.nn.GELU(approximate="tanh")
assert torch.equal(graph(inputs), model(inputs))
print(record.name, record.modified, record.changes)
"""
    assert run(script, example).strip() == "approximate-gelu True ('approximated gelu',)"


def test_the_target_compiles_runs_and_profiles(example: Path, tmp_path: Path) -> None:
    script = f"""
import numpy as np, torch
from pathlib import Path
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import TensorRequest
target = parse_target("host-a16{{threads=2}}")
assert target.quant_spec(TensorRequest("linear", "activation", (2, 4), 8, 8)).bit_width == 16
assert target.quant_spec(TensorRequest("linear", "weight", (4, 4), 4, 8, channel_axis=0)).bit_width == 4
model, folder = torch.nn.Linear(4, 3).eval(), Path({str(tmp_path)!r})
inputs = torch.randn(2, 4)
torch.onnx.export(model, (inputs,), folder / "linear.onnx", dynamo=True, input_names=["x"], output_names=["y"])
assert {{finding.verdict for finding in target.check(folder / "linear.onnx")}} == {{"runs"}}
(folder / "out").mkdir()
artifact = target.compile(folder / "linear.onnx", folder / "out")
assert parse_target(artifact.target_text) == target
outputs = target.run(target.load(folder / "out", artifact.target_text), {{"x": inputs.numpy()}})
np.testing.assert_allclose(outputs["y"], model(inputs).detach().numpy(), rtol=1e-5, atol=1e-6)
print(target.profile(artifact, {{"x": inputs.numpy()}}).source)
"""
    assert run(script, example).strip().endswith("host")


def test_the_target_keeps_the_contract(example: Path) -> None:
    script = """
from fraqat_compiler.conformance import check_target
from fraqat_compiler.registry import parse_target
print(len(check_target(parse_target("host-a16{threads=2}"))))
"""
    assert run(script, example).strip() == "15"


def test_listings_show_the_owner_and_what_is_wrong(misfits: str) -> None:
    script = """
import dataclasses, json
from fraqat_compiler.registry import available
print(json.dumps([dataclasses.asdict(row) for row in available("passes") + available("targets")]))
"""
    rows = json.loads(run(script, misfits))
    (plugin,) = (row for row in rows if row["name"] == "approximate-gelu")
    assert plugin == {
        "name": "approximate-gelu",
        "owner": "fraqat-example-plugin 1.2.0",
        "irs": "fx -> fx",
        "summary": "Compute every exact GELU by its tanh approximation.",
        "error": None,
    }
    faulty = {row["name"] for row in rows if row["error"]}
    assert faulty == {"shatter", "missing-class", "not-a-pass", "unfinished", "misnamed", "pack-int4"}
    owners = {row["owner"] for row in rows if row["name"] == "pack-int4"}
    assert owners == {"fraqat_compiler", "fraqat-clashing-plugin 0.1"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shatter", "RuntimeError: no licence found"),
        ("missing-class", "has no attribute 'Missing'"),
        ("not-a-pass", "it is not a subclass of fraqat_compiler.pass_base.Pass"),
        ("unfinished", "it lacks run"),
        ("misnamed", "the class calls itself 'another-name'"),
    ],
)
def test_a_broken_pass_names_its_distribution(name: str, reason: str, errors: dict[str, str]) -> None:
    assert "of fraqat-broken-plugin 0.1 cannot be used" in errors[name]
    assert reason in errors[name]
    assert "uninstall fraqat-broken-plugin." in errors[name]


def test_a_name_defined_twice_names_both_owners(errors: dict[str, str]) -> None:
    assert 'the pass "pack-int4" is defined more than once' in errors["pack-int4"]
    assert "fraqat_compiler (" in errors["pack-int4"]
    assert "fraqat-clashing-plugin 0.1 (" in errors["pack-int4"]


def test_bad_plug_ins_harm_nobody_else(misfits: str) -> None:
    script = """
import sys
from fraqat_compiler.pass_manager import PassManager
print(PassManager.from_text("remove-no-ops,approximate-gelu"))
assert not any(name.startswith(("fraqat_broken", "fraqat_clashing")) for name in sys.modules)
"""
    assert run(script, misfits).strip() == "remove-no-ops,approximate-gelu"
