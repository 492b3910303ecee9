"""Print the float model's figures as JSON, beside those of real digits, and draw `samples.png`."""

from __future__ import annotations

import json
from pathlib import Path

import job
import torch
from data import load
from metrics import Judge
from sampling import save_png

PICTURE = Path(__file__).with_name("samples.png")
DRAWN = job.SAMPLED_BATCHES * job.BATCH_SIZE


def real_figures() -> dict[str, float]:
    """The figures of as many held-out real digits as `evaluate` draws: what a perfect model would come to."""
    digits, held_out = load()
    judge = Judge.fit(digits)
    images, labels = held_out.images[:DRAWN], held_out.labels[:DRAWN]
    return {"accuracy": judge.accuracy(images, labels), "frechet_distance": judge.frechet(images)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    """Evaluate, print, draw."""
    torch.set_num_threads(1)
    model = job.model()
    figures = {"float": job.evaluate(model), "real": real_figures()}
    print(json.dumps({name: _rounded(values) for name, values in figures.items()}, indent=2))
    save_png(job.samples(model), PICTURE)


if __name__ == "__main__":
    main()
