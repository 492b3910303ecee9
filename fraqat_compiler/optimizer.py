"""The optimizer of a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import AdamW, Optimizer

from fraqat_compiler.fine_tune_config import FineTuneConfig

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}  # where torch has AdamW as one kernel
QUANTIZERS = "fake_quant."  # how names of their parameters begin


def make_optimizer(parameters: Mapping[str, Tensor], config: FineTuneConfig) -> Optimizer:
    """AdamW as the config asks for; learned ranges, which come last, have a rate of their own and no decay."""
    device = next(iter(parameters.values())).device
    ranges = [parameter for name, parameter in parameters.items() if name.startswith(QUANTIZERS)]
    weights = [parameter for name, parameter in parameters.items() if not name.startswith(QUANTIZERS)]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": ranges, "weight_decay": 0.0, "factor": config.range_rate},
    ]
    present = [group for group in groups if group["params"]]
    return AdamW(present, lr=config.lr, betas=config.betas, fused=device.type in FUSED_DEVICES)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
