"""What works here and what does not: Python, packages, machine, passes and targets, each with its remedy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import onnx
from onnx import parser

from fraqat_compiler.registry import available, parse_target

DISTRIBUTION = "fraqat_compiler"
LOW_DISK_BYTES = 2_000_000_000
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)[^;]*(?:;.*extra == ['\"](\w+)['\"])?")
# The least that a target should take: one op between Q and DQ.
SMALL_MODEL = """
<ir_version: 10, opset_import: ["": 21]>
small (float[1, 16] x) => (float[1, 16] y)
<float scale = {0.05}, uint8 zero_point = {128}>
{
    x_q = QuantizeLinear (x, scale, zero_point)
    x_dq = DequantizeLinear (x_q, scale, zero_point)
    r = Relu (x_dq)
    r_q = QuantizeLinear (r, scale, zero_point)
    y = DequantizeLinear (r_q, scale, zero_point)
}
"""


@dataclass(frozen=True)
class Diagnosis:
    """The state of one thing.

    Attributes:
        area: python, machine, package, pass or target.
        name: what.
        status: `missing` is an option that is not installed, `broken` is what should work and does not.
        detail: version or figures, or what is wrong.
        remedy: what to do; empty where there is nothing to do.
    """

    area: str
    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""


def diagnose() -> list[Diagnosis]:
    """Every diagnosis; a probe that fails in an unforeseen way is a diagnosis too."""
    probes: dict[str, Callable[[], Iterator[Diagnosis]]] = {
        "machine": _machine,
        "package": _packages,
        "torch": _torch,
        "pass": _passes,
        "target": _targets,
    }
    return [diagnosis for area, probe in probes.items() for diagnosis in _survived(area, probe)]


def _survived(area: str, probe: Callable[[], Iterator[Diagnosis]]) -> list[Diagnosis]:
    found: list[Diagnosis] = []
    try:
        found.extend(probe())
    except Exception as error:  # a doctor that falls ill helps nobody
        found.append(Diagnosis(area, "probe", "broken", f"{type(error).__name__}: {error}"))
    return found


def _machine() -> Iterator[Diagnosis]:
    yield Diagnosis("machine", "python", "ok", platform.python_version())
    libc = " ".join(platform.libc_ver())
    yield Diagnosis("machine", "system", "ok", f"{platform.system()} {platform.machine()} {libc}".strip())
    yield Diagnosis("machine", "cpu", "ok", f"{os.cpu_count()} cores")
    free = shutil.disk_usage(Path.cwd()).free
    low = free < LOW_DISK_BYTES
    remedy = "Free some: a compile keeps checkpoints of three times the weights." if low else ""
    yield Diagnosis("machine", "disk", "broken" if low else "ok", f"{free / 1e9:.1f} GB free here", remedy)


def _packages() -> Iterator[Diagnosis]:
    try:
        yield Diagnosis("package", DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        yield Diagnosis(
            "package", DISTRIBUTION, "broken", "not installed, imported from its sources", "pip install -e ."
        )
        return
    for requirement in metadata.requires(DISTRIBUTION) or ():
        match = _REQUIREMENT.match(requirement)
        if match is not None and match.group(2) != "dev":
            yield _package(match.group(1), match.group(2))


def _package(name: str, extra: str | None) -> Diagnosis:
    try:
        return Diagnosis("package", name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        wanted = f"{DISTRIBUTION}[{extra}]" if extra else name
        status: Literal["missing", "broken"] = "missing" if extra else "broken"
        return Diagnosis("package", name, status, "not installed", f'pip install "{wanted}"')


def _torch() -> Iterator[Diagnosis]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield Diagnosis("machine", "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {device}")


def _passes() -> Iterator[Diagnosis]:
    rows = available("passes")
    usable = [row for row in rows if row.error is None]
    yield Diagnosis("pass", "all", "ok", f"{len(usable)} usable")
    for row in rows:
        if row.error is not None:
            yield Diagnosis("pass", row.name, "broken", row.error)


def _targets() -> Iterator[Diagnosis]:
    for row in available("targets"):
        if row.error is not None:
            yield Diagnosis("target", row.name, "broken", row.error)
        else:
            yield _target(row.name)


def _target(name: str) -> Diagnosis:
    """Whether the target can run here, proven on a small graph."""
    try:
        target = parse_target(name)
        missing = target.missing()
        if missing:
            return Diagnosis("target", name, "missing", missing)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.onnx"
            onnx.save(parser.parse_model(SMALL_MODEL), path)
            findings = target.check(path)
    except Exception as error:  # a third party's target may fail in any way
        return Diagnosis("target", name, "broken", f"{type(error).__name__}: {error}")
    refused = next((finding for finding in findings if finding.verdict != "runs"), None)
    if refused is not None:
        return Diagnosis("target", name, "broken", f"refuses a Relu: {refused.reason}", refused.remedy)
    notes = [finding for finding in findings if finding.reason]
    said = "; ".join(["takes a small graph", *(note.reason for note in notes)])
    return Diagnosis("target", name, "ok", said, " ".join(note.remedy for note in notes))
