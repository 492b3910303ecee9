"""Products of two 8-bit activations against the real HTP library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.targets.htp import grids

pytest.importorskip("onnxruntime_qnn")


class Scores(nn.Module):
    """Keys come from a sum and are moved before the product, as those of attention with rotary positions."""

    def forward(self, queries: Tensor, keys: Tensor, turned: Tensor) -> Tensor:
        return queries @ (keys + turned).permute(0, 2, 3, 1)


def stray(folder: Path, highest: float) -> float:
    """LSB between HTP and onnxruntime where the keys span from -1 to `highest`."""
    torch.manual_seed(0)
    queries, keys, turned = torch.randn(1, 2, 28, 16), torch.rand(1, 28, 2, 16) - 0.5, torch.rand(1, 28, 2, 16) - 0.5
    keys[0, ::5, :, 3], keys[0, 1::5, :, 7] = highest, -1.0
    turned[0, ::5, :, 3], turned[0, 1::5, :, 7] = 0.0, 0.0
    result = fraqat_compiler.compile(
        Scores(), (queries, keys, turned), output=folder, target="htp", weights=8, activations=8
    )
    distance = result.report["parity"]["target"]["max_lsb"]
    assert isinstance(distance, float)
    return distance


@pytest.mark.parametrize("highest", [0.78, 1.0, 1.27])
def test_a_factor_about_the_middle_of_its_codes_is_not_cut_off(tmp_path: Path, highest: float) -> None:
    assert stray(tmp_path, highest) <= 2


@pytest.mark.parametrize("highest", [1.1, 1.25])
def test_the_library_cuts_it_off_where_the_zero_point_is_not_the_middle(
    tmp_path: Path, highest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should it be right one day, `centred_within` can go."""
    monkeypatch.setattr(grids, "FACTOR_WINDOW", -1)
    assert stray(tmp_path, highest) > 2
