"""clip-masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fraqat_compiler.capture import capture
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.clip_masks import ClipMasks


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))

    def forward(self, scores: Tensor, drop: Tensor) -> Tensor:
        return (scores.masked_fill(drop, float("-inf")) + self.mask).softmax(-1)


def test_masks_become_finite_and_softmax_stays() -> None:
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    drop = torch.zeros(4, 4, dtype=torch.bool)
    drop[2, 1] = True
    model = Masked()
    before = model.mask.clone()
    result = ClipMasks().run(capture(model, (scores, drop)), PassContext())
    assert result.modified and len(result.changes) == 2
    torch.testing.assert_close(result.model(scores, drop), model(scores, drop), atol=1e-8, rtol=1e-5)
    assert torch.equal(model.mask, before)
    assert float(result.model.get_buffer("mask").min()) == ClipMasks().value


def test_nothing_to_do() -> None:
    assert not ClipMasks().run(capture(nn.Linear(2, 2), (torch.ones(1, 2),)), PassContext()).modified
