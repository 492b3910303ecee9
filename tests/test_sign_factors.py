"""sign-factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import Tensor, nn

from fraqat_compiler import qdq
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.sign_factors import SignFactors
from fraqat_compiler.targets.htp.target import HtpTarget

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants,convert-widths"


class Scores(nn.Module):
    """Products of tensors with each other, one of them twice."""

    def forward(self, x: Tensor) -> Tensor:
        keys = x.transpose(-1, -2).contiguous()
        return x @ keys + (x * 0.5) @ keys


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_the_second_factor_gets_a_signed_grid(shift: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 16, 32) + shift
    graph = lowered(fake_quantized(Scores(), (x,), activations="16"), LOWER)
    (before,) = run_onnx(graph, [x], tmp_path)
    assert SignFactors().run(graph, PassContext()).modified
    types = [_types(node) for node in graph.nodes if node.op == "MatMul"]
    assert types == [["uint16", "int16"]] * 2
    assert ops(graph).count("MatMul") == 2
    (after,) = run_onnx(graph, [x], tmp_path)
    assert abs(after - before).max() < 3 * (before.max() - before.min()) / 65535
    assert not SignFactors().run(graph, PassContext()).modified


def _types(node: object) -> list[str]:
    sources = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs]  # type: ignore[attr-defined]
    return [str(qdq.code_type(source)) for source in sources if source is not None]


def test_a_factor_of_two_products_is_converted_once() -> None:
    graph = lowered(fake_quantized(Scores(), (torch.randn(1, 2, 16, 32),), activations="16"), LOWER)
    SignFactors().run(graph, PassContext())
    first, second = (node for node in graph.nodes if node.op == "MatMul")
    assert first.inputs[1] is second.inputs[1]


def test_at_8_bits_it_stays() -> None:
    graph = lowered(fake_quantized(Scores(), (torch.randn(1, 2, 16, 32),), activations="8"), LOWER)
    assert not SignFactors().run(graph, PassContext()).modified


def test_a_product_with_a_weight_stays() -> None:
    graph = lowered(fake_quantized(nn.Linear(32, 8), (torch.randn(1, 2, 16, 32),), activations="16"), LOWER)
    assert not SignFactors().run(graph, PassContext()).modified


@pytest.mark.parametrize("soc", ["sm8550", "sm8750", "sm8850"])
def test_the_library_computes_it(soc: str, tmp_path: Path) -> None:
    """With unsigned factors it is 31 steps off in the mean and 183 at most."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Scores(), torch.randn(1, 2, 16, 32), 16, tmp_path, HtpTarget(soc=soc))
    assert distance.mean_lsb is not None and distance.mean_lsb <= 1.5
    assert distance.max_lsb is not None and distance.max_lsb <= 6


def test_an_older_architecture_does_without_it() -> None:
    assert "sign-factors" not in HtpTarget(soc="sm8450").lower_pipeline()
