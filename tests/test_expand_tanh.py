"""expand-tanh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lowering import EXPORT, Applied, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import Tensor

from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.expand_tanh import ExpandTanh, coefficients

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants"


def _small(furthest: float) -> Tensor:
    torch.manual_seed(0)
    return (torch.rand(1, 16, 64) * 2 - 1) * furthest


@pytest.mark.parametrize(("furthest", "terms"), [(0.0003, 1), (0.004, 1), (0.05, 2), (0.1, 2), (0.2, 3), (0.4, 3)])
def test_it_has_as_few_terms_as_are_right(furthest: float, terms: int) -> None:
    found = coefficients(furthest)
    x = np.linspace(-furthest, furthest, 1001)
    assert len(found) == terms
    assert abs(np.polyval(found[::-1], x**2) * x - np.tanh(x)).max() < 2e-5 * furthest


@pytest.mark.parametrize(("furthest", "nodes"), [(0.002, 1), (0.1, 4), (0.3, 6)])
def test_a_tanh_near_0_becomes_a_polynomial(furthest: float, nodes: int, tmp_path: Path) -> None:
    x = _small(furthest)
    graph = lowered(fake_quantized(Applied(torch.tanh), (x,), activations="16"), LOWER)
    assert ExpandTanh().run(graph, PassContext()).modified
    assert [op for op in ops(graph) if "Linear" not in op].count("Tanh") == 0
    assert sum(op in ("Mul", "Add") for op in ops(graph)) == nodes
    (after,) = run_onnx(graph, [x], tmp_path)
    assert abs(after - np.tanh(x.numpy())).max() < 3 * 2 * furthest / 65535
    assert not ExpandTanh().run(graph, PassContext()).modified


@pytest.mark.parametrize(("furthest", "activations"), [(0.6, "16"), (0.01, "8")])
def test_others_stay(furthest: float, activations: str) -> None:
    graph = lowered(fake_quantized(Applied(torch.tanh), (_small(furthest),), activations=activations), LOWER)
    assert not ExpandTanh().run(graph, PassContext()).modified


@pytest.mark.parametrize("furthest", [0.0003, 0.01, 0.3])
def test_the_library_computes_it(furthest: float, tmp_path: Path) -> None:
    """As one op it is off by 260 steps within 0.01 and by 15 within 0.2."""
    pytest.importorskip("onnxruntime_qnn")
    distance = htp_parity(Applied(torch.tanh), _small(furthest), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 4
    assert abs(distance.slope - 1) < 1e-4
