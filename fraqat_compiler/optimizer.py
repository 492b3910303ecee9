"""The optimizer of a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import AdamW, Optimizer

from fraqat_compiler.fine_tune_config import FineTuneConfig

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}  # where torch has AdamW as one kernel


def make_optimizer(parameters: Mapping[str, Tensor], config: FineTuneConfig) -> Optimizer:
    """AdamW as the config asks for."""
    device = next(iter(parameters.values())).device
    return AdamW(
        parameters.values(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device.type in FUSED_DEVICES,
    )


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
