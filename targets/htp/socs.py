"""Which SoC has which HTP: `socs.csv`, looked up by part, marketing name or phone."""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fraqat_compiler.errors import UsageError

_LEFT_OUT = frozenset({"snapdragon", "qualcomm", "samsung", "mobile"})  # words that people put or leave out


@dataclass(frozen=True)
class Soc:
    """One row of socs.csv.

    Attributes:
        part: SM8750.
        marketing_name: Snapdragon 8 Elite; empty where there is none.
        soc_model: the number that QNN calls the SoC by.
        htp_arch: 79 for v79.
        vtcm_mb: tightly coupled memory of the HTP, in MiB.
        devices: phones and boards that have it.
    """

    part: str
    marketing_name: str
    soc_model: int
    htp_arch: int
    vtcm_mb: float
    devices: tuple[str, ...]


@cache
def known_socs() -> tuple[Soc, ...]:
    """Every SoC of the table."""
    text = files("fraqat_compiler.targets.htp").joinpath("socs.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(map(_soc, rows))


def _soc(row: dict[str, str]) -> Soc:
    return Soc(
        part=row["part"],
        marketing_name=row["marketing_name"],
        soc_model=int(row["soc_model"]),
        htp_arch=int(row["htp_arch"]),
        vtcm_mb=float(row["vtcm_mb"]),
        devices=tuple(device.strip() for device in row["devices"].split("|") if device.strip()),
    )


def find_soc(name: str) -> Soc:
    """The SoC that a part, a marketing name or a device name means; case and `(Android 15)` suffixes do not matter.

    Raises:
        UsageError: no such SoC, naming the nearest ones.
    """
    names = _names()
    soc = names.get(_plain(name))
    if soc is not None:
        return soc
    near = difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(_described(item, names[item]) for item in near)}?" if near else ""
    raise UsageError(f"unknown SoC or device {name!r}.", hint or "Use a part such as sm8750 or a phone's full name.")


def _described(name: str, soc: Soc) -> str:
    return soc.part if name == _plain(soc.part) else f"{name} ({soc.part})"


@cache
def _names() -> dict[str, Soc]:
    names: dict[str, Soc] = {}
    for soc in known_socs():
        for name in (soc.part, soc.marketing_name, *soc.devices):
            names.setdefault(_plain(name), soc)
    names.pop("", None)
    return names


def _plain(name: str) -> str:
    words = name.partition("(")[0].lower().split()
    return " ".join(word for word in words if word not in _LEFT_OUT)
