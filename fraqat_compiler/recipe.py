"""Recipes: how a model is fine-tuned, besides schedule and loss, as one text.

A list with commas, in the grammar of pipelines: `adamw{weight-decay=0.01},ema{decay=0.99},lsq`. Each ingredient is a
frozen dataclass whose fields are its options and whose docstring names its source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch.fx import GraphModule

from fraqat_compiler import pipeline_text
from fraqat_compiler.blended_grid import BlendedGrid
from fraqat_compiler.error_compensation import Gptq
from fraqat_compiler.errors import UsageError
from fraqat_compiler.learned_ranges import LEARNED, Lsq
from fraqat_compiler.passes.split_low_rank import BRANCH, SplitLowRank
from fraqat_compiler.stabilizers import STABILIZERS, Stabilizer

T = TypeVar("T")
BRANCH_BITS = 8


@dataclass(frozen=True)
class AdamW:
    """The optimizer, AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), and its learning rate over time.

    Options: `weight-decay`, which FraQAT's paper (arXiv 2510.14823) reports to help; `betas`; `cooldown`, the last
    share of the steps over which the rate falls linearly to zero (as compute-optimal QAT does, arXiv 2509.22935);
    `warmup`, steps over which it rises from zero; `grad-clip`, the greatest norm of all gradients together, or none;
    `state`, whether the moments are kept from stage to stage or reset when one begins.
    """

    name: ClassVar[str] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.99)
    cooldown: float = 0.3
    warmup: int = 10
    grad_clip: float | None = 1.0
    state: Literal["keep", "reset"] = "keep"

    def fields(self) -> dict[str, Any]:
        """As fields of FineTuneConfig."""
        shared = ("weight_decay", "betas", "cooldown", "warmup", "grad_clip")
        return {name: getattr(self, name) for name in shared} | {"optimizer_state": self.state}


INGREDIENTS: dict[str, type[Any]] = {
    AdamW.name: AdamW,
    **STABILIZERS,
    **LEARNED,
    BlendedGrid.name: BlendedGrid,
    SplitLowRank.name: SplitLowRank,
    Gptq.name: Gptq,
}


@dataclass(frozen=True)
class Recipe:
    """The ingredients of a fine-tune.

    Raises:
        UsageError: one that is given twice, or two that exclude each other.
    """

    ingredients: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        names = [ingredient.name for ingredient in self.ingredients]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UsageError(f"the recipe names {min(twice)!r} twice.")
        ranges = [item.name for item in self.ingredients if isinstance(item, Lsq) and item.weights]
        exclusive = [*ranges, *(name for name in names if name == BlendedGrid.name)]
        if len(exclusive) > 1:
            raise UsageError(f"the recipe names {exclusive[0]} and {exclusive[1]}: a weight has one grid.")

    @property
    def optimizer(self) -> AdamW:
        return self._first(AdamW) or AdamW()

    @property
    def stabilizers(self) -> tuple[Stabilizer, ...]:
        return tuple(item for item in self.ingredients if isinstance(item, Stabilizer))

    @property
    def learned_ranges(self) -> Lsq | None:
        return self._first(Lsq)

    @property
    def blended_grid(self) -> BlendedGrid | None:
        return self._first(BlendedGrid)

    @property
    def low_rank(self) -> SplitLowRank | None:
        return self._first(SplitLowRank)

    @property
    def gptq(self) -> Gptq | None:
        return self._first(Gptq)

    @property
    def needs_training(self) -> tuple[str, ...]:
        """Names of the ingredients that do nothing without a fine-tune."""
        return tuple(item.name for item in self.ingredients if not isinstance(item, SplitLowRank | Gptq))

    @staticmethod
    def widths(weights: str, student: GraphModule) -> str:
        """The option `weights` with the low-rank branches of a graph at BRANCH_BITS, unless it names them itself."""
        if not any(f"{BRANCH}." in name for name, _ in student.named_parameters()):
            return weights
        default, *overrides = weights.split(",")
        return ",".join([default, f"*{BRANCH}={BRANCH_BITS}", *overrides])

    def _first(self, kind: type[T]) -> T | None:
        return next((item for item in self.ingredients if isinstance(item, kind)), None)

    def __str__(self) -> str:
        return pipeline_text.join(self.ingredients)


def parse_recipe(text: str) -> Recipe:
    """The recipe of a text; an empty one has no ingredients.

    Raises:
        PipelineSyntaxError: the text does not parse.
        UsageError: an ingredient or option that does not exist, or ingredients that do not go together.
    """
    return Recipe(tuple(_built(pipeline_text.parse(text))))


def _built(items: Iterable[pipeline_text.Item]) -> Iterable[Any]:
    for item in items:
        if item.name not in INGREDIENTS:
            near = pipeline_text.did_you_mean(item.name, INGREDIENTS)
            raise UsageError(
                item.position.pointing(f'there is no ingredient "{item.name}".{near} Known: {", ".join(INGREDIENTS)}.')
            )
        yield pipeline_text.build(INGREDIENTS[item.name], item.options)
