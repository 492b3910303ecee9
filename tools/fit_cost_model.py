"""Fit the rates of `targets/htp/cost_model.csv` to measured latencies, and tell how far they err.

    python tools/fit_cost_model.py MEASUREMENTS.csv [--write | --shipped]

The measurements are public ones of Qualcomm AI Hub (columns model, component, device, precision, runtime, ms). What
each model has to do is in `tools/cost_model_ops.csv`, which `tools/cost_model_architectures.py` makes. The error is
that of each architecture family when the rates are fitted to all the others. Shown too: whether the estimates order
the precisions of a network as the measurements do. Needs scipy.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from fraqat_compiler.targets.htp import cost_model
from fraqat_compiler.targets.htp.cost_model import Amounts, Rates, Unit, demand, known_models, latency_ms, total
from fraqat_compiler.targets.htp.op_counts import OpCount

ROOT = Path(__file__).parents[1]
OPS_FILE = ROOT / "tools/cost_model_ops.csv"
COST_FILE = ROOT / "targets/htp/cost_model.csv"

VTCM_MB = 8.0  # of all three SoCs, see socs.csv
PARTS = {"S24": "SM8650", "S25": "SM8750", "QRD": "SM8850"}  # the first letters of the measurements' device
BASE = "SM8750"
BITS = {"float": (16, 16), "w8a8": (8, 8), "w8a16": (8, 16)}  # of weights and activations; mixed widths are left out
QNN_RUNTIMES = frozenset({"qnn_dlc", "qnn_context_binary", "precompiled_qnn_onnx"})  # what the HTP target makes
OTHER_RUNTIMES = 0.3  # weight of the others, where a model was measured in both
ROBUST = 0.4  # log error from which a measurement counts less and less, Cauchy
LEAST_GAIN = 1.25  # from SM8650 to SM8850; their slowest unit gains 1.4 and their fastest 1.7
SMALL_MS = 1.0  # below it the fixed overhead, which may gain less, is much of the time
FAMILIES = {
    "resnet18": "ResNet",
    "resnet50": "ResNet",
    "resnext101": "ResNet",
    "bert_base_uncased_hf": "BERT",
    "albert_base_v2_hf": "BERT",
    "whisper_tiny": "Whisper",
    "whisper_small": "Whisper",
    "stable_diffusion_v1_5/unet": "diffusion U-Net",
    "controlnet_canny": "diffusion U-Net",
}  # the others are families of their own


@dataclass(frozen=True)
class Prior:
    """Where a rate of the base SoC is looked for.

    Attributes:
        value: what the hardware should do.
        spread: standard deviation of its logarithm.
        unit: of the value.
        meaning: shown in the table.
    """

    value: float
    spread: float
    unit: str
    meaning: str


PRIORS = {
    "overhead": Prior(0.08, 0.4, "ms", "fixed time of an inference"),
    "ops": Prior(2000, 0.4, "ops/ms", "ops started"),
    "matrix_8": Prior(28, 0.15, "TMAC/s", "matrix unit, 8-bit activations, channels rounded up to 32"),
    "matrix_16": Prior(8.5, 0.15, "TMAC/s", "the same, 16-bit activations"),
    "matrix_float": Prior(8, 0.15, "TMAC/s", "the same, half precision"),
    "operands": Prior(500, 0.4, "GB/s", "activations into and out of the matrix unit"),
    "depthwise_8": Prior(1000, 0.4, "GMAC/s", "depthwise convolution, 8 bits"),
    "depthwise_16": Prior(500, 0.4, "GMAC/s", "depthwise convolution, 16 bits"),
    "softmax": Prior(120, 0.4, "GB/s", "softmax, bytes read and written"),
    "softmax_float": Prior(50, 0.4, "GB/s", "softmax in half precision"),
    "norm": Prior(120, 0.4, "GB/s", "normalization"),
    "elementwise": Prior(200, 0.4, "GB/s", "elementwise ops, reductions, pooling, depthwise convolution"),
    "transpose": Prior(20, 0.4, "GB/s", "transposes that move the last axis"),
    "rows": Prior(50, 0.5, "GB/s", "transposes that keep it, as of heads of attention"),
    "copy": Prior(150, 0.4, "GB/s", "concatenation, slices, resizing"),
    "ddr": Prior(60, 0.12, "GB/s", "weights, and attention that does not fit the VTCM"),
}
FLOAT_OF = {
    **{f"{name}_float": name for name in ("operands", "norm", "elementwise", "transpose", "rows", "copy")},
    "depthwise_float": "depthwise_16",
}
SLOWDOWN = Prior(1.4, 0.2, "1", "half precision against 16-bit integers on the vector unit")
SPEEDS = {
    ("SM8650", "matrix"): Prior(1.3, 0.1, "1", ""),
    ("SM8650", "vector"): Prior(1.3, 0.1, "1", ""),
    ("SM8650", "memory"): Prior(1.2, 0.1, "1", ""),
    ("SM8850", "matrix"): Prior(0.75, 0.1, "1", ""),
    ("SM8850", "vector"): Prior(0.8, 0.1, "1", ""),
    ("SM8850", "memory"): Prior(0.85, 0.1, "1", ""),
}  # time against that of the base
_ALL = (*PRIORS.values(), SLOWDOWN, *SPEEDS.values())
_CENTER = np.log([prior.value for prior in _ALL])
_SPREAD = np.array([prior.spread for prior in _ALL])

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One measurement."""

    model: str
    part: str
    precision: str
    runtime: str
    ms: float

    @property
    def family(self) -> str:
        return FAMILIES.get(self.model, self.model)

    @property
    def group(self) -> tuple[str, str, str]:
        """The same network measured through several runtimes."""
        return self.model, self.part, self.precision

    @property
    def series(self) -> tuple[str, str, str]:
        """The same network measured on several SoCs."""
        return self.model, self.precision, self.runtime


@dataclass(frozen=True)
class Error:
    """An estimate beside a measurement that it was not fitted to."""

    row: Row
    estimate: float

    @property
    def relative(self) -> float:
        return self.estimate / self.row.ms - 1


def read_measurements(path: Path) -> list[Row]:
    """The rows whose model is in the table of ops and whose precision is one."""
    known = set(_counts())
    with path.open(newline="", encoding="utf-8") as file:
        rows = [_row(row) for row in csv.DictReader(file) if row["precision"] in BITS and _part(row["device"])]
    left_out = sorted({row.model for row in rows} - known)
    if left_out:
        print(f"not in {OPS_FILE.name}, left out: {', '.join(left_out)}")
    return [row for row in rows if row.model in known]


def _row(row: dict[str, str]) -> Row:
    model = row["model"]
    if f"{model}/{row['component']}" in _counts():
        model = f"{model}/{row['component']}"
    return Row(model, _part(row["device"]), row["precision"], row["runtime"], float(row["ms"]))


def _part(device: str) -> str:
    """The SoC of a device; empty for one of another generation."""
    return next((part for prefix, part in PARTS.items() if device.startswith(prefix)), "")


@cache
def _counts() -> dict[str, list[tuple[int, OpCount]]]:
    """How often each model has which op."""
    counts: defaultdict[str, list[tuple[int, OpCount]]] = defaultdict(list)
    with OPS_FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {name: int(row[name]) for name in "macs tiled_macs read written weights matrices".split()}
            op = OpCount(name="", op=row["op"], kind=row["kind"], **numbers)  # type: ignore[arg-type]
            counts[row["model"]].append((int(row["times"]), op))
    return dict(counts)


@cache
def amounts(model: str, weight_bits: int, activation_bits: int, quantized: bool) -> Amounts:
    """What a model demands at these widths."""
    scaled = []
    for times, op in _counts()[model]:
        at_width = dataclasses.replace(
            op, weight_bits=weight_bits, activation_bits=activation_bits, quantized=quantized
        )
        scaled.append({name: times * amount for name, amount in demand(at_width, VTCM_MB).items()})
    return total(scaled)


def _amounts_of(row: Row) -> Amounts:
    return amounts(_graph_of(row), *BITS[row.precision], row.precision != "float")


def _graph_of(row: Row) -> str:
    """Name in the table of ops: the model's, or that of what one runtime makes of it."""
    own = f"{row.model}/{row.runtime}"
    return own if own in _counts() else row.model


def unscaled(rows: Sequence[Row]) -> set[Row]:
    """Rows whose time hardly drops over two generations of SoCs: none of the modelled units can have taken it."""
    series: defaultdict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        series[row.series][row.part] = row.ms
    stuck = {key for key, times in series.items() if _is_stuck(times)}
    return {row for row in rows if row.series in stuck}


def _is_stuck(times: Mapping[str, float]) -> bool:
    if min(times.values()) < SMALL_MS or not {"SM8650", "SM8850"} <= times.keys():
        return False
    return times["SM8650"] / times["SM8850"] < LEAST_GAIN


def rates_of(point: Vector, part: str) -> Rates:
    """The rates that a point of the search means."""
    values = np.exp(point)
    rates = dict(zip(PRIORS, map(float, values), strict=False))
    slowdown = float(values[len(PRIORS)])
    rates |= {name: rates[base] / slowdown for name, base in FLOAT_OF.items()}
    if part == BASE:
        return rates
    speeds = dict(zip(SPEEDS, map(float, values[len(PRIORS) + 1 :]), strict=True))
    slower = {unit: speeds[part, unit] for unit in get_args(Unit)}
    scaled = {name: rate / slower[cost_model.unit_of(name)] for name, rate in rates.items() if name != "overhead"}
    return scaled | {"overhead": rates["overhead"] * slower["vector"]}


def fit(rows: Sequence[Row]) -> Vector:
    """The point that explains the rows best: robust log errors, and how far it strays from the priors.

    Rows whose time does not scale with the SoC are left out.
    """
    left_out = unscaled(rows)
    rows = sorted((row for row in rows if row not in left_out), key=lambda row: row.part)
    weights, logs = _weights(rows), np.log([row.ms for row in rows])
    stacked = {part: _stacked([row for row in rows if row.part == part]) for part in sorted({row.part for row in rows})}

    def residuals(point: Vector) -> Vector:
        times = [_latencies(amount, rates_of(point, part)) for part, amount in stacked.items()]
        errors = np.log(np.concatenate(times)) - logs
        robust = np.sign(errors) * np.sqrt(weights * np.log1p((errors / ROBUST) ** 2))
        return np.concatenate([robust, (point - _CENTER) / _SPREAD])

    return np.asarray(least_squares(residuals, _CENTER, max_nfev=60).x, dtype=np.float64)


def _stacked(rows: Sequence[Row]) -> dict[str, Vector]:
    """What each row demands, one array for each rate."""
    demands = [_amounts_of(row) for row in rows]
    names = sorted(set().union(*demands))
    return {name: np.array([amount.get(name, 0.0) for amount in demands]) for name in names}


def _latencies(stacked: Mapping[str, Vector], rates: Rates) -> Vector:
    return latency_ms(stacked, rates)  # type: ignore[arg-type, return-value]  # the formula holds for arrays too


def _weights(rows: Sequence[Row]) -> Vector:
    """Each network on each SoC counts the same, through however many runtimes it was measured."""
    kinds = defaultdict(list)
    for row in rows:
        kinds[row.group, row.runtime in QNN_RUNTIMES].append(row)
    both = {group for group, is_qnn in kinds if is_qnn}

    def weight(row: Row) -> float:
        is_qnn = row.runtime in QNN_RUNTIMES
        return (1.0 if is_qnn or row.group not in both else OTHER_RUNTIMES) / len(kinds[row.group, is_qnn])

    return np.array([weight(row) for row in rows])


def cross_validate(rows: Sequence[Row]) -> list[Error]:
    """Errors of each family under rates that were fitted without it."""
    errors = []
    for family in sorted({row.family for row in rows}):
        point = fit([row for row in rows if row.family != family])
        errors += [Error(row, _estimate(point, row)) for row in rows if row.family == family]
    return errors


def _estimate(point: Vector, row: Row) -> float:
    return latency_ms(_amounts_of(row), rates_of(point, row.part))


def quantiles(errors: Iterable[Error]) -> tuple[float, float]:
    """Median and 90th percentile of the relative error's magnitude."""
    sizes = [abs(error.relative) for error in errors]
    return float(np.median(sizes)), float(np.quantile(sizes, 0.9))


def error_table(errors: Sequence[Error]) -> Table:
    """Errors by family, then over all and over parts of the rows."""
    table = Table("left out", "rows", "median", "90 %", "signed median")
    for family in sorted({error.row.family for error in errors}):
        _add(table, family, [error for error in errors if error.row.family == family])
    table.add_section()
    integer = [error for error in errors if error.row.precision != "float"]
    qnn = [error for error in errors if error.row.runtime in QNN_RUNTIMES]
    stuck = unscaled([error.row for error in errors])
    _add(table, "all rows", errors)
    _add(table, "that scale with the SoC", [error for error in errors if error.row not in stuck])
    _add(table, "quantized", integer)
    _add(table, "through QNN", qnn)
    _add(table, "quantized, through QNN", [error for error in integer if error.row.runtime in QNN_RUNTIMES])
    for part in PARTS.values():
        _add(table, part, [error for error in errors if error.row.part == part])
    return table


def _add(table: Table, name: str, errors: Sequence[Error]) -> None:
    if not errors:
        return
    median, p90 = quantiles(errors)
    signed = float(np.median([error.relative for error in errors]))
    table.add_row(name, str(len(errors)), f"{median:.1%}", f"{p90:.1%}", f"{signed:+.1%}")


def order_table(errors: Sequence[Error]) -> Table:
    """Pairs of precisions of one network on one SoC through one runtime: how many are estimated as measured."""
    table = Table("faster / slower", "pairs", "same order", "through QNN", "same order", "wrong for")
    pairs = pairs_of_precisions(errors)
    kinds = defaultdict(list)
    for pair in pairs:
        kinds[" / ".join(error.row.precision for error in pair)].append(pair)
    for kind, members in sorted(kinds.items()):
        _add_order(table, kind, members)
    table.add_section()
    _add_order(table, "all", pairs)
    return table


def pairs_of_precisions(errors: Iterable[Error]) -> list[tuple[Error, Error]]:
    """Two rows each that differ in their precision only, the one measured faster first."""
    alike = defaultdict(list)
    for error in sorted(errors, key=lambda error: error.row.ms):
        alike[error.row.model, error.row.part, error.row.runtime].append(error)
    return [pair for group in alike.values() for pair in itertools.combinations(group, 2)]


def _add_order(table: Table, name: str, pairs: Sequence[tuple[Error, Error]]) -> None:
    qnn = [pair for pair in pairs if pair[0].row.runtime in QNN_RUNTIMES]
    wrong = Counter(f"{fast.row.model} {fast.row.runtime}" for fast, slow in pairs if fast.estimate >= slow.estimate)
    right = [sum(fast.estimate < slow.estimate for fast, slow in some) for some in (pairs, qnn)]
    names = ", ".join(f"{times} {which}" for which, times in wrong.items())
    table.add_row(name, str(len(pairs)), str(right[0]), str(len(qnn)), str(right[1]), names)


def unmeasured_table(point: Vector, rows: Sequence[Row]) -> Table:
    """Estimates, on the base SoC, of the architectures that no row measures."""
    widths = ((4, 8), (8, 8), (4, 16), (8, 16))
    table = Table("model", *(f"w{weight}a{activation}" for weight, activation in widths))
    for model in sorted(set(_counts()) - {row.model for row in rows} - {_graph_of(row) for row in rows}):
        times = (latency_ms(amounts(model, *pair, True), rates_of(point, BASE)) for pair in widths)
        table.add_row(model, *(f"{time:.1f} ms" for time in times))
    return table


def write(point: Vector, errors: Sequence[Error]) -> None:
    """The table that the cost model reads."""
    with COST_FILE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "unit", *PARTS.values(), "meaning"))
        writer.writerows(_table_rows(point, errors))


def _table_rows(point: Vector, errors: Sequence[Error]) -> Iterator[tuple[str, ...]]:
    rates = [rates_of(point, part) for part in PARTS.values()]
    for name in (*PRIORS, *FLOAT_OF):
        prior = PRIORS[FLOAT_OF.get(name, name)]
        meaning = f"{PRIORS[FLOAT_OF[name]].meaning}, in half precision" if name in FLOAT_OF else prior.meaning
        yield name, prior.unit, *(f"{rate[name]:.4g}" for rate in rates), meaning
    by_part = [quantiles(error for error in errors if error.row.part == part) for part in PARTS.values()]
    yield "median_error", "1", *(f"{median:.2f}" for median, _ in by_part), "on families left out of the fit"
    yield "p90_error", "1", *(f"{p90:.2f}" for _, p90 in by_part), "the same, of nine measurements in ten"


def main() -> None:
    """Fit, cross-validate, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write {COST_FILE.relative_to(ROOT)}")
    parser.add_argument("--shipped", action="store_true", help="fit nothing: hold the shipped rates against the rows")
    options = parser.parse_args()
    rows = read_measurements(options.measurements)
    console = Console(width=140)
    if options.shipped:
        shipped = [Error(row, latency_ms(_amounts_of(row), known_models()[row.part].rates)) for row in rows]
        console.print(error_table(shipped), order_table(shipped))
        return
    errors, point = cross_validate(rows), fit(rows)
    for table in (error_table(errors), order_table(errors), unmeasured_table(point, rows)):
        console.print(table)
    if options.write:
        write(point, errors)


if __name__ == "__main__":
    main()
