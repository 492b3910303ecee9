"""What a context binary says of itself: the compiler leaves its resolved options in it as text."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from fraqat_compiler.errors import TargetError

_SOC = re.compile(rb"soc_type=([A-Za-z0-9_-]+);arch=(\d+)")
_VTCM = re.compile(rb"vtcm_size=(\d+)")
_VERSION = re.compile(rb"v(\d+\.\d+\.\d+)\.\d{6,}")


@dataclass(frozen=True)
class BinaryFacts:
    """Read from the binary, not from what was asked for.

    Attributes:
        soc: part, such as SM8750.
        htp_arch: 79 for v79.
        vtcm_bytes: memory that the graph was planned for; None when not stated.
        qairt_version: of the compiler, such as 2.51.0; empty when not stated.
    """

    soc: str
    htp_arch: int
    vtcm_bytes: int | None
    qairt_version: str


def read_binary(path: Path) -> BinaryFacts:
    """Facts of a context binary.

    Raises:
        TargetError: the file is missing, or is not an HTP context binary.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            soc, vtcm, version = (_groups(pattern, content) for pattern in (_SOC, _VTCM, _VERSION))
    except (OSError, ValueError) as error:
        raise TargetError(f"{path.name} cannot be read: {error}.", "Compile again.") from error
    if soc is None:
        raise TargetError(f"{path.name} is no HTP context binary, or is damaged.", "Compile again.")
    return BinaryFacts(
        soc=soc[0],
        htp_arch=int(soc[1]),
        vtcm_bytes=int(vtcm[0]) if vtcm else None,
        qairt_version=version[0] if version else "",
    )


def _groups(pattern: re.Pattern[bytes], content: mmap.mmap) -> tuple[str, ...] | None:
    """Text of the groups of the first match; read while the file is mapped."""
    match = pattern.search(content)
    return tuple(group.decode() for group in match.groups()) if match else None
