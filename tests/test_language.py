"""Jobs of causal language models."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.errors import DataError
from fraqat_compiler.language import Logits, language_job, next_token_loss, packed, perplexity

VOCABULARY = 11


def test_documents_are_packed_without_padding() -> None:
    rows = packed([[1, 2, 3], torch.tensor([4, 5]), [], [6, 7, 8, 9]], 4, end=0)
    assert rows.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]]
    assert packed([[1, 2, 3], [4]], 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="3 tokens make no sequence of 4"):
        packed([[1, 2, 3]], 4)


def test_perplexity_of_a_uniform_and_of_a_sure_model() -> None:
    tokens = torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    assert perplexity(lambda ids: torch.zeros(3, 6, VOCABULARY), [(tokens,)]) == pytest.approx(VOCABULARY)
    sure = 50.0 * nn.functional.one_hot(tokens.roll(-1, 1), VOCABULARY)
    assert perplexity(lambda ids: sure, [(tokens,)]) == pytest.approx(1)


def test_the_first_token_is_not_predicted_and_the_last_predicts_nothing() -> None:
    logits = torch.zeros(1, 3, 2)
    logits[0, 2] = torch.tensor([100.0, -100.0])
    assert float(next_token_loss((logits,), (torch.tensor([[0, 1, 1]]),))) == pytest.approx(math.log(2))


class Bigram(nn.Module):
    """The next token from the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.Conv1d(16, 32, 2)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = nn.functional.pad(self.embed(input_ids).transpose(1, 2), (1, 0))
        return self.head(nn.functional.gelu(self.mix(x)).transpose(1, 2))


def _text(seed: int) -> Tensor:
    """Each token is the sum of the two before it, in a ring; one in ten is random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [1, 2]
    for _ in range(2000):
        noise = int(torch.randint(VOCABULARY * 10, (), generator=generator))
        tokens.append((tokens[-1] + tokens[-2]) % VOCABULARY if noise >= VOCABULARY else noise)
    return packed([tokens], 16)


def _trained() -> Bigram:
    torch.manual_seed(0)
    model, sequences = Bigram(), _text(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        batch = sequences[torch.randint(len(sequences), (32,))]
        optimizer.zero_grad()
        next_token_loss(model(batch), (batch,)).backward()
        optimizer.step()
    return model.eval()


def test_a_language_model_is_tuned_by_kl_and_keeps_its_perplexity(tmp_path: Path) -> None:
    model = _trained()
    job = language_job(lambda: model, lambda: _text(0), lambda: _text(1), batch=8)
    metrics = []
    for steps in (0, 120):
        options = {"schedule": "direct", "loss": "kl", "lr": 3e-3} if steps else {"weight_range": "minmax"}
        report = fraqat_compiler.compile(job, output=tmp_path / str(steps), weights="3", steps=steps, **options).report
        metrics.append(report["metrics"])
    before, after = (entry["quantized"]["perplexity"] for entry in metrics)
    real = metrics[0]["float"]["perplexity"]
    assert real < 4 < VOCABULARY
    assert after - real < 0.5 * (before - real)


def test_an_epoch_of_text_has_a_length_and_an_order_of_its_own() -> None:
    job = language_job(Bigram, lambda: _text(0), batch=8)
    assert job.train_data is not None and job.evaluate is None
    first, second = list(job.train_data()), list(job.train_data())
    assert len(first) == len(_text(0)) // 8
    assert not torch.equal(first[0][0], second[0][0])
    with pytest.raises(DataError, match="fill no batch of 500"):
        language_job(Bigram, lambda: _text(0), batch=500).example_inputs()


def test_logits_are_taken_out_of_a_models_output() -> None:
    class Wrapped(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not use_cache
            return SimpleNamespace(logits=input_ids.float())

    assert torch.equal(Logits(Wrapped())(torch.ones(1, 2)), torch.ones(1, 2))
