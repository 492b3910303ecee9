"""tools/compare_ort_quantizer.py: what has fallen back is counted, and a quantizer that fails is a row."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from fraqat_compiler.job import Job
from fraqat_compiler.targets.htp import HtpTarget

needs_htp = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "compare_ort_quantizer.py"
    spec = importlib.util.spec_from_file_location("compare_ort_quantizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def task(tool: ModuleType) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    batches = [(torch.randn(4, 16),) for _ in range(2)]
    return tool.Task(Job("tiny", lambda: model, lambda: batches[0]), batches, 8, 8)


@needs_htp
def test_a_layer_norm_with_signed_weights_falls_back(tool: ModuleType, task: Any) -> None:
    found = {}
    for name in ("ort", "ort-per-channel"):
        quantizer = tool.quantizers(HtpTarget())[name]
        found[name] = tool.measure_one(tool.Row("tiny", "W8A8", name), task, quantizer, HtpTarget())
    assert {name: row.error for name, row in found.items()} == {"ort": "", "ort-per-channel": ""}
    assert (found["ort"].fallback, found["ort"].contexts) == ({}, 1)
    assert found["ort-per-channel"].fallback == {"LayerNormalization": 1}
    assert found["ort-per-channel"].contexts == 2
    for row in found.values():
        assert row.to_float.cosine > 0.99
        assert row.to_file.max_lsb <= 4
    assert tool.markdown(list(found.values()))[-1].startswith("| tiny | W8A8 | - · 0 · 1 | ")


def test_what_ends_a_quantizer_is_the_row(tool: ModuleType, task: Any) -> None:
    def broken(*_: object) -> Path:
        raise ValueError("no | such op\nand a long story")

    row = tool.measure_one(tool.Row("tiny", "W8A8", "ort"), task, broken, HtpTarget())
    assert row.error == "ValueError: no | such op"
    assert tool.markdown([row])[-1] == "| tiny | W8A8 | - · fails · - | - · fails · - | - · fails · - | - · fails · - |"
    assert tool.line(row) == "tiny W8A8 ort ValueError: no | such op"


def test_rows_that_a_file_has_are_not_measured_again(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distance = tool.Parity(max_lsb=2.0, mean_lsb=0.5, max_abs=0.1, cosine=0.999, slope=1.01, samples=1)
    known = tool.Row("vit", "W8A8", "ort", nodes=9, contexts=1, fallback={}, to_float=distance, to_file=distance)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([dataclasses.asdict(known)]))
    assert tool.read_rows(rows) == {("vit", "W8A8", "ort"): known}
    assert tool.read_rows(tmp_path / "none.json") == {}

    monkeypatch.setattr(tool, "model_names", lambda: ["vit"])
    monkeypatch.setattr(tool, "measure_one", lambda row, *_: dataclasses.replace(row, error="measured"))
    monkeypatch.setattr(tool, "job_of", lambda name: (Job(name, nn.Identity, lambda: (torch.zeros(1),)), []))
    monkeypatch.setattr(sys, "argv", ["compare", "--precisions", "W8A8", "--json", str(rows)])
    tool.main()
    assert "| vit | W8A8 | fails · 0 · fails | " in capsys.readouterr().out
    assert tool.read_rows(rows)["vit", "W8A8", "ort"] == known


def test_inputs_are_named_in_order_and_weights_are_none(tool: ModuleType, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("b", "w", "a", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Sum", ["b", "w", "a"], ["y"])], "g", values[:3], values[3:], [weight])
    onnx.save(helper.make_model(graph), str(tmp_path / "m.onnx"))
    feeds = tool.feeds_of(tmp_path / "m.onnx", (torch.zeros(2), torch.ones(2)))
    assert list(feeds) == ["b", "a"]
    np.testing.assert_array_equal(feeds["a"], [1, 1])


def test_unknown_names_are_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "--precisions", "W3A3"])
    monkeypatch.setattr(tool, "model_names", lambda: ["vit"])
    with pytest.raises(SystemExit):
        tool.parse_arguments()
