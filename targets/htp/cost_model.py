"""How long a graph takes on a phone, estimated from what it has to do and from rates fitted to public measurements."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from fraqat_compiler.target import Profile
from fraqat_compiler.targets.htp.op_counts import OpCount

Unit = Literal["matrix", "vector", "memory"]
Rates = Mapping[str, float]  # by name, in the units of cost_model.csv; `overhead` is in milliseconds
Amounts = Mapping[str, float]  # by name of the rate; amount / rate is milliseconds

OVERLAP = 2.5  # 1: the units take turns; infinity: the busiest one hides the others
_MATRIX_KINDS = frozenset({"conv", "matmul"})
_ATTENTION_KINDS = frozenset({"matmul", "softmax"})
_MEGA = 1e6


@dataclass(frozen=True)
class CostModel:
    """The rates of one SoC, and how far they err on architectures that they were not fitted to.

    Attributes:
        part: SM8750.
        rates: see cost_model.csv.
        median_error: half of the left-out measurements lie nearer to the estimate, as a share of the measurement.
        p90_error: nine in ten lie nearer.
    """

    part: str
    rates: Rates
    median_error: float
    p90_error: float


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one inference.

    Attributes:
        latency_ms: of the whole graph.
        units: how long each unit would be busy; they overlap.
        ops: milliseconds of each op, in the order given; with the fixed overhead they add up to the latency.
    """

    latency_ms: float
    units: Mapping[Unit, float]
    ops: tuple[float, ...]


@cache
def known_models() -> Mapping[str, CostModel]:
    """The SoCs that measurements exist for, by part."""
    text = files("fraqat_compiler.targets.htp").joinpath("cost_model.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return {part: _model(part, rows) for part in rows[0] if part.startswith("SM")}


def _model(part: str, rows: Iterable[Mapping[str, str]]) -> CostModel:
    values = {row["name"]: float(row[part]) for row in rows}
    errors = values.pop("median_error"), values.pop("p90_error")
    return CostModel(part, values, *errors)


def estimate(ops: Iterable[OpCount], rates: Rates, vtcm_mb: float) -> Estimate:
    """Time of a graph: the fixed overhead and the busy times of three units that work at once.

    The busy times M of the matrix unit, V of the vector unit and D of the memory combine to
    (M^p + V^p + D^p)^(1/p) with p = OVERLAP, a roofline with a soft corner. An op's share of it is its share of each
    unit, weighted by how much that unit counts (the derivative; the function is homogeneous, so they add up).
    """
    amounts = [demand(op, vtcm_mb) for op in ops]
    summed = total(amounts)
    busy = busy_times(summed, rates)
    combined = _combined(busy)
    weights = {unit: (time / combined) ** (OVERLAP - 1) if combined else 0.0 for unit, time in busy.items()}
    shares = (sum(weights[u] * time for u, time in busy_times(amount, rates).items()) for amount in amounts)
    return Estimate(latency_ms(summed, rates), busy, tuple(shares))


def to_profile(ops: Sequence[OpCount], made: Estimate, model: CostModel) -> Profile:
    """The estimate as a target hands it on, costliest op first."""
    costliest = sorted(zip(ops, made.ops, strict=True), key=lambda pair: -pair[1])
    rows = [{"name": op.name, "op": op.op, "ms": ms} for op, ms in costliest]
    return Profile(source="estimate", latency_ms=made.latency_ms, ops=tuple(rows), notes=_notes(made, model))


def _notes(made: Estimate, model: CostModel) -> tuple[str, ...]:
    busy = ", ".join(f"{unit} {ms:.3g} ms" for unit, ms in made.units.items())
    return (
        f"Estimated for {model.part} in burst mode, not measured. Expected error, from architectures that it was not "
        f"fitted to: below {model.median_error:.0%} for half of them, below {model.p90_error:.0%} for nine in ten.",
        f"Busy times, which overlap: {busy}.",
    )


def latency_ms(amounts: Amounts, rates: Rates) -> float:
    """Time of a graph that demands these amounts."""
    return rates["overhead"] + _combined(busy_times(amounts, rates))


def total(amounts: Iterable[Amounts]) -> Amounts:
    """What several ops demand together."""
    summed: dict[str, float] = {}
    for amount in amounts:
        for name, value in amount.items():
            summed[name] = summed.get(name, 0.0) + value
    return summed


def busy_times(amounts: Amounts, rates: Rates) -> dict[Unit, float]:
    """Milliseconds that each unit needs."""
    busy: dict[Unit, float] = {"matrix": 0.0, "vector": 0.0, "memory": 0.0}
    for name, amount in amounts.items():
        busy[unit_of(name)] += amount / rates[name]
    return busy


def unit_of(rate: str) -> Unit:
    """The unit that a rate belongs to."""
    if rate.startswith("matrix"):
        return "matrix"
    return "memory" if rate == "ddr" else "vector"


def _combined(busy: Mapping[Unit, float]) -> float:
    combined: float = sum(time**OVERLAP for time in busy.values()) ** (1 / OVERLAP)
    return combined


def demand(op: OpCount, vtcm_mb: float) -> Amounts:
    """What one op demands: GMAC of the matrix unit, MMAC and MB of the vector unit, MB of the memory, and one op."""
    return {"ops": 1.0, "ddr": _traffic(op, vtcm_mb)} | _work(op)


def _work(op: OpCount) -> dict[str, float]:
    data = (op.read_bytes + op.written_bytes) / _MEGA
    if op.kind in _MATRIX_KINDS:
        return {f"matrix_{_precision(op)}": op.tiled_macs / 1e9, "operands" + _suffix(op): data}
    if op.kind == "depthwise":  # a large kernel multiplies more for each byte than a small one
        return {f"depthwise_{_precision(op)}": op.macs / _MEGA, "elementwise" + _suffix(op): data}
    return {op.kind + _suffix(op): data}


def _precision(op: OpCount) -> str:
    if not op.quantized:
        return "float"
    return "8" if op.activation_bits <= 8 else "16"


def _suffix(op: OpCount) -> str:
    return "" if op.quantized else "_float"


def _traffic(op: OpCount, vtcm_mb: float) -> float:
    """MB of weights, and of the activations of attention over several heads at once that do not fit the VTCM."""
    weights = op.weight_bytes / _MEGA
    if op.kind not in _ATTENTION_KINDS or op.matrices == 1:
        return weights
    return weights + sum(size for size in (op.read_bytes / _MEGA, op.written_bytes / _MEGA) if size > vtcm_mb)
