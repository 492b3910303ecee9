"""freeze-bit-width."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.freeze_bit_width import FreezeBitWidth
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant


def _graph(**options: object) -> tuple[GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    graph = capture(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), (x,))
    return InsertFakeQuant(**options).run(graph, PassContext()).model, x  # type: ignore[arg-type]


def test_frozen_forward_is_the_trained_one_and_the_exported_one() -> None:
    graph, x = _graph()
    calibrate(graph, [(x,)])
    trained = graph(x)
    result = FreezeBitWidth().run(graph, PassContext())
    assert result.modified
    assert torch.equal(result.model(x), trained)
    assert torch.equal(torch.export.export(result.model, (x,)).module()(x), trained)
    assert not FreezeBitWidth().run(graph, PassContext()).modified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "4.25"}, "4.25 bits"),
        ({"weights": "20"}, "20 bits"),
        ({"activations": "7.5"}, "8 or 16"),
        ({"dynamic": True}, "every token"),
    ],
)
def test_what_no_file_can_hold_is_refused(options: dict[str, object], message: str) -> None:
    graph, x = _graph(**options)
    calibrate(graph, [(x,)])
    with pytest.raises(QuantizationError, match=message):
        FreezeBitWidth().run(graph, PassContext())


def test_an_uncalibrated_graph_is_refused() -> None:
    graph, _ = _graph()
    with pytest.raises(QuantizationError, match="no range"):
        FreezeBitWidth().run(graph, PassContext())
