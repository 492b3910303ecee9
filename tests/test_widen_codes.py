"""widen-codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowering import EXPORT, constants, fake_quantized, htp_parity, lowered, run_onnx
from torch import Tensor, nn

from fraqat_compiler import lazy_values
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.widen_codes import WidenCodes

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants,convert-widths"


class Layers(nn.Module):
    """A convolution, a layer of few inputs and one of many."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.few, self.many = nn.Conv1d(8, 32, 3, padding=1), nn.Linear(32, 256), nn.Linear(256, 80)

    def forward(self, x: Tensor) -> Tensor:
        return self.many(torch.relu(self.few(self.conv(x).transpose(1, 2))))


def _graph(**options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 24)
    return lowered(fake_quantized(Layers(), (x,), **options), LOWER), x


def _greatest(graph: Any) -> dict[str, int]:
    held = constants(graph)
    names = ("conv.weight", "few.weight", "many.weight")
    return {name: int(abs(lazy_values.values_of(held[name]).astype(int)).max()) for name in names}


def test_layers_of_few_inputs_fill_their_bytes_and_compute_the_same(tmp_path: Path) -> None:
    graph, x = _graph(weights="4", activations="16")
    (before,) = run_onnx(graph, [x], tmp_path)
    narrow = _greatest(graph)
    assert sorted(WidenCodes().run(graph, PassContext()).changes) == ["widened conv.weight", "widened few.weight"]
    wide = _greatest(graph)
    assert wide == narrow | {name: 16 * narrow[name] for name in ("conv.weight", "few.weight")}
    (after,) = run_onnx(graph, [x], tmp_path)
    np.testing.assert_allclose(after, before, atol=1.01 * (before.max() - before.min()) / 65535)
    assert not WidenCodes().run(graph, PassContext()).modified


@pytest.mark.parametrize("widen", [WidenCodes(inputs=256), WidenCodes(codes=256 * 80)])
def test_what_is_few_and_small_are_options(widen: WidenCodes) -> None:
    graph, _ = _graph(weights="4", activations="16")
    assert "widened many.weight" in widen.run(graph, PassContext()).changes


def test_a_layer_is_widened_for_either_reason() -> None:
    graph, _ = _graph(weights="4", activations="16")
    assert WidenCodes(inputs=1, codes=32 * 24).run(graph, PassContext()).changes == ("widened conv.weight",)


def test_codes_that_lie_in_bytes_anyway_are_widened_at_any_number_of_inputs() -> None:
    graph, _ = _graph(weights="6", activations="16")
    assert len(WidenCodes().run(graph, PassContext()).changes) == 3
    assert _greatest(graph)["many.weight"] > 100


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "4", "activations": "8"},
        {"weights": "8", "activations": "16"},
        {"weights": "4", "activations": "16", "asymmetric": True},
    ],
)
def test_others_stay(options: dict[str, Any]) -> None:
    graph, _ = _graph(**options)
    assert not WidenCodes().run(graph, PassContext()).modified


def test_the_library_computes_it(tmp_path: Path) -> None:
    """Without it, it is 8 steps off in the mean and 24 at most."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(nn.Linear(64, 64), torch.randn(32, 64), 16, tmp_path, weights=4)
    assert distance.mean_lsb is not None and distance.mean_lsb <= 1
    assert distance.max_lsb is not None and distance.max_lsb <= 3
