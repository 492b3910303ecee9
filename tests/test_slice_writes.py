"""Writes into slices: the same values, without a scatter, right on the HTP too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.targets.htp import HtpTarget

Write = Callable[[Tensor, Tensor], None]


class Writing(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        self.write(result, x)
        return result


def _last_column_is_zero(result: Tensor, x: Tensor) -> None:
    result[:, -1] = 0


def _columns_are_added_to(result: Tensor, x: Tensor) -> None:
    result[:, 2:4] += x[:, :2]


def _block_is_one_row(result: Tensor, x: Tensor) -> None:
    result[1:, 5:] = x[0, :3]


def _all_is_new(result: Tensor, x: Tensor) -> None:
    result[:] = x


def _nothing_is_new(result: Tensor, x: Tensor) -> None:
    result[:, 5:3] = x[:, :0]


def _integers_become_floats(result: Tensor, x: Tensor) -> None:
    result[:, :3] = torch.arange(3)


WRITES = (
    _last_column_is_zero,
    _columns_are_added_to,
    _block_is_one_row,
    _all_is_new,
    _nothing_is_new,
    _integers_become_floats,
)


def _model(write: Write) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Writing(write).eval(), torch.randn(3, 8)


@pytest.mark.parametrize("write", WRITES)
def test_the_values_are_the_same_without_a_scatter(write: Write) -> None:
    model, x = _model(write)
    graph = capture(model, (x,))
    written = {"aten.slice_scatter", "aten.select_scatter", "aten.copy", "aten.fill"}
    assert written.isdisjoint(op_name(node) for node in graph.graph.nodes)
    assert torch.equal(graph(x), model(x))


def test_a_step_stays_a_scatter() -> None:
    def every_other_column(result: Tensor, x: Tensor) -> None:
        result[:, ::2] = x[:, :4]

    model, x = _model(every_other_column)
    assert torch.equal(capture(model, (x,))(x), model(x))


@pytest.mark.skipif(bool(HtpTarget.missing()), reason="the HTP compiler is not here")
def test_the_htp_computes_them_rightly(tmp_path: Path) -> None:
    model, x = _model(_last_column_is_zero)
    result = fraqat_compiler.compile(
        model, (x,), output=tmp_path, weights=8, activations=8, target="htp{soc=sm8750}", strict=True
    )
    assert result.report["parity"]["target"]["max_lsb"] <= 2  # 60 and more as a scatter
