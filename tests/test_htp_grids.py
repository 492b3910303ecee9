"""The quantizers that HTP asks for, and that the real library computes rightly with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from lowering import htp_parity
from torch import Tensor, nn

from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.target import TensorRequest
from fraqat_compiler.targets.htp import HtpTarget

pytestmark = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


def request(op: str, activation_bits: float = 8, *, depthwise: bool = False) -> TensorRequest:
    return TensorRequest(op, "weight", (32, 16), 4, activation_bits, channel_axis=0, depthwise=depthwise)


def test_specs_are_what_the_library_takes() -> None:
    target = HtpTarget()
    assert target.quant_spec(request("linear", 16)) == QuantSpec(bit_width=4, axis=0)
    table = QuantSpec(bit_width=8, symmetric=False, signed=False)
    assert target.quant_spec(request("embedding")) == table
    tied = dataclasses.replace(request("embedding"), tied=True)
    assert target.quant_spec(tied) == dataclasses.replace(table, centred_within=128)
    assert target.quant_spec(request("conv", 8, depthwise=True)) == QuantSpec(bit_width=4, axis=0)
    assert target.quant_spec(request("conv", 16, depthwise=True)) == QuantSpec(bit_width=8, axis=0)
    resampling = dataclasses.replace(request("linear"), resampling=True)
    assert target.quant_spec(resampling) == QuantSpec(bit_width=8, axis=0)
    for keys, bits in ((10, 8), (11, 16)):
        probabilities = target.quant_spec(TensorRequest("softmax", "activation", (1, 4, keys, keys), 8, 8))
        assert probabilities == QuantSpec(bit_width=bits, symmetric=False, signed=False)
    sigmoid = TensorRequest("activation", "activation", (1, 4), 16, 16, function="aten.sigmoid")
    assert target.quant_spec(sigmoid).range_max == 65535 / 65536
    keys = TensorRequest("linear", "activation", (1, 4, 16), 8, 8, factor=True)
    assert target.quant_spec(keys) == QuantSpec(bit_width=8, symmetric=False, signed=False, centred_within=16)
    assert target.quant_spec(dataclasses.replace(keys, bit_width=16)).centred_within is None
    gamma = target.quant_spec(TensorRequest("norm", "norm_weight", (16,), 16, 16))
    assert gamma == QuantSpec(bit_width=8, symmetric=False, signed=False)


class TiedHead(nn.Module):
    """Token ids (N, L) to scores of the same table, whose largest weight is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.table.weight.data.clamp_(min=-2.5)[5, 3] = 3.5
        self.norm = nn.LayerNorm(32)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.table(tokens)), self.table.weight)


def test_a_head_tied_to_a_table_is_right(tmp_path: Path) -> None:
    """With a zero point other than 128 the scores of the largest weights are off by 100 to 230 steps."""
    torch.manual_seed(0)
    distance = htp_parity(TiedHead(), torch.randint(0, 64, (1, 16)), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 6


class NormBetween(nn.Module):
    """A norm with weight and bias between two layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), norm
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.2, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return -self.norm(self.first(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm(64), nn.RMSNorm(64)])
def test_norms_at_8_bits_are_rounded_as_simulated(norm: nn.Module, tmp_path: Path) -> None:
    """Else a LayerNorm is 0.25 steps off in the mean by its bias, an RMSNorm 0.45 and always down."""
    torch.manual_seed(0)
    distance = htp_parity(NormBetween(norm), torch.randn(1, 32, 64), 8, tmp_path)
    assert distance.mean_lsb is not None and distance.mean_lsb <= 0.15
    assert distance.max_lsb is not None and distance.max_lsb < 2.5


class Unrolled(nn.Module):
    """An LSTM, whose first step adds a product with a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


def test_an_activation_of_zeros_does_no_harm(tmp_path: Path) -> None:
    """With a step of 1 beside those of the other addend the sum is garbage, cosine 0.06."""
    torch.manual_seed(0)
    distance = htp_parity(Unrolled(), torch.randn(1, 2, 16), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 33
