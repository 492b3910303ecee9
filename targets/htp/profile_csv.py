"""The library's profile file, read into operations."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTES = (
    "Cycles are those of the x86 emulator's model of the HTP: compare ops of one graph by them, not time on a phone.",
)


def read_profile(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Cycles of each op, the costliest first: {"name", "cycles"}."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["Message"] == "NODE"]
    cycles: dict[str, int] = {}
    for row in rows:
        if row["Unit of Measurement"] == "CYCLES":
            name = row["Event Identifier"].removesuffix(" (cycles)").partition(":OpId")[0]
            cycles[name] = cycles.get(name, 0) + int(row["Time"])
    return tuple({"name": name, "cycles": count} for name, count in sorted(cycles.items(), key=lambda item: -item[1]))
