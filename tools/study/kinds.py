"""The kinds of models that the study quantizes, each with its metrics, its precisions and its plain fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arms import Arm

Precisions = Mapping[str, tuple[str, str]]
_PRECISIONS: Precisions = {"W4A8": ("4", "8"), "W4A16": ("4", "16"), "W3A8": ("3", "8")}


@dataclass(frozen=True)
class Kind:
    """What the runs of one kind of model have in common.

    Attributes:
        metrics: heading of each metric by its name, in the order of the table; less is better in all. By the first of
            them an arm is held against `direct`.
        swept: the metric that the learning rate is chosen by.
        unit: what the agreement of file and graph is measured on, in the plural.
        agrees: name of the figure that they agree in, in the plural.
        plain: options of `compile` that make the paper's fine-tune of such a model, under those of an arm.
        precisions: weights and activations, as options of `compile`, by the name of a precision; the first is the
            default.
        notes: what a precision's name does not say, by that name.
    """

    metrics: Mapping[str, str]
    swept: str
    unit: str
    agrees: str
    plain: Mapping[str, Any]
    precisions: Precisions = field(default_factory=lambda: _PRECISIONS)
    notes: Mapping[str, str] = field(default_factory=dict)

    def options(self, arm: Arm) -> dict[str, Any]:
        """Those of `compile` for an arm."""
        features = {"loss": f"{self.plain['loss']},features"} if arm.features else {}
        return {**self.plain, **features, **arm.options}

    @property
    def first(self) -> str:
        """The metric that arms are compared by."""
        return next(iter(self.metrics))


PLAIN = {"schedule": "fraqat", "loss": "mse", "recipe": "", "range_method": "minmax"}  # the paper's fine-tune
# In language models a few values of the residual stream are thousands of times the others (Sun et al. 2024,
# arXiv 2402.17762), and they come out of down_proj.
_EMBEDDED = "*embed_tokens=8,*lm_head=8"
_RESIDUAL = "model.model.layers.*=16,*.self_attn=8,*.mlp=8,*layernorm=8,*.down_proj=16"

KINDS = {
    "images": Kind(
        metrics={
            "frechet_teacher": "Frechet distance to the teacher's images",
            "paired_error": "error against the teacher's image of the same noise",
            "frechet_real": "Frechet distance to real images",
        },
        swept="frechet_teacher",
        unit="images",
        agrees="paired errors",
        plain=PLAIN,
    ),
    "language": Kind(
        metrics={"perplexity_moby": "perplexity, Moby Dick", "perplexity_sotu": "perplexity, held-out addresses"},
        swept="perplexity_sotu",
        unit="windows",
        agrees="perplexities",
        plain=PLAIN | {"loss": "kl"},
        precisions={
            "W4A8-residual16": (f"4,{_EMBEDDED}", f"8,{_RESIDUAL}"),
            "W4A8": (f"4,{_EMBEDDED}", "8"),
            "W4A16": (f"4,{_EMBEDDED}", "16"),
        },
        notes={
            "W4A8-residual16": "The embedding, which is the head too, has 8 bits; the residual stream, and what goes "
            "into and out of `down_proj`, has 16-bit activations, all others 8.",
            "W4A8": "The embedding, which is the head too, has 8 bits.",
            "W4A16": "The embedding, which is the head too, has 8 bits.",
        },
    ),
    "sentences": Kind(
        metrics={
            "cosine_moby": "1 - cosine, Moby Dick",
            "cosine_sotu": "1 - cosine, held-out addresses",
            "similarity_moby": "1 - rank correlation of pairwise similarities, Moby Dick",
        },
        swept="cosine_sotu",
        unit="passages",
        agrees="distances",
        plain=PLAIN,
        precisions={
            "W4A8": ("4,*word_embeddings=8", "8"),
            "W4A16": ("4,*word_embeddings=8", "16"),
            "W3A8": ("3,*word_embeddings=8", "8"),
        },
        notes=dict.fromkeys(("W4A8", "W4A16", "W3A8"), "The table of word embeddings has 8 bits."),
    ),
}
