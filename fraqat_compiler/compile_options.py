"""What can be asked of a compile or a simulation, and what is refused before anything long begins."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fraqat_compiler.auto_widths import asked_widths
from fraqat_compiler.capture import Tracer
from fraqat_compiler.default_recipe import AUTO, recipe_of, schedule_of
from fraqat_compiler.errors import UsageError
from fraqat_compiler.losses import parse_losses
from fraqat_compiler.quant_spec import MAX_EXPORTED_BIT_WIDTH, RangeMethod
from fraqat_compiler.recipe import parse_recipe
from fraqat_compiler.schedule import parse_schedule
from fraqat_compiler.widths import Widths


@dataclass(frozen=True)
class CompileOptions:
    """What can be asked of a compile; the command line's flags have the same names.

    Attributes:
        weights, activations: widths with overrides by module name (`4,lm_head=8`); weights may be found by sensitivity
            under a budget (`auto{mean-bits=4.5},lm_head=8`).
        schedule: name or text of the bit-width schedule of the fine-tune, or `auto`.
        steps: optimizer steps of the fine-tune; 0 is post-training quantization; None is 400 where the job has
            training data, else 0.
        epochs: the same in passes over the training data, instead of `steps`.
        loss: what the student is told to do: terms with commas (`mse`, `kl{temperature=2},task{weight=0.5}`) or `auto`.
        train: which parameters are trained: `all`, or groups (`ff`, `attn`, `blocks`) and module patterns with commas.
        recipe: optimizer, stabilizers, learned ranges and more, with commas (`ema,freeze-oscillations,lsq`); may be
            empty, or `auto`.
        target: target text.
        seed: of every random choice.
        strict: an op that stays in float unexpectedly is an error.
        skip: modules left in float, patterns joined by commas.
        range_method: how activation ranges follow from calibration; None is `minmax` without a fine-tune
            and for logits, else `mse`.
        calibration_samples: of the calibration data only as many batches as hold so many samples; None is all.
        dynamic: activation ranges are taken from every token anew, as in FraQAT's GPU runs; simulation only.
        weight_range: how weight ranges follow from the weights; None is `mse` without a fine-tune,
            else `minmax`; `minmax` for logits.
        lr: learning rate of the fine-tune; None is the loop's default.
        tracer: how the model is captured.
        checkpoint_every: steps between checkpoints of the fine-tune; None is the loop's default.
    """

    weights: str = "4"
    activations: str = "8"
    schedule: str = AUTO
    steps: int | None = None
    epochs: float | None = None
    loss: str = AUTO
    train: str = "all"
    recipe: str = AUTO
    target: str = "onnxruntime"
    seed: int = 0
    strict: bool = False
    skip: str = ""
    range_method: RangeMethod | None = None
    calibration_samples: int | None = None
    dynamic: bool = False
    weight_range: RangeMethod | None = None
    lr: float | None = None
    tracer: Tracer = "export"
    checkpoint_every: int | None = None


def make_options(options: dict[str, Any], *, exported: bool) -> CompileOptions:
    """The options by name.

    Args:
        options: fields of CompileOptions.
        exported: refuse what no file can hold; a simulation can do without.

    Raises:
        UsageError: an option that does not exist, or a value that no compile could use.
    """
    known = {item.name for item in dataclasses.fields(CompileOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}.", f"Known: {', '.join(sorted(known))}.")
    settings = CompileOptions(**options)
    settings = dataclasses.replace(
        settings,
        weights=str(settings.weights),
        activations=str(settings.activations),
        schedule=schedule_of(settings.schedule),
        recipe=recipe_of(settings.recipe, steps=settings.steps),
    )
    if exported:
        _refuse_unexportable(settings)
    _refuse_unusable(settings)
    return settings


def _refuse_unexportable(settings: CompileOptions) -> None:
    if settings.dynamic:
        raise UsageError(
            "ranges per token (--dynamic) cannot be exported: a file holds static ranges.",
            "Leave it out, or use `fraqat simulate`.",
        )
    for flag in ("weights", "activations"):
        text = getattr(settings, flag)
        for width in asked_widths(text) if flag == "weights" else Widths.parse(text).all:
            if width is not None and not (width.is_integer() and width <= MAX_EXPORTED_BIT_WIDTH):
                raise UsageError(
                    f"--{flag} {text}: {width:g} bits cannot be exported, for files hold integer widths up to "
                    f"{MAX_EXPORTED_BIT_WIDTH}.",
                    "End at one of them, or at float; the schedule may pass through fractions on its way. "
                    "`fraqat simulate` measures what other widths would give.",
                )


def _refuse_unusable(settings: CompileOptions) -> None:
    """What no fine-tune could do."""
    parse_schedule(settings.schedule, end=min(filter(None, asked_widths(settings.weights)), default=8.0))
    _refuse_idle(settings)
    if settings.lr is not None and not 0 < settings.lr < math.inf:
        raise UsageError(f"--lr {settings.lr} is no learning rate.", "It is a positive number.")


def _refuse_idle(settings: CompileOptions) -> None:
    """Texts that do not parse, and ingredients of a fine-tune that is not asked for."""
    if settings.loss != AUTO:  # which says what it is when the job is known
        parse_losses(settings.loss)
    idle = parse_recipe(settings.recipe).needs_training
    if settings.steps == 0 and idle:
        raise UsageError(f"--recipe {idle[0]} needs a fine-tune, and --steps is 0.", "Leave one of them out.")
    if settings.calibration_samples is not None and settings.calibration_samples < 1:
        raise UsageError(f"--calibration-samples {settings.calibration_samples} are none.", "Give 1 or more.")
    if settings.epochs is not None and not 0 < settings.epochs < math.inf:
        raise UsageError(f"--epochs {settings.epochs:g} is no budget.", "It is a positive number.")
