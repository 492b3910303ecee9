"""A small fine-tune in a process of its own, for the tests that stop it.

Processes come from a fork server that has loaded torch once, so each costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import checkpoint, fx_graph
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.fine_tune import FineTuneConfig, FineTuneResult, fine_tune
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.progress import Progress
from fraqat_compiler.schedule import parse_schedule
from fraqat_compiler.training_data import Data

# What takes long to load; the server cannot load this file, which lies outside every package.
HEAVY = ["fraqat_compiler.capture", "fraqat_compiler.fine_tune", "fraqat_compiler.passes.insert_fake_quant"]
HEAVY += ["torch._dynamo", "torch._inductor.config"]
RUN = {"lr": 0.1, "steps": 10}


def data() -> Iterator[tuple[Tensor]]:
    """Twenty batches that draw from the global random numbers of torch and Python."""
    for _ in range(20):
        yield (torch.randn(16, 8) * (1 + random.random()),)


def build(seed: int = 0, **options: Any) -> tuple[GraphModule, GraphModule]:
    """(teacher, student) that share no parameter."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    teacher = capture(model, (torch.randn(16, 8),))
    student = InsertFakeQuant(**options).run(fx_graph.shared_copy(teacher), PassContext()).model
    for name, parameter in list(teacher.named_parameters()):
        fx_graph.set_tensor(student, name, nn.Parameter(parameter.detach().clone()))
    calibrate(student, [(torch.randn(16, 8),) for _ in range(4)])
    return teacher, student


def train(
    folder: Path,
    *,
    resume: bool = False,
    steps: int = 60,
    lr: float = 1e-3,
    schedule: str = "fraqat",
    batches: Data = data,
    tuning: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[GraphModule, FineTuneResult]:
    """Fine-tune a new student; `tuning` are fields of the config, `options` those of insert-fake-quant."""
    teacher, student = build(**options)
    config = FineTuneConfig(parse_schedule(schedule), steps=steps, lr=lr, checkpoint_every=3, **(tuning or {}))
    return student, fine_tune(student, teacher, batches, config, folder=folder, resume=resume, progress=progress)


def run(folder: Path, result: Path, resume: bool, options: dict[str, Any]) -> None:
    """Train and write parameters and losses to `result`; when Ctrl-C stops it, its words."""
    torch.set_num_threads(1)
    try:
        tuned, history = train(folder, resume=resume, **options)
    except KeyboardInterrupt as interrupt:
        result.write_text(str(interrupt))
        return
    parameters = {name: parameter.detach() for name, parameter in tuned.named_parameters()}
    save_file(parameters | {"losses": torch.tensor(history.losses, dtype=torch.float64)}, result)


def save_and_die(folder: Path, step: int, fatal: int) -> None:
    """Save a checkpoint; kill -9 at the `fatal`-th file operation (open, mkdir, rename, remove) that Python audits."""
    operations = 0

    def audit(event: str, _: Any) -> None:
        nonlocal operations
        if event not in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            return
        operations += 1
        if operations == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    save_step(folder, step)


def save_step(folder: Path, step: int) -> Path:
    """A checkpoint whose content follows from its step."""
    tensors = {"parameter:a": torch.full((3,), float(step)), "step:a": torch.tensor(step)}
    return checkpoint.save(folder, checkpoint.Checkpoint(step, tensors, {"scheduler": {"last_step": step}}, RUN))


def start(target: Any, *arguments: Any) -> BaseProcess:
    """A process that can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(process: BaseProcess, folder: Path, above: int) -> None:
    """Until a checkpoint of a later step than `above` is there, or the process has ended."""
    while process.is_alive() and steps_kept(folder)[-1] <= above:
        time.sleep(0.001)


def steps_kept(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder; [0] when there is none."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("step-*")) or [0]
