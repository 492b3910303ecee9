"""tools/compare_ort_quantizer.py: what has fallen back is counted, and a quantizer that fails is a row."""

from __future__ import annotations

import importlib.util
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
    assert "1 (1 LayerNormalization) | 2" in tool.markdown(list(found.values()))[-1]


def test_what_ends_a_quantizer_is_the_row(tool: ModuleType, task: Any) -> None:
    def broken(*_: object) -> Path:
        raise ValueError("no | such op\nand a long story")

    row = tool.measure_one(tool.Row("tiny", "W8A8", "ort"), task, broken, HtpTarget())
    assert row.error == "ValueError: no | such op"
    assert tool.markdown([row])[-1] == "| tiny | W8A8 | ort | ValueError: no / such op |  |  |  |  |  |"


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
