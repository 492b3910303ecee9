"""What the library said of each op, width, granularity and rank, alone: `ops_vNN.csv`, from tools/probe_htp_ops.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from csv import reader
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

DISTRIBUTION = "onnxruntime-qnn"
COLUMNS = (
    "op variant rank weight_bits activation_bits granularity verdict max_lsb slope reason".split()
)  # of the file, in its order
Key = tuple[str, str, int, int | None, int, str]
_HEADER = re.compile(r"# onnxruntime-qnn (\S+), QAIRT (\S*), HTP v(\d+)")


@dataclass(frozen=True)
class OpRow:
    """One op at one rank and one pair of widths.

    Attributes:
        op: ONNX type.
        variant: what sets the probe apart from the plain op, such as attributes; empty for that.
        rank: of its first input.
        weight_bits: None without a weight.
        activation_bits: of all inputs and outputs.
        granularity: of the weight's scales: per_tensor, per_channel, per_block; empty without a weight.
        verdict: runs, refused, wrong, or unknown where onnxruntime has no reference for it.
        max_lsb: greatest distance from onnxruntime in steps of the output's quantizer; None if it did not run.
        slope: least-squares factor from onnxruntime's result to the library's; None likewise.
        reason: why it was refused.
    """

    op: str
    variant: str
    rank: int
    weight_bits: int | None
    activation_bits: int
    granularity: str
    verdict: str
    max_lsb: float | None
    slope: float | None
    reason: str

    @property
    def key(self) -> Key:
        """What no other row has."""
        return self.op, self.variant, self.rank, self.weight_bits, self.activation_bits, self.granularity

    def cells(self) -> list[str]:
        """As the file has it."""
        values = (getattr(self, column) for column in COLUMNS)
        return ["" if value is None else str(value) for value in values]

    @classmethod
    def from_cells(cls, cells: list[str]) -> OpRow:
        """The row that `cells` wrote."""
        texts: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
        for column in ("rank", "weight_bits", "activation_bits"):
            texts[column] = int(texts[column]) if texts[column] else None
        for column in ("max_lsb", "slope"):
            texts[column] = float(texts[column]) if texts[column] else None
        return cls(**texts)


@dataclass(frozen=True)
class OpTable:
    """The rows of one architecture.

    Attributes:
        package_version: of onnxruntime-qnn that was asked.
        qairt_version: of the library in it.
        htp_arch: 79 for v79.
        rows: by key.
    """

    package_version: str
    qairt_version: str
    htp_arch: int
    rows: Mapping[Key, OpRow]


def header(package_version: str, qairt_version: str, htp_arch: int) -> str:
    """The file's first line."""
    return f"# onnxruntime-qnn {package_version}, QAIRT {qairt_version}, HTP v{htp_arch}"


@cache
def load_table(htp_arch: int) -> OpTable | None:
    """The table of an architecture; None for one that was not probed."""
    path = files(__package__) / f"ops_v{htp_arch}.csv"
    if not path.is_file():
        return None
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    match = _HEADER.match(first)
    assert match is not None
    return OpTable(match[1], match[2], int(match[3]), _by_key(OpRow.from_cells(cells) for cells in reader(lines[1:])))


def _by_key(rows: Iterable[OpRow]) -> dict[Key, OpRow]:
    return {row.key: row for row in rows}


# What a refusal or an accepted node can be told from it


def nearest_that_runs(table: OpTable, key: Key) -> str:
    """How the same op, in the same variant, would run, in words; empty where the table knows no way."""
    runs = [row for row in table.rows.values() if row.key[:2] == key[:2] and row.verdict == "runs"]
    if not runs:
        return ""
    best = min(runs, key=lambda row: _differences(row.key, key))
    return ", ".join(_words(best, key, runs))


def _differences(row: Key, asked: Key) -> tuple[int, int]:
    """Fields that differ, and how far the ranks lie apart."""
    return sum(first != second for first, second in zip(row, asked, strict=True)), abs(row[2] - asked[2])


def _words(best: OpRow, asked: Key, runs: list[OpRow]) -> Iterable[str]:
    _, _, rank, weight_bits, activation_bits, granularity = asked
    if best.rank != rank:
        alike = [row.rank for row in runs if (*row.key[:2], *row.key[3:]) == (*best.key[:2], *best.key[3:])]
        yield f"at rank <= {max(alike)}" if max(alike) < rank else f"at rank {best.rank}"
    if best.weight_bits not in (weight_bits, None):
        yield f"with {best.weight_bits}-bit weights"
    if best.activation_bits != activation_bits:
        yield f"at {best.activation_bits}-bit activations"
    if best.granularity not in (granularity, ""):
        yield f"with scales {best.granularity.replace('_', ' ')}"


def has_weights(table: OpTable, op: str) -> bool:
    """Whether the op was probed with a weight; in the others a constant operand counts as an activation."""
    return any(row.op == op and row.weight_bits is not None for row in table.rows.values())
