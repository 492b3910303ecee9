"""What `auto` stands for: of all that the study compared, what comes nearest to the teacher's own results, one by one.

`docs/study.md` has the figures: the arm `auto` there, beside the plain fine-tunes and beside what lies nearer by the
distribution of the results alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the job's module imports torch, which the command line's flags do without
    from fraqat_compiler.job import Outputs
    from fraqat_compiler.quant_spec import RangeMethod

AUTO = "auto"
SCHEDULE = "short"
LOSSES: dict[Outputs, str] = {"values": "mse,features", "logits": "kl,features"}
RECIPE = "lsq,ema,adamw{cooldown=0.5}"
NO_RECIPE = ""


def schedule_of(text: str) -> str:
    """The schedule that an option asks for."""
    return SCHEDULE if text == AUTO else text


def loss_of(text: str, outputs: Outputs) -> str:
    """The loss that an option asks for, of a job with such outputs."""
    return LOSSES[outputs] if text == AUTO else text


def recipe_of(text: str, *, steps: int | None) -> str:
    """The recipe that an option asks for; without a fine-tune `auto` has nothing to do."""
    if text != AUTO:
        return text
    return NO_RECIPE if steps == 0 else RECIPE


def activation_range_of(asked: RangeMethod | None, *, outputs: Outputs, fine_tuned: bool, dynamic: bool) -> RangeMethod:
    """How activation ranges follow from calibration; those of each token anew clip nothing.

    In language models the few largest values are the ones that matter (Sun et al. 2024, arXiv 2402.17762): least
    squared error clips them.
    """
    return asked or ("mse" if fine_tuned and not dynamic and outputs == "values" else "minmax")


def weight_range_of(asked: RangeMethod | None, *, outputs: Outputs, fine_tuned: bool) -> RangeMethod:
    """How weight ranges follow from the weights; a fine-tune starts from the paper's, the largest magnitude.

    So do language models, whose perplexity least squared error doubles (`docs/study.md`).
    """
    return asked or ("mse" if not fine_tuned and outputs == "values" else "minmax")
