"""decompose-attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.decompose_attention import DecomposeAttention


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("keep", torch.ones(6, 6, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        if self.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kind == "scaled":
            return F.scaled_dot_product_attention(q, k, v, scale=0.2)
        if self.kind == "grouped":
            return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        if self.kind == "boolean buffer":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep)
        if self.kind == "boolean input":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=lengths > 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=lengths)


@pytest.mark.parametrize("kind", ["causal", "scaled", "grouped", "boolean buffer", "boolean input", "additive"])
def test_written_out_it_is_the_same(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3)]
    inputs.append((torch.rand(2, 1, 6, 6, generator=generator) > 0.3).float())
    model = Attention(kind).eval()
    result = DecomposeAttention().run(capture(model, tuple(inputs)), PassContext())
    names = [op_name(node) for node in result.model.graph.nodes]
    assert result.modified and "aten.scaled_dot_product_attention" not in names
    assert names.count("aten.matmul") == 2 and names.count("aten.softmax") == 1
    torch.testing.assert_close(result.model(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_nothing_to_do() -> None:
    assert not DecomposeAttention().run(capture(nn.Linear(2, 2), (torch.ones(1, 2),)), PassContext()).modified
