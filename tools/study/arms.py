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
        options: of `compile`, over PLAIN.
        trains: False for post-training quantization, which has no learning rate and no seed.
    """

    name: str
    says: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True


PLAIN = {"schedule": "fraqat", "loss": "mse", "recipe": "", "range_method": "minmax"}  # the paper's fine-tune
_LEARNED = {
    "loss": "mse,features{at=blocks.*}",
    "recipe": "lsq,ema{decay=0.95},adamw{cooldown=0.5 warmup=5}",
    "range_method": "mse",
}

ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            "auto",
            "the product's defaults",
            {"schedule": "auto", "loss": "auto", "recipe": "auto", "range_method": None},
        ),
        Arm("direct", "straight to the target width (the paper's vQAT)", {"schedule": "direct"}),
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
        Arm("fraqat-mse", "fraqat on weight ranges of least squared error", {"weight_range": "mse"}),
        Arm(
            "direct-mse-ranges",
            "direct on activation ranges of least squared error",
            {"schedule": "direct", "range_method": "mse"},
        ),
        Arm("fraqat-ema", "fraqat, weights averaged over the last stage", {"recipe": "ema"}),
        Arm("fraqat-features", "fraqat, distilled on every block too", {"loss": "mse,features{at=blocks.*}"}),
        Arm(
            "learned",
            "learned ranges, distilled on every block too, long cooldown, averaged weights, direct",
            {"schedule": "direct"} | _LEARNED,
        ),
        Arm(
            "learned-fractional",
            "the same on the way 5-4.5-4",
            {"schedule": "5x2,4.5x2,4x16"} | _LEARNED,
        ),
        Arm("lsq", "learned ranges of weights and activations, direct", {"schedule": "direct", "recipe": "lsq"}),
        Arm("fraqat-lsq", "fraqat with learned ranges", {"recipe": "lsq"}),
        Arm(
            "blended", "FracBits' blend of two integer grids, linear", {"schedule": "linear", "recipe": "blended-grid"}
        ),
        Arm("cosine", "continuous bits", {"schedule": "cosine"}),
        Arm("plateau", "a stage ends when its loss stops falling", {"schedule": "plateau"}),
        Arm("rtn", "round to nearest, no training", {"steps": 0, "weight_range": "minmax"}, trains=False),
        Arm("mse", "ranges of least squared error, no training", {"steps": 0, "weight_range": "mse"}, trains=False),
    )
}
HEADLINE = ("direct", "auto", "learned", "fraqat", "integer", "coarse", "svdqat-32", "learned-fractional")
PRECISIONS = {"W4A8": ("4", "8"), "W4A16": ("4", "16"), "W3A8": ("3", "8")}
