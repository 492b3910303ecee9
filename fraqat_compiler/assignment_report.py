"""Report key `assignment`: which width each layer got, why, and what that is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.losses import Loss
from fraqat_compiler.mixed_precision import Layer, Plan
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.sensitivity import Sensitivities

MODEL = "(model)"  # weights that belong to no module of it

Measured = Callable[[Mapping[str, WeightFakeQuantize]], float]


def assignment_report(
    plan: Plan, sensitivities: Sensitivities, widths: Mapping[str, float], loss: Loss, measured: Measured
) -> dict[str, Any]:
    """The entry; JSON values only.

    Args:
        plan: the layers and their choices.
        sensitivities: predicted loss by tensor and width.
        widths: what each layer was given.
        loss: what they were measured in.
        measured: the loss of the calibration data with these quantizers and no others.
    """

    def arm(chosen: Mapping[str, float]) -> dict[str, Any]:
        return {
            "mean_bits": plan.mean_bits(chosen),
            "bytes": plan.bytes(chosen),
            "predicted_loss": sum(layer.loss(sensitivities, chosen[layer.name]) for layer in plan.layers),
            "measured_loss": measured(plan.quantizers(chosen)),
        }

    uniform = [{"bits": width, **arm(plan.uniform(width))} for width in sorted(plan.auto.widths)]
    return {
        "measure": to_text(loss),
        "budget": plan.asked,
        **arm(widths),
        "weights": plan.text(widths),
        "uniform": uniform,
        "layers": [_entry(layer, plan, sensitivities, widths[layer.name]) for layer in plan.layers],
    }


def _entry(layer: Layer, plan: Plan, sensitivities: Sensitivities, width: float) -> dict[str, Any]:
    lowest = plan.auto.lowest
    total = sum(other.loss(sensitivities, lowest) for other in plan.layers)
    share = layer.loss(sensitivities, lowest) / total if total else 0.0
    return {
        "name": layer.name or MODEL,
        "parameters": layer.parameters,
        "losses": {f"{asked:g}": layer.loss(sensitivities, asked) for asked in sorted(plan.auto.widths)},
        "share": share,
        "bits": layer.width(width),
        "reason": layer.fixed or _reason(layer, plan, width, share),
    }


def _reason(layer: Layer, plan: Plan, width: float, share: float) -> str:
    verb = "raised" if layer.width(width) > layer.width(plan.auto.lowest) else "lowest"
    weights = _percent(layer.parameters / plan.parameters)
    return f"{verb}: {_percent(share)} of the loss at {plan.auto.lowest:g} bits, {weights} of the weights"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "under 0.1 %"
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"
