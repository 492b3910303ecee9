"""The fine-tune loop: distillation from the float teacher while the weights' bit width decays.

Algorithm 1 of FraQAT (arXiv 2510.14823): the teacher is always the original float model, the student's latent float
weights carry over from stage to stage, only the width of their fake quant changes. The paper leaves the optimizer's
state across stages, the learning-rate schedule and the norm of the loss open; here the state is kept, the rate is
constant and then cools down linearly over the last part of the budget (as compute-optimal QAT does, arXiv 2509.22935),
and the loss is the mean squared error relative to the teacher's mean square, which makes one learning rate fit outputs
of any size.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import AdamW
from torch.utils import _pytree as pytree

from fraqat_compiler import checkpoint as checkpoints
from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import Batch, run_batch
from fraqat_compiler.checkpoint import Checkpoint
from fraqat_compiler.errors import DataError, TrainingError
from fraqat_compiler.layers import end_widths
from fraqat_compiler.progress import Progress
from fraqat_compiler.schedule import BitWidthSchedule, BitWidthScheduler

Data = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class FineTuneConfig:
    """Options of the fine-tune.

    Attributes:
        schedule: widths and their shares of the budget.
        steps: optimizer steps in all.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        betas: of AdamW.
        cooldown: last share of the budget over which the rate falls linearly to zero.
        warmup: steps over which the rate rises from zero.
        grad_clip: greatest norm of all gradients together; None is no limit.
        checkpoint_every: steps between checkpoints; one is also written at the end of every stage.
        seed: of the random numbers that the data draws.
    """

    schedule: BitWidthSchedule
    steps: int
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    cooldown: float = 0.3
    warmup: int = 10
    grad_clip: float | None = 1.0
    checkpoint_every: int = 200
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.steps * self.cooldown, 1)
        return self.lr * rising * min(1.0, left)

    def run_identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run to be resumed by it."""
        return {
            "schedule": str(self.schedule),
            "steps": self.steps,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "cooldown": self.cooldown,
            "warmup": self.warmup,
            "grad_clip": self.grad_clip,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class FineTuneResult:
    """What a fine-tune leaves besides the changed student.

    Attributes:
        schedule: one entry a stage: bits, steps, and the mean loss of its last tenth.
        losses: loss of every step.
        resumed_from: step that the run went on from; 0 for a run from the start.
    """

    schedule: list[dict[str, Any]]
    losses: list[float]
    resumed_from: int = 0


def fine_tune(
    student: GraphModule,
    teacher: Callable[..., Any],
    data: Data,
    config: FineTuneConfig,
    *,
    folder: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> FineTuneResult:
    """Train `student` in place; it must not share the parameters that it trains with `teacher`.

    Args:
        student: graph with calibrated fake quants.
        teacher: the float model, called like the student.
        data: gives a fresh iterable of batches at each call; it is started again when it ends. Random numbers that it
            draws from torch, NumPy or `random` are seeded, and a resumed run draws the same ones: the iterable is
            started anew and the batches already used are drawn and dropped.
        config: options.
        folder: for checkpoints.
        resume: go on from the newest checkpoint in `folder`, if there is one.
        progress: hears of each step.

    Raises:
        TrainingError: the loss is NaN or infinite; the last good checkpoint is kept.
        DataError: the data yields nothing.
        CheckpointError: `resume` on a checkpoint of another run.
    """
    loop = _Loop(student, teacher, data, config, folder, progress or Progress())
    if resume:
        loop.restore()
    else:
        checkpoints.clear(folder)
    return loop.run()


def output_loss(student: Any, teacher: Any) -> Tensor:
    """Mean over the float outputs of MSE(student, teacher) / mean(teacher^2); scalar."""
    pairs = zip(pytree.tree_leaves(student), pytree.tree_leaves(teacher), strict=True)
    losses = [
        (mine - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)
        for mine, theirs in pairs
        if isinstance(mine, Tensor) and mine.is_floating_point()
    ]
    return torch.stack(losses).mean()


@dataclass
class _Loop:
    student: GraphModule
    teacher: Callable[..., Any]
    data: Data
    config: FineTuneConfig
    folder: Path
    progress: Progress
    losses: list[float] = field(default_factory=list)
    resumed_from: int = 0

    def __post_init__(self) -> None:
        self.parameters = _trained_parameters(self.student)
        self.optimizer = AdamW(
            self.parameters.values(),
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.scheduler = BitWidthScheduler(
            self.student, self.config.schedule, self.config.steps, end_widths(self.student)
        )

    def run(self) -> FineTuneResult:
        start = self.scheduler.last_step
        batches = self._batches()
        for _ in range(start):  # the data draws its random numbers again, up to where the run stopped
            next(batches)
        for step in range(start, self.config.steps):
            self._step(step, next(batches))
            self._keep(step + 1)
        return FineTuneResult(self._history(), self.losses, self.resumed_from)

    def _batches(self) -> Iterator[Batch]:
        """Batches without end, drawn from random streams that only the data uses."""
        streams = _RandomStreams(self.config.seed)
        iterator: Iterator[Batch] = iter(())
        while True:
            with streams:
                batch = next(iterator, None)
                if batch is None:
                    iterator = iter(self.data())
                    batch = next(iterator, None)
            if batch is None:
                raise DataError("the training data is empty.", "Let train_data() yield at least one batch.")
            yield batch

    def _step(self, step: int, batch: Batch) -> None:
        with torch.no_grad():
            target = run_batch(self.teacher, batch)
        loss = output_loss(run_batch(self.student, batch), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip or float("inf"))
        value = float(loss.detach())
        if not (np.isfinite(value) and bool(torch.isfinite(norm))):
            raise self._diverged(step, value)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.step()
        self.losses.append(value)
        self.progress.update(step + 1, f"{self.scheduler.bit_width:g} bits, loss {value:.4g}")
        self.scheduler.step()

    def _keep(self, done: int) -> None:
        if done % self.config.checkpoint_every == 0 or self.scheduler.ends_stage(done):
            self._save()

    def _diverged(self, step: int, loss: float) -> TrainingError:
        def size(name: str) -> float:
            gradient = self.parameters[name].grad
            largest = 0.0 if gradient is None else float(gradient.abs().max())
            return largest if np.isfinite(largest) else float("inf")

        worst = max(self.parameters, key=size)
        return TrainingError(
            f"the loss is {loss} at step {step + 1}, in stage {self.scheduler.stage + 1} "
            f"({self.scheduler.bit_width:g} bits); the largest gradient is that of {worst}. "
            f"The checkpoint before it is kept.",
            "Lower the learning rate (--lr), or check the training data for NaN.",
        )

    def _history(self) -> list[dict[str, Any]]:
        history, start = [], 0
        for bits, steps in self.scheduler.stages:
            tail = self.losses[start + steps - max(steps // 10, 1) : start + steps]
            history.append({"bits": bits, "steps": steps, "loss": float(np.mean(tail))})
            start += steps
        return history

    # State

    def _save(self) -> None:
        tensors = {f"parameter:{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}:{name}"] = value
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = Checkpoint(self.scheduler.last_step, tensors, {"scheduler": self.scheduler.state_dict()}, self._run())
        checkpoints.save(self.folder, state)

    def restore(self) -> None:
        """Take the newest checkpoint's state; without one the run starts from the beginning."""
        found = checkpoints.latest(self.folder, self._run())
        if found is None:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.tensors[f"parameter:{name}"])
                self.optimizer.state[parameter] = self._optimizer_state(found, name, parameter)
        self.losses = found.tensors["losses"].tolist()
        self.scheduler.load_state_dict(found.state["scheduler"])
        self.resumed_from = found.step

    def _optimizer_state(self, found: Checkpoint, name: str, parameter: Tensor) -> dict[str, Tensor]:
        suffix = f":{name}"
        keys = [key for key in found.tensors if key.startswith("optimizer.") and key.endswith(suffix)]
        kinds = {key.removeprefix("optimizer.").removesuffix(suffix): found.tensors[key] for key in keys}
        return {kind: tensor.to(parameter.device) for kind, tensor in kinds.items()}

    def _run(self) -> dict[str, Any]:
        return self.config.run_identity() | {"graph": _graph_digest(self.student, self.parameters)}


def _trained_parameters(student: GraphModule) -> dict[str, Tensor]:
    """Parameters that the graph reads, each once, by name."""
    names = [str(node.target) for node in student.graph.nodes if node.op == "get_attr"]
    tensors = {name: fx_graph.get_tensor(student, name) for name in dict.fromkeys(names)}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)}


def _graph_digest(student: GraphModule, parameters: dict[str, Tensor]) -> str:
    """Digest of the graph's structure and of its quantizers' specs, apart from the width of the stage."""
    lines = [f"{node.op} {node.target}" for node in student.graph.nodes]
    lines += [f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class _RandomStreams:
    """Random states of torch, NumPy and `random` that belong to the data alone: in force while it draws."""

    def __init__(self, seed: int) -> None:
        outside = _random_states()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self._inside = _random_states()
        _set_random_states(outside)

    def __enter__(self) -> None:
        self._outside = _random_states()
        _set_random_states(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = _random_states()
        _set_random_states(self._outside)


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
