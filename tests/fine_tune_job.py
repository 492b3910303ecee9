"""A small fine-tune as a script, for the tests that kill it: FOLDER RESULT [--resume]."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.fine_tune import FineTuneConfig, FineTuneResult, fine_tune
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.schedule import parse_schedule


def data() -> Iterator[tuple[Tensor]]:
    """Twenty batches that draw from the global random numbers of torch and Python."""
    for _ in range(20):
        yield (torch.randn(16, 8) * (1 + random.random()),)


def build() -> tuple[GraphModule, GraphModule]:
    """(teacher, student) that share no parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    teacher = capture(model, (torch.randn(16, 8),))
    student = InsertFakeQuant().run(GraphModule(teacher, copy.deepcopy(teacher.graph)), PassContext()).model
    for name, parameter in list(teacher.named_parameters()):
        fx_graph.set_tensor(student, name, nn.Parameter(parameter.detach().clone()))
    calibrate(student, [(torch.randn(16, 8),) for _ in range(4)])
    return teacher, student


def train(
    folder: Path, *, resume: bool = False, steps: int = 60, lr: float = 1e-3
) -> tuple[GraphModule, FineTuneResult]:
    teacher, student = build()
    config = FineTuneConfig(parse_schedule("fraqat"), steps=steps, lr=lr, checkpoint_every=3)
    return student, fine_tune(student, teacher, data, config, folder=folder, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tuned, result = train(Path(sys.argv[1]), resume="--resume" in sys.argv)
    parameters = {name: parameter.detach() for name, parameter in tuned.named_parameters()}
    save_file(parameters | {"losses": torch.tensor(result.losses, dtype=torch.float64)}, sys.argv[2])
