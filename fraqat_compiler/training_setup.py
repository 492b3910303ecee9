"""What a fine-tune starts from: its budget, its options, and the student with the parameters that it trains."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.blended_grid import blend_grids
from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.fine_tune_config import FineTuneConfig
from fraqat_compiler.job import Job
from fraqat_compiler.learned_ranges import learn_ranges
from fraqat_compiler.losses import parse_losses
from fraqat_compiler.recipe import Recipe
from fraqat_compiler.schedule import BitWidthSchedule
from fraqat_compiler.selection import selected

DEFAULT_STEPS = 400


def budget(job: Job, steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of a fine-tune; 0 is none.

    Args:
        job: may lack training data: then there is no fine-tune.
        steps: as asked for; None is DEFAULT_STEPS, or what `epochs` makes.
        epochs: passes over the training data; may be a fraction.

    Raises:
        UsageError: steps or epochs of a job without training data, or both.
        DataError: epochs of data that does not tell its length.
    """
    if steps is not None and epochs is not None:
        raise UsageError("--steps and --epochs are two budgets for one fine-tune.", "Give one of them.")
    if job.train_data is None:
        if steps or epochs:
            asked = f"--steps {steps}" if steps else f"--epochs {epochs:g}"
            raise UsageError(
                f"{asked} needs training data, and the job defines no train_data().",
                "Define it, or leave that out for post-training quantization.",
            )
        return 0
    if epochs is None:
        return DEFAULT_STEPS if steps is None else steps
    data = job.train_data()
    if not isinstance(data, Sized):
        raise DataError(
            "an epoch has no length: train_data() returns an iterator, which may never end.",
            "Let it return a list or a DataLoader, or give --steps.",
        )
    return max(round(epochs * len(data)), 1)


def make_config(
    schedule: BitWidthSchedule, steps: int, recipe: Recipe, loss: str, seed: int, **chosen: Any
) -> FineTuneConfig:
    """The options of a fine-tune; `chosen` are further fields of it, None for its default."""
    ranges = recipe.learned_ranges
    given = {name: value for name, value in chosen.items() if value is not None}
    return FineTuneConfig(
        schedule=schedule,
        steps=steps,
        losses=parse_losses(loss),
        stabilizers=recipe.stabilizers,
        range_rate=ranges.rate if ranges else 1.0,
        seed=seed,
        **recipe.optimizer.fields(),
        **given,
    )


def own_parameters(student: GraphModule, train: str) -> set[str]:
    """Give the student copies of the parameters that it trains; the others it goes on sharing with the teacher.

    Args:
        student: graph over the teacher's tensors.
        train: which parameters are trained, see `selection.selected`.

    Returns:
        Their names.

    Raises:
        UsageError: `train` names what the model does not have.
    """
    names = {str(node.target) for node in student.graph.nodes if node.op == "get_attr"}
    parameters = {name: fx_graph.get_tensor(student, name) for name in sorted(names)}
    parameters = {name: tensor for name, tensor in parameters.items() if isinstance(tensor, nn.Parameter)}
    trained = selected(parameters, train)
    for name, tensor in parameters.items():
        own = tensor.detach().clone() if name in trained else tensor.detach()
        fx_graph.set_tensor(student, name, nn.Parameter(own, requires_grad=name in trained))
    return trained


def apply_recipe(student: GraphModule, recipe: Recipe, trained: set[str]) -> None:
    """Exchange the fake quants that the recipe wants to be others; call it when they are calibrated."""
    if recipe.blended_grid is not None:
        blend_grids(student)
    if recipe.learned_ranges is not None:
        learn_ranges(student, recipe.learned_ranges, trained)
