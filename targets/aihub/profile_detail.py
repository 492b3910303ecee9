"""AI Hub's profile of one inference, as our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fraqat_compiler.errors import TargetError
from fraqat_compiler.target import Profile

MICROSECONDS = 1e-3  # in ms


def read_profile(detail: Mapping[str, Any], device: str, url: str) -> Profile:
    """What `download_profile` of the client gives: times in microseconds, memory in bytes.

    Raises:
        TargetError: it holds no time.
    """
    summary = detail.get("execution_summary", {})
    time = summary.get("estimated_inference_time")
    if not time:
        raise TargetError("AI Hub's profile holds no inference time.", f"See {url}")
    unit, ops = _ops(detail.get("execution_detail", []))
    notes = (
        f"Measured by AI Hub on {device}: {url}",
        "Peak memory is the whole process's, runtime included: no footprint of the model.",
    )
    return Profile("device", time * MICROSECONDS, _peak_memory(summary), ops, unit, notes)


def _peak_memory(summary: Mapping[str, Any]) -> int | None:
    """Upper end of AI Hub's range; old profiles have one figure."""
    figures = summary.get("inference_memory_peak_range")
    return (figures[1] if figures else summary.get("estimated_inference_peak_memory")) or None


def _ops(layers: list[Mapping[str, Any]]) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """The unit in which the layers are measured, and the layers, the costliest first.

    The NPU counts cycles; other processors and runtimes time.
    """
    timed = any(layer.get("execution_time") for layer in layers)
    unit, key, factor = ("ms", "execution_time", MICROSECONDS) if timed else ("cycles", "execution_cycles", 1)
    ops = [
        {
            "name": layer["name"],
            "op": layer["type"],
            "compute_unit": layer["compute_unit"],
            unit: layer.get(key, 0) * factor,
        }
        for layer in layers
    ]
    return unit, tuple(sorted(ops, key=lambda op: -op[unit]))
