"""The op-support table: it is whole, what it says is what the library says, and `check` tells it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import shape_inference
from torch import nn

import fraqat_compiler
from fraqat_compiler.targets.htp import target as htp_target
from fraqat_compiler.targets.htp.advice import key_of
from fraqat_compiler.targets.htp.op_table import Key, OpTable, load_table, nearest_that_runs
from fraqat_compiler.targets.htp.target import HtpTarget

ROOT = Path(__file__).parents[1]
needs_htp = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))

SAMPLE: tuple[Key, ...] = (
    ("Sigmoid", "", 3, None, 8, ""),
    ("Add", "", 5, None, 16, ""),
    ("Transpose", "", 5, None, 8, ""),
    ("Transpose", "", 6, None, 8, ""),
    ("Erf", "", 4, None, 8, ""),
    ("MatMul", "", 3, 4, 16, "per_channel"),
    ("MatMul", "", 3, 4, 8, "per_block"),
    ("Gemm", "", 2, 4, 8, "per_channel"),
    ("Conv", "", 4, 4, 8, "per_tensor"),
    ("RMSNormalization", "", 3, 8, 16, "per_tensor"),
    ("Resize", "nearest half_pixel floor", 4, None, 8, ""),
    ("ConvTranspose", "grouped", 4, 8, 16, "per_channel"),
)


def table() -> OpTable:
    found = load_table(79)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/probe_htp_ops.py; `tools` is no package."""
    for name in ("htp_op_cases", "probe_htp_ops"):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules["probe_htp_ops"]


def test_the_table_has_a_row_for_each_probe_and_no_other(tool: ModuleType) -> None:
    assert {probe.key for probe in tool.probes()} == set(table().rows)


@needs_htp
@pytest.mark.parametrize("key", SAMPLE, ids=lambda key: " ".join(map(str, key)))
def test_a_row_says_what_the_library_says(key: Key, tool: ModuleType, tmp_path: Path) -> None:
    probe = next(probe for probe in tool.probes() if probe.key == key)
    known, asked = table().rows[key], tool.Prober(HtpTarget(), tmp_path).row(probe)
    assert dataclasses.replace(asked, max_lsb=None, slope=None) == dataclasses.replace(known, max_lsb=None, slope=None)
    assert asked.max_lsb == pytest.approx(known.max_lsb, abs=1)
    assert asked.slope == pytest.approx(known.slope, abs=0.01)


def test_every_verdict_occurs_and_a_refusal_has_a_reason() -> None:
    rows = table().rows.values()
    assert {row.verdict for row in rows} >= {"runs", "refused", "wrong"}
    assert all(row.reason for row in rows if row.verdict == "refused")
    assert all((row.max_lsb is not None) == (row.verdict in ("runs", "wrong")) for row in rows)


def test_a_node_of_a_file_is_found_in_the_table(tool: ModuleType) -> None:
    for key in SAMPLE:
        if key[0] == "Resize":  # rules.py looks at its modes
            continue
        probe = next(probe for probe in tool.probes() if probe.key == key)
        model, _ = sys.modules["htp_op_cases"].GraphBuilder(probe).model((-1.0, 1.0))
        graph = gs.import_onnx(shape_inference.infer_shapes(model))
        (node,) = [node for node in graph.nodes if node.name == "probed"]
        assert key_of(node, table()) == key


@pytest.mark.parametrize(
    ("key", "way"),
    [
        (("Transpose", "", 6, None, 8, ""), "at rank <= 5"),
        (("Conv", "", 4, 4, 8, "per_tensor"), "with scales per channel"),
        (("Erf", "", 4, None, 8, ""), ""),
    ],
)
def test_the_nearest_way_that_runs_is_told(key: Key, way: str) -> None:
    assert nearest_that_runs(table(), key) == way


def probe_file(tool: ModuleType, key: Key, folder: Path) -> Path:
    probe = next(probe for probe in tool.probes() if probe.key == key)
    model, _ = sys.modules["htp_op_cases"].GraphBuilder(probe).model((-3.0, 3.0))
    onnx.save(model, folder / "probe.onnx")
    return folder / "probe.onnx"


@needs_htp
def test_check_tells_how_a_refused_op_would_run(tool: ModuleType, tmp_path: Path) -> None:
    model = probe_file(tool, ("Transpose", "", 6, None, 8, ""), tmp_path)
    (finding,) = HtpTarget().check(model)
    assert finding.verdict == "refused"
    assert finding.remedy.endswith("It runs at rank <= 5.")


@needs_htp
def test_check_calls_wrong_what_no_rule_knows(tool: ModuleType, tmp_path: Path) -> None:
    model = probe_file(tool, ("ConvTranspose", "grouped", 4, 8, 16, "per_channel"), tmp_path)
    (finding,) = HtpTarget().check(model)
    assert (finding.verdict, finding.remedy) == ("wrong", "It is right with scales per tensor.")
    assert "LSB" in finding.reason


@needs_htp
def test_a_table_of_another_version_is_told(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = dataclasses.replace(table(), package_version="1.0.0")
    monkeypatch.setattr(htp_target, "load_table", lambda _: older)
    op, note = HtpTarget().check(probe_file(tool, ("Relu", "", 3, None, 8, ""), tmp_path))
    assert (op.verdict, note.verdict) == ("runs", "runs")
    assert "1.0.0" in note.reason and note.remedy


@needs_htp
@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_to_one_channel_runs(conv: type[nn.Conv2d | nn.ConvTranspose2d], tmp_path: Path) -> None:
    """Its scale per channel is a single one, and 4 bits per tensor are refused with a bias: it gets 8."""
    torch.manual_seed(0)
    model, inputs = conv(8, 1, 3), (torch.randn(1, 8, 6, 6),)
    result = fraqat_compiler.compile(model, inputs, output=tmp_path, target="htp", weights=4, activations=8)
    assert [layer["weight_bits"] for layer in result.report["layers"]] == [8]
    assert result.report["target"]["fallback_nodes"] == 0
    assert result.report["parity"]["target"]["max_lsb"] <= 1.01


@needs_htp
@pytest.mark.parametrize("groups", [4, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_transposed_convolutions_get_the_form_that_is_right(groups: int, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=groups, bias=bias))
    result = fraqat_compiler.compile(
        model, (torch.randn(1, 16, 8, 8),), output=tmp_path / "out", target="htp", steps=0, weights="4"
    )
    parity = result.report["parity"]["target"]
    assert parity["max_lsb"] <= 2
    assert parity["slope"] == pytest.approx(1, abs=0.01)
