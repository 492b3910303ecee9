"""The optimizers that users run on a file: each is run for real, and each outcome is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lowering import fake_quantized, lowered
from torch import nn

from fraqat_compiler import onnx_io, survival
from fraqat_compiler.target import Arrays


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Arrays, dict[str, float | None]]:
    torch.manual_seed(0)
    inputs = torch.randn(4, 16)
    graph = lowered(fake_quantized(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), (inputs,)))
    path = tmp_path / "model.onnx"
    onnx_io.save(graph, path)
    return path, {graph.inputs[0].name: inputs.numpy()}, {graph.outputs[0].name: 0.01}


def test_every_optimizer_leaves_a_packed_file_as_it_is(saved: tuple[Path, Arrays, dict[str, float | None]]) -> None:
    path, feeds, scales = saved
    before = path.read_bytes()
    rows = survival.survey(path, [feeds], scales)
    assert [(row["name"], row["outcome"]) for row in rows] == [(name, "same") for name in survival.OPTIMIZERS]
    assert path.read_bytes() == before


def test_another_result_and_a_broken_file_are_told(
    saved: tuple[Path, Arrays, dict[str, float | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, feeds, scales = saved

    def shift_a_scale(model: Path, optimized: Path) -> None:
        proto = onnx.load(model)
        scale = next(tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(2), scale.name))
        onnx.save(proto, optimized)

    def leave_nothing(model: Path, optimized: Path) -> None:
        optimized.write_bytes(b"no model")

    def absent(model: Path, optimized: Path) -> None:
        raise ModuleNotFoundError("not installed")

    optimizers = {"shift": shift_a_scale, "nothing": leave_nothing, "absent": absent}
    monkeypatch.setattr(survival, "OPTIMIZERS", optimizers)
    shift, nothing, skipped = survival.survey(path, [feeds], scales)
    assert shift["outcome"] == "differs" and shift["max_lsb"] > 1
    assert nothing["outcome"] == "breaks" and nothing["reason"]
    assert skipped == {"name": "absent", "outcome": "not tried", "max_lsb": None, "reason": "not installed"}
