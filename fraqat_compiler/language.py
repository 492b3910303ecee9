"""Jobs of causal language models: tokens in, logits out, tuned by KL on packed sequences, measured by perplexity.

    job = language_job(lambda: Logits(AutoModelForCausalLM.from_pretrained(...)), tokens, held_out)

The graph has fixed shapes: (batch, length) tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import DataError
from fraqat_compiler.job import Job

CALIBRATION_BATCHES = 16


class Logits(nn.Module):
    """A causal language model of transformers as tokens (B, L) to logits (B, L, vocabulary), without its cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def packed(documents: Iterable[Sequence[int] | Tensor], length: int, end: int | None = None) -> Tensor:
    """Documents in one row after another, cut into sequences without padding.

    Args:
        documents: token numbers of each.
        length: of a sequence.
        end: token put after each document; None puts none.

    Returns:
        (sequences, length), int64; what is left over at the end is dropped.

    Raises:
        DataError: fewer tokens than one sequence holds.
    """
    after = torch.tensor([] if end is None else [end], dtype=torch.int64)
    parts = [part for document in documents for part in (torch.as_tensor(document, dtype=torch.int64), after)]
    tokens = torch.cat(parts) if parts else after
    if len(tokens) < length:
        raise DataError(f"{len(tokens)} tokens make no sequence of {length}.", "Give more text, or a smaller length.")
    return tokens[: len(tokens) // length * length].view(-1, length)


def next_token_loss(outputs: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean negative log-likelihood, in nats, of each token after the first given those before it.

    Args:
        outputs: logits (B, L, vocabulary), the first of the model's outputs.
        batch: tokens (B, L) first.
    """
    logits = pytree.tree_leaves(outputs)[0]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[0][:, 1:].flatten())


@torch.no_grad()
def perplexity(run: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, ...]]) -> float:
    """exp of the mean negative log-likelihood over batches of one shape; 1 is a model that is always sure and right."""
    losses = [float(next_token_loss(run(batch[0]), batch)) for batch in batches]
    return math.exp(sum(losses) / len(losses))


def language_job(
    model: Callable[[], nn.Module],
    tokens: Callable[[], Tensor],
    held_out: Callable[[], Tensor] | None = None,
    *,
    batch: int = 4,
    name: str = "language-model",
    **functions: Any,
) -> Job:
    """A job from a model that is called as model(tokens) and returns logits.

    Args:
        model: gives the trained model; `Logits` wraps those of transformers.
        tokens: gives sequences (N, length) to train on, as `packed` makes them; they are shuffled in every epoch, and
            those that fill no batch are left out.
        held_out: sequences for the metric `perplexity`; None measures none.
        batch: sequences in a batch.
        name: of the model.
        functions: further parts of the job, by name; they replace the ones made here.

    Raises:
        DataError: when the job is used: fewer sequences than a batch holds.
    """

    def train() -> list[tuple[Tensor]]:
        sequences = tokens()
        return _batches(sequences[torch.randperm(len(sequences))], batch)

    def evaluate(run: Callable[..., Any]) -> dict[str, float]:
        assert held_out is not None
        return {"perplexity": perplexity(run, _batches(held_out(), batch))}

    parts: dict[str, Any] = {
        "example_inputs": lambda: _batches(tokens(), batch)[0],
        "calibration_data": lambda: _batches(tokens(), batch)[:CALIBRATION_BATCHES],
        "train_data": train,
        "loss": next_token_loss,
        "evaluate": evaluate if held_out else None,
        "outputs": "logits",
    }
    return Job(name, model, **(parts | functions))


def _batches(sequences: Tensor, size: int) -> list[tuple[Tensor]]:
    if len(sequences) < size:
        raise DataError(f"{len(sequences)} sequences fill no batch of {size}.", "Give more text, or a smaller batch.")
    return [(rows,) for rows in sequences.split(size) if len(rows) == size]
