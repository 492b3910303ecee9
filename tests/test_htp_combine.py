"""Two shapes of one model in one context binary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.errors import OutputError, UsageError, VerificationError
from fraqat_compiler.manifest import sha256
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.client import NO_FALLBACK, QnnError, QnnProcess
from fraqat_compiler.targets.htp.combine import combine, main

pytestmark = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 1024)
        self.down = nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def compiled(folder: Path, rows: int, target: str = "htp{io=quantized}") -> Path:
    torch.manual_seed(0)
    model = Mlp()
    fraqat_compiler.compile(model, (torch.randn(rows, 256),), output=folder, target=target, weights=8)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("combine")
    return [compiled(root / "decode", 1), compiled(root / "prefill", 16)]


def test_common_weights_are_there_once(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "both"
    assert main([*map(str, folders), "-o", str(output)]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((output / "combined.json").read_text())
    present = {path.name for path in output.iterdir()}
    assert present == {"decode.onnx", "prefill.onnx", manifest["binary"], "combined.json"}
    assert all(sha256(output / name) == entry["sha256"] for name, entry in manifest["files"].items())
    weights = 2 * 256 * 1024
    assert manifest["bytes_apart"] > 2 * weights
    assert weights < manifest["bytes"] < 0.65 * manifest["bytes_apart"]
    content = (output / manifest["binary"]).read_bytes()
    names = {entry["graph"] for entry in manifest["graphs"].values()}
    assert len(names) == 2
    assert all(name.encode() + b"\0" in content for name in names)
    with pytest.raises(QnnError, match="ended with status -11"):  # docs/htp.md says so; a library that can is news
        QnnProcess().load(output / "decode.onnx", HtpTarget().provider_options(), NO_FALLBACK)


def test_what_does_not_belong_together_is_refused(folders: list[Path], tmp_path: Path) -> None:
    other = compiled(tmp_path / "other", 1, "htp{soc=sm8650}")
    host = compiled(tmp_path / "host", 1, "onnxruntime")
    for wrong, what in (
        ([folders[0]], "two or more"),
        ([folders[0], folders[0]], "different names"),
        ([folders[0], other], "different options: htp"),
        ([folders[0], host], "for onnxruntime, not for htp"),
    ):
        with pytest.raises(UsageError, match=what):
            combine(wrong, tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        combine(folders, tmp_path)
    assert main([str(tmp_path), str(other), "-o", str(tmp_path / "out")]) == 1
    (host / "model.onnx").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"model\.onnx has changed"):
        combine([host, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
