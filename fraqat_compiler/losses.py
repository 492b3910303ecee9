"""Losses of the fine-tune: what the student is told to do, as a weighted sum of terms.

In text they are a list with commas, in the grammar of pipelines: `mse`, `kl{temperature=2}`,
`kl,features{at=blocks.* weight=0.1}`, `mse,task{weight=0.5}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fraqat_compiler import pipeline_text
from fraqat_compiler.errors import TrainingError, UsageError

BLOCKS = "blocks"  # place of `features`: wherever a list of modules repeats
TaskFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Seen:
    """What a step has to show to its losses.

    Attributes:
        batch: as the training data yielded it.
        student, teacher: their outputs, any structure of tensors; the teacher's is None where no loss wants it.
        features: by the `at` of a loss `features`, (student's, teacher's) tensor at each module that it names.
        task: the job's own loss.
    """

    batch: Any
    student: Any
    teacher: Any
    features: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
    task: TaskFunction | None = None


@dataclass(frozen=True)
class Loss:
    """Base of the losses.

    Attributes:
        weight: of the term in the sum.
    """

    name: ClassVar[str]
    wants_teacher: ClassVar[bool] = True
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"the loss {self.name!r} has the weight {self.weight:g}.", "Weights are positive.")

    def __call__(self, seen: Seen) -> Tensor:
        """The term without its weight, a scalar."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mse(Loss):
    """Mean squared error of the outputs against the teacher's, FraQAT's distillation (arXiv 2510.14823, Algorithm 1).

    It is taken relative to the teacher's mean square, which makes one learning rate fit outputs of any size, and is
    the mean over the float outputs. Options: `weight`; `relative`, false for the plain error.
    """

    name: ClassVar[str] = "mse"
    relative: bool = True

    def __call__(self, seen: Seen) -> Tensor:
        measure = relative_error if self.relative else squared_error
        return torch.stack([measure(mine, theirs) for mine, theirs in float_pairs(seen.student, seen.teacher)]).mean()


@dataclass(frozen=True)
class Kl(Loss):
    """Kullback-Leibler divergence of the teacher's from the student's distribution over the last dimension, in nats.

    For outputs that are logits: T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over everything but the
    last dimension (Hinton et al. 2015, arXiv 1503.02531). Options: `weight`; `temperature`, T.
    """

    name: ClassVar[str] = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"kl cannot run at a temperature of {self.temperature:g}.", "It is positive.")

    def __call__(self, seen: Seen) -> Tensor:
        return torch.stack([self._of(mine, theirs) for mine, theirs in float_pairs(seen.student, seen.teacher)]).mean()

    def _of(self, student: Tensor, teacher: Tensor) -> Tensor:
        mine, theirs = (F.log_softmax(logits.float() / self.temperature, -1) for logits in (student, teacher))
        divergence = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean()
        return divergence * self.temperature**2


@dataclass(frozen=True)
class Features(Loss):
    """Relative mean squared error of the tensors inside the model that chosen modules end with, the mean over modules.

    Hidden layers of the student are held to the teacher's (FitNets, Romero et al. 2015, arXiv 1412.6550); both have
    one architecture, so no regressor stands between. Options: `at`, patterns over the user's module names joined by
    commas (of nested modules that match the outermost counts), or `blocks`, the members of its lists of modules;
    `weight`.
    """

    name: ClassVar[str] = "features"
    at: str = BLOCKS

    def __call__(self, seen: Seen) -> Tensor:
        pairs = seen.features[self.at]
        if not pairs:  # a model without lists of modules has no blocks
            return torch.zeros(())
        return torch.stack([relative_error(mine, theirs) for mine, theirs in pairs]).mean()


@dataclass(frozen=True)
class Task(Loss):
    """The job's own `loss(outputs, batch)`, on the student's outputs. Option: `weight`."""

    name: ClassVar[str] = "task"
    wants_teacher: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        assert seen.task is not None
        loss = seen.task(seen.student, seen.batch)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            raise TrainingError(
                f"the job's loss(outputs, batch) returned {loss!r:.80}.", "Return a scalar tensor with a gradient."
            )
        return loss.reshape(())


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (Mse, Kl, Features, Task)}


def parse_losses(text: str) -> tuple[Loss, ...]:
    """The terms of a text.

    Raises:
        PipelineSyntaxError: the text does not parse.
        UsageError: there is no such loss or option, or no term.
    """
    items = pipeline_text.parse(text)
    if not items:
        raise UsageError("the loss is empty.", f"Known: {', '.join(LOSSES)}.")
    for item in items:
        if item.name not in LOSSES:
            near = pipeline_text.did_you_mean(item.name, LOSSES)
            raise UsageError(f"unknown loss {item.name!r}.{near}", f"Known: {', '.join(LOSSES)}.")
    return tuple(pipeline_text.build(LOSSES[item.name], item.options) for item in items)


def weighted_sum(losses: Iterable[Loss], seen: Seen) -> Tensor:
    """The scalar that a step descends."""
    return torch.stack([term(seen) * term.weight for term in losses]).sum()


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, in float32, scalar."""
    return (student.float() - teacher.float()).square().mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE(student, teacher) / mean(teacher^2), scalar."""
    return squared_error(student, teacher) / teacher.float().square().mean().clamp_min(1e-12)


def float_pairs(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """The float tensors of two outputs of one structure.

    Raises:
        TrainingError: there is none.
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(pytree.tree_leaves(student), pytree.tree_leaves(teacher), strict=True)
        if isinstance(mine, Tensor) and mine.is_floating_point()
    ]
    if not pairs:
        raise TrainingError(
            "the model has no float output that a student could learn from.",
            "Let it return its logits or features, or leave the fine-tune out (--steps 0).",
        )
    return pairs
