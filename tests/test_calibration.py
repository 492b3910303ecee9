"""Calibration: what the ranges make room for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lowering import fake_quantized, lowered, run_onnx
from torch import nn

DEAD_BIASES = [0.3, -0.7]


@pytest.mark.parametrize("weight_range", ["minmax", "mse"])
@pytest.mark.parametrize("activations", ["8", "16"])
def test_a_dead_channel_keeps_its_bias(weight_range: str, activations: str, tmp_path: Path) -> None:
    """A row of no weight, or next to none, must not have a scale at which its int32 bias saturates or is coarse."""
    layer = nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 0.0, 1e-12
        layer.bias.copy_(torch.tensor([*DEAD_BIASES, 0.1]))
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 4
    graph = fake_quantized(layer, (inputs,), activations=activations, weight_range=weight_range)
    (outputs,) = run_onnx(lowered(graph), [inputs], tmp_path)
    step = (outputs.max() - outputs.min()) / 255
    assert np.abs(outputs[:, :2] - np.array(DEAD_BIASES)).max() <= step
    assert torch.equal(graph(inputs), torch.from_numpy(outputs))
