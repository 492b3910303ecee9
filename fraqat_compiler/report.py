"""The report of a compile: report.json, and report.html made from it.

The dictionary is the one data model: the terminal's tables (`terminal`), the JSON file and the page show the same
figures. Its keys are fixed, see `REQUIRED`; more may come. It holds measured seconds, so it is the one result that
differs between equal runs; nothing in it names a host, a user or an absolute path.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.image import imsave

from fraqat_compiler.errors import VerificationError

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
SCHEMA_VERSION = 1

# Key -> the keys that its value, or each entry of its list, must have.
REQUIRED: dict[str, tuple[str, ...]] = {
    "schema_version": (),
    "model": ("name", "parameters", "quantized_parameters"),
    "layers": ("name", "op", "status", "reason", "weight_bits", "activation_bits", "granularity"),
    "schedule": ("bits", "steps", "loss"),
    "metrics": ("float", "quantized"),
    "passes": ("name", "seconds", "nodes_before", "nodes_after", "modified"),
    "onnx": ("path", "bytes", "expected_bytes", "opset", "domains"),
    "parity": ("onnx_unoptimized", "onnx_optimized", "target"),
    "target": ("name", "text", "artifact", "bytes", "fallback_nodes", "soc"),
    "profile": ("source", "latency_ms", "peak_memory_bytes"),
}


def validate(report: Mapping[str, Any]) -> None:
    """Hold a report against the keys that scripts rely on.

    Raises:
        VerificationError: naming the key that is missing.
    """
    for key, inner in REQUIRED.items():
        if key not in report:
            raise VerificationError(f"the report lacks {key!r}.")
        value = report[key]
        for entry in value if isinstance(value, list) else [value]:
            missing = [name for name in inner if name not in entry]
            if missing:
                raise VerificationError(f"an entry of {key!r} in the report lacks {missing[0]!r}.")


def write_report(report: Mapping[str, Any], folder: Path, images: Mapping[str, Any] | None = None) -> None:
    """Write report.json and report.html into `folder`.

    Args:
        report: as `validate` wants it.
        folder: exists.
        images: sample images by name, uint8 arrays (height, width) or (height, width, 3).
    """
    validate(report)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(render(report, images or {}), encoding="utf-8")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished compile.

    Raises:
        VerificationError: there is none, or it is damaged.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise VerificationError(f"{folder} holds no {REPORT_FILE}.", "Name the -o folder of a finished compile.")
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        validate(report)
    except (ValueError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path} is damaged: {error}.", "Compile again.") from error
    return report


def render(report: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    """The self-contained page: no script, font or picture from elsewhere."""
    environment = Environment(
        loader=PackageLoader("fraqat_compiler", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "number": format_number}
    return environment.get_template("report.html.jinja").render(
        report=report,
        images={name: _png(array) for name, array in images.items()},
        curve=_curve(report["schedule"]),
        share=quantized_share(report),
    )


def quantized_share(report: Mapping[str, Any]) -> float:
    """Share of the parameters that a quantizer holds, 0 to 1."""
    return float(report["model"]["quantized_parameters"]) / max(report["model"]["parameters"], 1)


def format_bytes(count: float | None) -> str:
    """`1.34 MB`; a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def format_number(value: float | str | None) -> str:
    """At most five significant digits; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _png(array: Any) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    pixels = np.asarray(array, dtype=np.uint8)
    imsave(buffer, pixels, format="png", cmap="gray" if pixels.ndim == 2 else None, vmin=0, vmax=255)
    return _data_uri(buffer.getvalue(), "image/png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _curve(schedule: list[dict[str, Any]]) -> str | None:
    """Loss and width over the steps, as an SVG data URI; None without a fine-tune."""
    if not schedule:
        return None
    ends = np.cumsum([stage["steps"] for stage in schedule])
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.stairs([stage["bits"] for stage in schedule], [0, *ends], baseline=None, color="#7a5cff", linewidth=2)
    axes.set(xlabel="step", ylabel="weight bits", ylim=(0, None))
    axes.yaxis.label.set_color("#7a5cff")
    losses = axes.twinx()
    losses.plot(ends, [stage["loss"] for stage in schedule], "o-", color="#d9822b", markersize=4)
    losses.set(ylabel="loss at the stage's end", yscale="log")
    losses.yaxis.label.set_color("#d9822b")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=False, metadata={"Date": None})
    return _data_uri(buffer.getvalue(), "image/svg+xml")
