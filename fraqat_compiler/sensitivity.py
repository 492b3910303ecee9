"""Sensitivity: what quantizing one layer's weights costs, for every layer and width from one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import Batch, run_batch, run_observed
from fraqat_compiler.errors import DataError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.losses import Kl, Loss, Mse, Seen, parse_losses

MIN_PROBES = 32  # gradients in all; few batches take several each

Candidates = Mapping[str, Mapping[float, WeightFakeQuantize]]  # by tensor, by the width asked for
Sensitivities = dict[str, dict[float, float]]


def measure_for(loss: str) -> Loss:
    """What the outputs' distance is measured in: `kl` where the text of the loss has it, else relative `mse`."""
    return next((term for term in parse_losses(loss) if isinstance(term, Kl)), Mse())


def measure(
    graph: GraphModule,
    batches: Sequence[Batch],
    candidates: Candidates,
    loss: Loss,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Sensitivities:
    """Loss that each tensor's rounding brings by itself, to second order.

    The float model is the minimum of a distillation loss, so the loss that a perturbation d of the weights brings is
    d^T F d, where F is half the Gauss-Newton matrix of the loss (for `kl` the Fisher matrix). Rounding errors have
    little to do with each other, so its diagonal is taken: `sum_i F_ii (Q_b(w_i) - w_i)^2`, as in optimal brain damage
    (LeCun et al. 1989), SqueezeLLM (Kim et al. 2023, arXiv 2306.07629) and, with the mean of a layer's diagonal in the
    place of its entries, HAWQ-V2 (Dong et al. 2019, arXiv 1911.03852). The diagonal is estimated without bias from
    gradients of outputs weighted by random signs (Hutchinson 1989), for `kl` by the sampled score (Martens 2014, arXiv
    1412.1193).

    Cost: one forward and one backward a batch (more backwards where there are fewer than MIN_PROBES batches),
    whatever the number of layers and widths, and one float32 copy of the weights.

    Args:
        graph: the float graph.
        batches: calibration data.
        candidates: a quantizer for each tensor and width; they take their ranges from the tensors.
        loss: `Mse` or `Kl`.
        seed: of the random signs; no other random state is touched.
        on_batch: called with the number of batches done.

    Returns:
        By tensor and width, in units of `loss`, the mean over the batches. A tensor that no output depends on has 0.

    Raises:
        DataError: a batch that does not run, or makes outputs or gradients that are not finite.
    """
    diagonal = gauss_newton_diagonal(graph, batches, list(candidates), loss, seed, on_batch)
    return {
        name: _of_tensor(fx_graph.get_tensor(graph, name).detach(), diagonal[name], by_width)
        for name, by_width in candidates.items()
    }


@torch.no_grad()
def _of_tensor(weight: Tensor, diagonal: Tensor, by_width: Mapping[float, WeightFakeQuantize]) -> dict[float, float]:
    known: dict[Any, float] = {}
    for quantizer in by_width.values():
        if quantizer.spec not in known:
            known[quantizer.spec] = float((quantizer(weight) - weight).float().square_().mul_(diagonal).sum())
    return {width: known[quantizer.spec] for width, quantizer in by_width.items()}


@torch.enable_grad()
def gauss_newton_diagonal(
    graph: GraphModule,
    batches: Sequence[Batch],
    names: list[str],
    loss: Loss,
    seed: int,
    on_batch: Callable[[int], None],
) -> dict[str, Tensor]:
    """The Gauss-Newton matrix's diagonal for each tensor, the mean over batches and probes."""
    generator = torch.Generator().manual_seed(seed)
    probes = math.ceil(MIN_PROBES / len(batches))
    weights = {name: fx_graph.get_tensor(graph, name).detach().requires_grad_() for name in names}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for index, batch in enumerate(batches):
        outputs = _outputs(graph, weights, batch, index)
        for probe in range(probes):
            cotangents = [_cotangent(loss, output.detach(), len(outputs), generator) for output in outputs]
            _add_squares(sums, _gradients(outputs, list(weights.values()), cotangents, last=probe + 1 == probes))
        _refuse_infinite(sums.values(), f"calibration batch {index} gives gradients that are not finite")
        on_batch(index + 1)
    count = len(batches) * probes
    return {name: total.div_(count) for name, total in sums.items()}


def _gradients(
    outputs: list[Tensor], weights: list[Tensor], cotangents: list[Tensor], *, last: bool
) -> tuple[Tensor | None, ...]:
    """Of the outputs that depend on a weight, weighted by the cotangents; None for a weight that none depends on."""
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not pairs:
        return (None,) * len(weights)
    dependent, weighting = zip(*pairs, strict=True)
    return torch.autograd.grad(dependent, weights, weighting, retain_graph=not last, allow_unused=True)


def _add_squares(sums: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> None:
    for total, gradient in zip(sums.values(), gradients, strict=True):
        if gradient is not None:
            total.addcmul_(gradient.float(), gradient.float())


def _outputs(graph: GraphModule, weights: Mapping[str, Tensor], batch: Batch, index: int) -> list[Tensor]:
    """The float outputs."""
    result = run_observed(lambda *args, **kwargs: _call(graph, weights, args, kwargs), batch, index)
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    outputs = [leaf for leaf in leaves if leaf.is_floating_point()]
    if not outputs:
        raise DataError(
            "the model has no float output that the effect of a width could be measured on.",
            "Let it return its logits or features, or name the widths: --weights 4,head=8.",
        )
    _refuse_infinite(outputs, f"calibration batch {index} makes the float model's output not finite")
    return outputs


def _call(graph: GraphModule, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The graph with other weights; a tied one is given by each of its names."""
    return functional_call(graph, dict(weights), args, kwargs, tie_weights=False)


def _refuse_infinite(tensors: Any, problem: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DataError(f"{problem}.", "Look for NaN or infinite values in the data and the model.")


def _cotangent(loss: Loss, output: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
    """A random v with E[v v^T] the Hessian of the loss in this output, halved.

    mse: d^2 / sum(output^2) has I / sum(output^2). kl: T^2 KL of logits z is 1/2 dz^T (diag p - p p^T) dz, whose
    middle is the covariance of onehot(y) - p for y drawn from p = softmax(z / T).
    """
    if isinstance(loss, Kl):
        return _score(output, loss.temperature, outputs, generator)
    signs = torch.randint(0, 2, output.shape, generator=generator).mul_(2).sub_(1)
    scale = output.float().square().sum().mul(outputs).clamp_min(1e-12).sqrt()
    return signs.to(output.device) / scale.to(output.dtype)


def _score(logits: Tensor, temperature: float, outputs: int, generator: torch.Generator) -> Tensor:
    probabilities = torch.softmax(logits.float() / temperature, -1).flatten(0, -2)
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
    score = torch.zeros_like(probabilities).scatter_(-1, drawn, 1.0) - probabilities
    score = score / math.sqrt(2 * len(probabilities) * outputs)
    return score.view(logits.shape).to(logits.dtype)


@torch.no_grad()
def measured_loss(
    graph: GraphModule, batches: Sequence[Batch], quantizers: Mapping[str, WeightFakeQuantize], loss: Loss
) -> float:
    """Loss against the float graph when these weights, and nothing else, are quantized; the mean over the batches."""
    weights = {name: quantizer(fx_graph.get_tensor(graph, name).detach()) for name, quantizer in quantizers.items()}
    losses = []
    for batch in batches:
        quantized = run_batch(lambda *args, **kwargs: _call(graph, weights, args, kwargs), batch)
        losses.append(float(loss(Seen(batch, quantized, run_batch(graph, batch), {}))))
    return sum(losses) / len(losses)
