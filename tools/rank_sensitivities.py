"""How well measures of sensitivity rank layers, and predict the loss of mixes of widths: a Markdown table.

    python tools/rank_sensitivities.py examples/digits_dit/job.py

Every measure sees the first half of the calibration data. The truth is the loss on the second half with the weights
alone quantized: of each layer by itself at the lowest width (`layers`, rank correlation), and of random mixes of the
widths (`mixes`, and the mean of predicted over true). The last columns hold the loss of the assignment that each
measure makes for a mean of bits; `random` is the mean over random assignments of that size.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.auto_widths import parse_auto
from fraqat_compiler.calibration import Batch
from fraqat_compiler.capture import capture
from fraqat_compiler.job import load_job
from fraqat_compiler.losses import Loss
from fraqat_compiler.mixed_precision import Plan, make_plan
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.registry import parse_target
from fraqat_compiler.sensitivity import Sensitivities, gauss_newton_diagonal, measure, measure_for, measured_loss

MIXES, RANDOM_ASSIGNMENTS = 24, 6


@dataclass
class Ranking:
    """One model's layers, and what each measure says of them."""

    graph: GraphModule
    plan: Plan
    seen: Sequence[Batch]
    held_out: Sequence[Batch]
    loss: Loss
    found: dict[str, Sensitivities] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[float, ...]:
        return self.plan.auto.widths

    def take(self) -> None:
        """Take every measure."""
        with self._timed("diagonal of Gauss-Newton (the product's)"):
            self._take(lambda: measure(self.graph, self.seen, self.plan.candidates, self.loss))
        with self._timed("its mean in a layer, as HAWQ-V2"):
            self._take(self._mean_diagonals)
        with self._timed("each layer run by itself"):
            self._take(lambda: self._of_every(lambda name, width: self._alone(self.seen, name, width)))
        with self._timed("error of the weights"):
            self._take(lambda: self._of_every(self._weight_error))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._name, start = name, time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _take(self, measured: Callable[[], Sensitivities]) -> None:
        self.found[self._name] = measured()

    def _of_every(self, value: Callable[[str, float], float]) -> Sensitivities:
        return {name: {width: value(name, width) for width in found} for name, found in self.plan.candidates.items()}

    def _mean_diagonals(self) -> Sensitivities:
        names = list(self.plan.candidates)
        diagonals = gauss_newton_diagonal(self.graph, self.seen, names, self.loss, 0, lambda done: None)
        return self._of_every(lambda name, width: float(diagonals[name].mean()) * self._squared_error(name, width))

    def _squared_error(self, name: str, width: float) -> float:
        weight = fx_graph.get_tensor(self.graph, name).detach()
        with torch.no_grad():
            return float((self.plan.candidates[name][width](weight) - weight).square().sum())

    def _weight_error(self, name: str, width: float) -> float:
        return self._squared_error(name, width) / float(fx_graph.get_tensor(self.graph, name).detach().square().sum())

    def _alone(self, batches: Sequence[Batch], name: str, width: float) -> float:
        return measured_loss(self.graph, batches, {name: self.plan.candidates[name][width]}, self.loss)

    def _of_widths(self, widths: Mapping[str, float]) -> float:
        return measured_loss(self.graph, self.held_out, self.plan.quantizers(widths), self.loss)

    def rows(self, means: Sequence[float]) -> Iterator[list[str]]:
        """A row of the table for each measure, and one for chance."""
        lowest = self.plan.auto.lowest
        alone = [self._alone(self.held_out, name, lowest) for name in self.plan.candidates]
        draw = random.Random(0)
        mixes = [{layer.name: draw.choice(self.widths) for layer in self.plan.layers} for _ in range(MIXES)]
        true = [self._of_widths(mix) for mix in mixes]
        for name, found in self.found.items():
            ranked = rank_correlation([by_width[lowest] for by_width in found.values()], alone)
            predicted = [sum(layer.loss(found, mix[layer.name]) for layer in self.plan.layers) for mix in mixes]
            ratio = np.mean(np.divide(predicted, true))
            losses = [self._of_widths(self._within(mean, found)) for mean in means]
            figures = [f"{ranked:.3f}", f"{rank_correlation(predicted, true):.3f}", f"{ratio:.2f}"]
            yield [name, f"{self.seconds[name]:.1f}", *figures, *(f"{loss:.2g}" for loss in losses)]
        yield ["random", "", "", "", "", *(f"{self._by_chance(mean):.2g}" for mean in means)]

    def _within(self, mean: float, found: Sensitivities) -> dict[str, float]:
        request = parse_auto(f"auto{{mean-bits={mean} widths={','.join(f'{width:g}' for width in self.widths)}}}")
        assert request is not None
        plan = Plan(request.auto, self.plan.pins, self.plan.layers, self.plan.other_bytes)
        return plan.assign(found)

    def _by_chance(self, mean: float) -> float:
        losses = []
        for seed in range(RANDOM_ASSIGNMENTS):
            draw = random.Random(seed)
            found = {name: self._random(draw, name) for name in self.plan.candidates}
            losses.append(self._of_widths(self._within(mean, found)))
        return float(np.mean(losses))

    def _random(self, draw: random.Random, name: str) -> dict[float, float]:
        """In proportion to the size, so that no layer is chosen for being small."""
        size = fx_graph.get_tensor(self.graph, name).numel()
        return dict(
            zip(sorted(self.widths), sorted((draw.random() * size for _ in self.widths), reverse=True), strict=True)
        )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def prepare(text: str, target_text: str, loss: str, widths: str) -> Ranking:
    """Capture a job's model and ask the target about its layers."""
    job, target = load_job(text), parse_target(target_text)
    torch.manual_seed(0)
    inputs: Any = job.example_inputs()
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})
    context = PassContext(target=target, example_inputs=(args, kwargs))
    captured = capture(job.model(), args, kwargs)
    graph = PassManager.from_text(target.prepare_pipeline()).run(captured, context).model

    def insert(weights: str) -> GraphModule:
        inserted: GraphModule = (
            InsertFakeQuant(weights=weights, weight_range="mse").run(fx_graph.shared_copy(graph), context).model
        )
        return inserted

    lowest = min(map(float, widths.split(",")))
    request = parse_auto(f"auto{{mean-bits={lowest:g} widths={widths}}}")
    assert request is not None
    batches = list(job.calibration_batches())
    half = len(batches) // 2
    return Ranking(graph, make_plan(request, "", insert), batches[:half], batches[half:], measure_for(loss))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--loss", default="mse")
    parser.add_argument("--widths", default="4,8")
    parser.add_argument("--means", default="4.25,4.5,5")
    options = parser.parse_args()
    ranking = prepare(options.job, options.target, options.loss, options.widths)
    ranking.take()
    means = [float(mean) for mean in options.means.split(",")]
    heads = ["measure", "seconds", "layers", "mixes", "predicted / true", *(f"loss at {mean:g}" for mean in means)]
    print(f"{len(ranking.plan.layers)} layers, {ranking.plan.parameters:,} weights, {len(ranking.seen)} batches seen")
    for row in (heads, ["---"] * len(heads), *ranking.rows(means)):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
