"""The arms of the study: each is a set of options of `fraqat_compiler.compile`, so every arm is the product's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to quantize.

    Attributes:
        name: in the tables.
        says: one line about it.
        options: of `compile`, over the plain ones of a kind of models.
        features: the loss is the plain one and that of every block.
        trains: False for post-training quantization, which has no learning rate and no seed.
        rate_of: the arm whose learning rate this one takes, for one that differs from it in a single choice; an arm
            without it has a sweep of its own.
    """

    name: str
    says: str
    options: Mapping[str, Any] = field(default_factory=dict)
    features: bool = False
    trains: bool = True
    rate_of: str | None = None


_LEARNED = {"recipe": "lsq,ema{decay=0.95},adamw{cooldown=0.5 warmup=5}", "range_method": "mse"}


def _fraqat_with(name: str, says: str, **options: str) -> Arm:
    """An ablation: one ingredient added to `fraqat`, at its learning rate."""
    return Arm(f"fraqat-{name}", f"fraqat, {says}", options, rate_of="fraqat")


def _auto_without(name: str, says: str, **options: str) -> Arm:
    """An ablation: one ingredient of `auto` left out or changed, at its learning rate."""
    return Arm(f"auto-{name}", f"auto, {says}", _AUTO | options, rate_of="auto")


def _lsq_with(name: str, says: str, features: bool = False, **options: str) -> Arm:
    """An ablation: an ingredient or two of `auto` added to `lsq`, at its learning rate."""
    return Arm(
        f"lsq-{name}", f"lsq, {says}", {"schedule": "direct", "recipe": "lsq"} | options, features, rate_of="lsq"
    )


_AUTO = {"schedule": "auto", "loss": "auto", "recipe": "auto", "range_method": None}
_COOLED = "lsq,adamw{cooldown=0.5}"
_QUARTER = "mse,features{weight=0.25}"
_GROUPS = {"target": "onnxruntime{group-size=32}"}  # which no HTP has

ARMS = {
    arm.name: arm
    for arm in (
        Arm("auto", "the product's defaults", _AUTO),
        Arm(
            "auto-mse-ranges",
            "the same on activation ranges of least squared error, the default but for logits",
            _AUTO | {"range_method": "mse"},
            rate_of="auto",
        ),
        Arm("auto-groups", "auto, with a scale for every 32 weights of a row", _AUTO | _GROUPS, rate_of="auto"),
        Arm("direct", "straight to the target width (the paper's vQAT)", {"schedule": "direct"}),
        Arm(
            "direct-groups",
            "direct, with a scale for every 32 weights of a row",
            {"schedule": "direct"} | _GROUPS,
            rate_of="direct",
        ),
        Arm("integer", "8-7-6-5-4", {"schedule": "integer"}),
        Arm("coarse", "16-8-4", {"schedule": "coarse"}),
        Arm("fraqat", "8-7-6-5.5-5-4.75-4.5-4.25-4 (the paper's Table 4)", {"schedule": "fraqat"}),
        Arm(
            "svdqat",
            "low-rank branch of rank 16, then direct",
            {"schedule": "direct", "recipe": "split-low-rank{rank=16}"},
        ),
        Arm(
            "svdqat-32",
            "low-rank branch of rank 32, then direct",
            {"schedule": "direct", "recipe": "split-low-rank{rank=32}"},
        ),
        Arm(
            "direct-mse-ranges",
            "direct on activation ranges of least squared error",
            {"schedule": "direct", "range_method": "mse"},
        ),
        Arm(
            "svdqat-32-mse-ranges",
            "low-rank branch of rank 32 on the same ranges, then direct",
            {"schedule": "direct", "recipe": "split-low-rank{rank=32}", "range_method": "mse"},
        ),
        Arm(
            "learned",
            "learned ranges, distilled on every block too, long cooldown, averaged weights, direct",
            {"schedule": "direct"} | _LEARNED,
            features=True,
        ),
        Arm(
            "learned-fractional",
            "the same on the way 5-4.5-4",
            {"schedule": "short"} | _LEARNED,
            features=True,
        ),
        Arm("lsq", "learned ranges of weights and activations, direct", {"schedule": "direct", "recipe": "lsq"}),
        Arm(
            "blended", "FracBits' blend of two integer grids, linear", {"schedule": "linear", "recipe": "blended-grid"}
        ),
        Arm("geometric", "nine widths whose grid steps grow by one ratio", {"schedule": "geometric"}),
        Arm("linear", "continuous bits along a line", {"schedule": "linear"}),
        Arm("cosine", "continuous bits along half a cosine", {"schedule": "cosine"}),
        Arm("plateau", "a stage ends when its loss stops falling", {"schedule": "plateau"}),
        _fraqat_with("mse", "weight ranges of least squared error", weight_range="mse"),
        _fraqat_with("mse-ranges", "activation ranges of least squared error", range_method="mse"),
        _fraqat_with("lsq", "learned ranges of weights and activations", recipe="lsq"),
        Arm("fraqat-features", "fraqat, distilled on every block too", features=True, rate_of="fraqat"),
        _fraqat_with("ema", "weights averaged over the last stage", recipe="ema"),
        _fraqat_with("no-cooldown", "the learning rate stays", recipe="adamw{cooldown=0}"),
        _fraqat_with("cooldown", "the rate falls over half of the steps, not 0.3", recipe="adamw{cooldown=0.5}"),
        _fraqat_with("decay", "weight decay", recipe="adamw{weight-decay=0.01}"),
        _fraqat_with("reset", "the optimizer forgets between stages", recipe="adamw{state=reset}"),
        _fraqat_with("dampen", "weights pulled to the middle of their bins", recipe="dampen"),
        _fraqat_with("freeze", "oscillating weights fixed", recipe="freeze-oscillations"),
        _auto_without("minmax", "activation ranges from least to greatest value at first", range_method="minmax"),
        _auto_without("output", "distilled on the output alone", loss="mse"),
        _auto_without("no-lsq", "ranges not learned", recipe="ema,adamw{cooldown=0.5}"),
        _auto_without("no-ema", "weights not averaged", recipe="lsq,adamw{cooldown=0.5}"),
        _auto_without("cooldown", "the rate falls over 0.3 of the steps", recipe="lsq,ema"),
        _auto_without("direct", "straight to the target width", schedule="direct"),
        _lsq_with("fractional", "on the way 5-4.5-4", schedule="short"),
        _lsq_with("features", "distilled on every block too", features=True),
        _lsq_with("features-quarter", "distilled on every block with a quarter of the weight", loss=_QUARTER),
        _lsq_with("mse-ranges", "from activation ranges of least squared error", range_method="mse"),
        _lsq_with("ema", "weights averaged over the last stage", recipe="lsq,ema"),
        _lsq_with("cooldown", "the rate falls over half of the steps, not 0.3", recipe=_COOLED),
        _lsq_with(
            "features-cooldown", "distilled on every block too, with that cooldown", features=True, recipe=_COOLED
        ),
        Arm("rtn", "round to nearest, no training", {"steps": 0, "weight_range": "minmax"}, trains=False),
        Arm(
            "gptq",
            "error-compensated rounding, no training",
            {"steps": 0, "weight_range": "minmax", "recipe": "gptq"},
            trains=False,
        ),
        Arm(
            "direct-gptq",
            "direct, from error-compensated rounding",
            {"schedule": "direct", "recipe": "gptq"},
            rate_of="direct",
        ),
        Arm(
            "auto-gptq",
            "auto, from error-compensated rounding",
            _AUTO | {"recipe": "gptq,lsq,ema,adamw{cooldown=0.5}"},
            rate_of="auto",
        ),
        Arm(
            "rtn-groups",
            "round to nearest, with a scale for every 32 weights of a row",
            {"steps": 0, "weight_range": "minmax"} | _GROUPS,
            trains=False,
        ),
        Arm("mse", "ranges of least squared error, no training", {"steps": 0, "weight_range": "mse"}, trains=False),
    )
}
HEADLINE = ("direct", "auto", "lsq", "fraqat", "integer", "coarse", "svdqat-32")
