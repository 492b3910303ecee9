"""Which SoC has which HTP: `socs.csv`, and a file of the user's own, looked up by part, marketing name or phone.

The environment variable FRAQAT_SOCS names a CSV file with the same columns. A row of a new part adds it; a row of a
known part adds its devices and overrides what it fills in, cells left empty stay as they are.
"""

from __future__ import annotations

import csv
import difflib
import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from fraqat_compiler.errors import UsageError

OWN_FILE = "FRAQAT_SOCS"
_NUMBERS = ("soc_model", "htp_arch", "vtcm_mb")
_COLUMNS = ("part", "marketing_name", *_NUMBERS, "devices")
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


def known_socs() -> tuple[Soc, ...]:
    """Every SoC of the table, and of the user's file.

    Raises:
        UsageError: the user's file cannot be read, or a row of it is wrong.
    """
    return _socs(os.environ.get(OWN_FILE, ""))


@cache
def _socs(own: str) -> tuple[Soc, ...]:
    text = files("fraqat_compiler.targets.htp").joinpath("socs.csv").read_text(encoding="utf-8")
    rows = {row["part"]: row for row in csv.DictReader(text.splitlines())}
    for row in _own_rows(Path(own)) if own else ():
        part = row["part"].upper()
        rows[part] = _merged(rows.get(part, {}), row | {"part": part})
    return tuple(map(_soc, rows.values()))


def _own_rows(path: Path) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), restval="")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{OWN_FILE}={path} cannot be read: {error}.", "Name a CSV file, or unset it.") from error
    unknown = [name for name in reader.fieldnames or () if name not in (*_COLUMNS, "source")]
    if unknown or "part" not in (reader.fieldnames or ()):
        raise UsageError(
            f"{path.name} (of {OWN_FILE}) has the wrong columns: {', '.join(unknown) or 'no part'}.",
            f"Begin it with a line of these: {','.join(_COLUMNS)}.",
        )
    return list(reader)


def _merged(known: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    devices = " | ".join(filter(None, (known.get("devices"), own.get("devices"))))
    filled = {name: cell for name, cell in own.items() if cell}
    return dict.fromkeys(_COLUMNS, "") | known | filled | {"devices": devices}


def _soc(row: dict[str, str]) -> Soc:
    try:
        soc_model, htp_arch, vtcm_mb = int(row["soc_model"]), int(row["htp_arch"]), float(row["vtcm_mb"])
    except ValueError:
        raise UsageError(
            f"the row of {row['part'] or 'no part'} in the file of {OWN_FILE} lacks numbers.",
            f"A new part needs {', '.join(_NUMBERS)}, as 69, 79 and 8.",
        ) from None
    devices = tuple(device.strip() for device in row["devices"].split("|") if device.strip())
    return Soc(row["part"], row["marketing_name"], soc_model, htp_arch, vtcm_mb, devices)


def find_soc(name: str) -> Soc:
    """The SoC that a part, a marketing name or a device name means; case and `(Android 15)` suffixes do not matter.

    Raises:
        UsageError: no such SoC, naming the nearest ones.
    """
    names = _names(known_socs())
    soc = names.get(_plain(name))
    if soc is not None:
        return soc
    near = difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(_described(item, names[item]) for item in near)}?" if near else ""
    raise UsageError(f"unknown SoC or device {name!r}.", hint or "Use a part such as sm8750 or a phone's full name.")


def _described(name: str, soc: Soc) -> str:
    return soc.part if name == _plain(soc.part) else f"{name} ({soc.part})"


@cache
def _names(socs: tuple[Soc, ...]) -> dict[str, Soc]:
    names: dict[str, Soc] = {}
    for soc in socs:
        for name in (soc.part, soc.marketing_name, *soc.devices):
            names.setdefault(_plain(name), soc)
    names.pop("", None)
    return names


def _plain(name: str) -> str:
    words = name.partition("(")[0].lower().split()
    return " ".join(word for word in words if word not in _LEFT_OUT)
