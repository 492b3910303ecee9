"""A bundle runs by itself: in a fresh process that knows nothing of the compiler, and it notices what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import fraqat_compiler
from fraqat_compiler.bundling import bundle
from fraqat_compiler.cli import main
from fraqat_compiler.errors import OutputError, TargetError, VerificationError
from fraqat_compiler.manifest import sha256
from fraqat_compiler.targets.htp import HtpTarget

pytestmark = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


def compiled_for(target: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    fraqat_compiler.compile(model, (torch.randn(4, 16),), output=folder, target=target)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_for("htp{soc=sm8650}", tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def made(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "phone"
    bundle(compiled, folder)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "elsewhere")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """run.py in a process that cannot import the compiler from here."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", folder / "run.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def outputs_of(folder: Path) -> list[dict[str, str]]:
    outputs: list[dict[str, str]] = json.loads((folder / "manifest.json").read_text())["outputs"]
    return outputs


def test_the_bundle_runs_elsewhere_in_a_fresh_process(copied: Path) -> None:
    done = run(copied)
    assert done.returncode == 0, done.stderr[-500:]
    (output,) = outputs_of(copied)
    found = re.search(rf"{output['name']}: at most (\S+) off, (\S+) is allowed", done.stdout)
    assert found
    assert float(found[1]) <= float(found[2]) < 0.5


def test_another_input_gives_outputs_that_are_too_far_off(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (entry,) = manifest["inputs"]
    path = copied / entry["file"]
    np.zeros(entry["shape"], entry["dtype"]).tofile(path)
    assert "damaged" in run(copied).stderr
    manifest["files"][entry["file"]]["sha256"] = sha256(path)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    done = run(copied)
    assert (done.returncode, "is allowed" in done.stdout) == (1, True)


@pytest.mark.parametrize("suffix", ["", "_native"])
def test_outputs_of_the_phone_are_compared(suffix: str, copied: Path, tmp_path: Path) -> None:
    (output,) = outputs_of(copied)
    folder = tmp_path / "Result_0"
    folder.mkdir()
    assert "holds no" in run(copied, str(folder)).stderr
    expected = np.fromfile(copied / output["file"], output["dtype"])
    expected.tofile(folder / f"{output['name']}{suffix}.raw")
    assert run(copied, str(folder)).returncode == 0
    (expected + 1).tofile(folder / f"{output['name']}{suffix}.raw")
    assert run(copied, str(folder)).returncode == 1


def test_files_are_those_of_the_compile_and_the_manifest_tells_them(compiled: Path, made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    present = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert present == {*manifest["files"], "manifest.json"}
    assert all(sha256(made / name) == entry["sha256"] for name, entry in manifest["files"].items())
    for name in ("htp_context.onnx", "htp_context_qnn.bin"):
        assert sha256(made / name) == sha256(compiled / name)
    assert manifest["soc"]["soc"] == "SM8650"
    stored = load_file(compiled / "reference.safetensors")
    for kind, prefix in (("inputs", "input:"), ("outputs", "output:")):
        for entry in manifest[kind]:
            raw = np.fromfile(made / entry["file"], entry["dtype"]).reshape(entry["shape"])
            np.testing.assert_array_equal(raw, stored[prefix + entry["name"]])


def test_the_binary_calls_its_graph_and_tensors_as_the_manifest_does(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    content = (made / "htp_context_qnn.bin").read_bytes()
    for name in (manifest["graph"], *(entry["name"] for entry in manifest["inputs"] + manifest["outputs"])):
        assert name.encode() + b"\0" in content


def test_the_commands_are_of_this_model_and_soc(made: Path) -> None:
    text = (made / "README.md").read_text()
    for part in ("--retrieve_context htp_context_qnn.bin", "libQnnHtpV75Skel.so", "SM8650", "/data/local/tmp/phone"):
        assert part in text
    (line,) = (made / "input_list.txt").read_text().splitlines()
    assert all((made / item.partition(":=")[2]).is_file() for item in line.split())
    assert not re.search(r"\$\{|\$(part|arch|binary|model)", text)


def test_a_folder_with_files_is_left_alone(compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        bundle(compiled, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_compile_that_changed_makes_no_bundle(compiled: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(compiled, tmp_path / "damaged")
    (damaged / "reference.safetensors").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"reference\.safetensors has changed"):
        bundle(damaged, tmp_path / "phone")
    assert not (tmp_path / "phone").exists()


def test_a_target_without_bundles_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    compiled = compiled_for("onnxruntime", tmp_path / "compiled")
    with pytest.raises(TargetError, match="makes no bundle"):
        bundle(compiled, tmp_path / "phone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled"]


def test_the_command(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fraqat", "bundle", str(compiled), "-o", str(tmp_path / "phone"), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert "run.py" in json.loads(capsys.readouterr().out)["files"]
