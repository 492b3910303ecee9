"""Time one QAT train step beside the plain float step of the same model, and beside other toolkits.

    make bench
    python tools/benchmark_train_step.py [--tokens 256] [--rounds 21] [--json]

Every arm trains its own copy of the same model in this one process, on the same input, with AdamW. Each round runs one
step of every arm, in an order that rotates, so that a slow moment of the machine hits all of them alike. A toolkit that
is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step_arms import ARMS, Arm

WIDTH, HIDDEN, BLOCKS = 384, 1536, 4
LEARNING_RATE = 1e-5
WARMUP_ROUNDS = 3


class Mlp(nn.Module):
    """The feed-forward half of a transformer block: (batch, tokens, WIDTH) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.activation = nn.GELU()
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the transformed x."""
        result: Tensor = x + self.down(self.activation(self.up(self.norm(x))))
        return result


@dataclass
class Measured:
    """One arm with the seconds of each of its steps; `problem` says why there are none."""

    arm: Arm
    step: Callable[[], float] | None = None
    problem: str = ""
    seconds: list[float] = field(default_factory=list)
    first_loss: float = float("nan")
    last_loss: float = float("nan")

    def ratios(self, yardstick: Measured) -> list[float]:
        """Seconds over those of the float step of the same round."""
        return [own / other for own, other in zip(self.seconds, yardstick.seconds, strict=True)]


def main() -> None:
    """Measure, then print the table to stdout."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = nn.Sequential(*[Mlp() for _ in range(BLOCKS)])
    inputs = torch.randn(options.tokens // 64, 64, WIDTH)
    targets = torch.randn_like(inputs)
    measured = [prepare(arm, model, inputs, targets) for arm in ARMS]
    run_rounds([arm for arm in measured if arm.step is not None], options.rounds)
    rows = [summary(arm, measured[0]) for arm in measured]
    if options.json:
        print(json.dumps({"setting": setting(options), "arms": rows}, indent=2))
    else:
        print_table(rows, setting(options))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="rows of a batch, a multiple of 64 (default: 256)")
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each arm (default: 21)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    options = parser.parse_args()
    if options.tokens < 64 or options.tokens % 64 or options.rounds < 2:
        parser.error("--tokens must be a positive multiple of 64 and --rounds at least 2")
    return options


def prepare(arm: Arm, model: nn.Module, inputs: Tensor, targets: Tensor) -> Measured:
    """The arm ready to step, or the reason why it is not."""
    if arm.missing():
        return Measured(arm, problem="not installed")
    print(f"building {arm.title()}", file=sys.stderr)
    try:
        return Measured(arm, train_step(arm.make(model, inputs), inputs, targets))
    except Exception as error:  # another toolkit may fail in any way; the comparison goes on without it
        return Measured(arm, problem=f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")


def train_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
    """One optimizer step, which returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def run_rounds(arms: list[Measured], rounds: int) -> None:
    """Warm up, then time one step of each arm a round."""
    for number in range(WARMUP_ROUNDS + rounds):
        shift = number % len(arms)
        for arm in arms[shift:] + arms[:shift]:
            seconds, loss = timed(arm)
            if number == 0:
                arm.first_loss = loss
            if number >= WARMUP_ROUNDS:
                arm.seconds.append(seconds)
                arm.last_loss = loss
        print(f"\rround {number + 1} of {WARMUP_ROUNDS + rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)


def timed(arm: Measured) -> tuple[float, float]:
    """Seconds and loss of one step."""
    assert arm.step is not None
    start = time.perf_counter()
    loss = arm.step()
    return time.perf_counter() - start, loss


def summary(measured: Measured, yardstick: Measured) -> dict[str, Any]:
    """One row: ratio of medians, quartiles of the paired ratios, and the losses, which prove that it trains."""
    row: dict[str, Any] = {"name": measured.arm.title(), "quantizes": measured.arm.quantizes}
    if measured.problem:
        return row | {"problem": measured.problem}
    lower, _, upper = statistics.quantiles(measured.ratios(yardstick), n=4, method="inclusive")
    median = statistics.median(measured.seconds)
    return row | {
        "milliseconds": round(median * 1000, 2),
        "ratio": round(median / statistics.median(yardstick.seconds), 3),
        "ratio_quartiles": [round(lower, 3), round(upper, 3)],
        "first_loss": measured.first_loss,
        "last_loss": measured.last_loss,
    }


def setting(options: argparse.Namespace) -> str:
    """What was measured, in one line."""
    return (
        f"{BLOCKS} MLP blocks {WIDTH}/{HIDDEN}, {options.tokens} tokens, W4 per channel A8, AdamW, torch "
        f"{torch.__version__}, {options.threads} threads of {os.cpu_count()} cores, {options.rounds} rounds"
    )


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """Print the rows for people."""
    table = Table("toolkit", "quantizes", "ms", "ratio to float", "quartiles", "loss", title=title)
    for row in rows:
        if "problem" in row:
            table.add_row(row["name"], row["quantizes"], "-", row["problem"], "", "")
            continue
        low, high = row["ratio_quartiles"]
        losses = f"{row['first_loss']:.4f} -> {row['last_loss']:.4f}"
        table.add_row(
            row["name"],
            row["quantizes"],
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} - {high:.2f}",
            losses,
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
