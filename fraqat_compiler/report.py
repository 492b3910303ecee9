"""The report of a compile: report.json, and report.html made from it.

The dictionary is the one data model: the terminal's tables (`terminal`), the JSON file and the page show the same
figures. The keys of `SCHEMA` are fixed; more may come. It holds measured seconds, so the two files differ between equal
runs, where every other result is the same to the byte. Nothing in it names a host, a user or an absolute path.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

from fraqat_compiler.errors import DataError, VerificationError
from fraqat_compiler.manifest import require_folder

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

Schema = dict[str, Any]
STAGES = ("onnx_unoptimized", "onnx_optimized", "target")  # what is compared with the fake-quantized graph
_PARITY: Schema = dict.fromkeys(("max_lsb", "max_abs", "cosine"))
# The keys that scripts rely on; a list holds the keys of each of its entries, None is any value.
SCHEMA: Schema = {
    "schema_version": None,
    "model": dict.fromkeys(("name", "parameters", "quantized_parameters")),
    "layers": [
        dict.fromkeys(("name", "op", "status", "reason", "weight_bits", "activation_bits", "granularity")),
    ],
    "schedule": [dict.fromkeys(("bits", "steps", "loss"))],
    "metrics": dict.fromkeys(("float", "quantized")),
    "passes": [dict.fromkeys(("name", "seconds", "nodes_before", "nodes_after", "modified"))],
    "onnx": dict.fromkeys(("path", "bytes", "expected_bytes", "opset", "domains")),
    "parity": dict.fromkeys(STAGES, _PARITY),
    "target": dict.fromkeys(("name", "text", "artifact", "bytes", "fallback_nodes", "soc")),
    "profile": dict.fromkeys(("source", "latency_ms", "peak_memory_bytes")),
}


def validate(report: Mapping[str, Any]) -> None:
    """Hold a report against SCHEMA.

    Raises:
        VerificationError: naming the key that is missing.
    """
    _refuse_missing(report, SCHEMA, "the report")


def _refuse_missing(value: Any, schema: Any, place: str) -> None:
    if isinstance(schema, list):
        for index, entry in enumerate(value):
            _refuse_missing(entry, schema[0], f"{place}[{index}]")
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            if key not in value:
                raise VerificationError(f"{place} lacks {key!r}.", "Compile again.")
            _refuse_missing(value[key], inner, key)


def to_json(data: Any) -> str:
    """JSON text of a report or of a part; what is not a finite number is null, as JSON has no other word for it."""
    return json.dumps(_plain(data), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value in JSON's own types: a job's metrics may be NumPy numbers or tensors."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    number = float(value)
    return number if math.isfinite(number) else None


def write_report(report: Mapping[str, Any], folder: Path, images: Mapping[str, Any] | None = None) -> None:
    """Write report.json and report.html into `folder`.

    Args:
        report: as `validate` wants it.
        folder: exists.
        images: sample images by name, uint8 arrays (height, width) or (height, width, 3).

    Raises:
        DataError: an image is no such array.
    """
    validate(report)
    page = render(_plain(report), images or {})
    (folder / REPORT_FILE).write_text(to_json(report) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished compile.

    Raises:
        UsageError: there is no such folder.
        VerificationError: there is no report, or it is damaged.
    """
    require_folder(folder)
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
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "number": format_number}
    return environment.get_template("report.html.jinja").render(
        report=report,
        images={name: _png(name, array) for name, array in images.items()},
        curve=_curve(report["schedule"]),
        share=quantized_share(report),
        excess=excess_bytes(report),
        stages=STAGES,
    )


def quantized_share(report: Mapping[str, Any]) -> float:
    """Share of the parameters that a quantizer holds, 0 to 1."""
    model = report["model"]
    return float(model["quantized_parameters"] / max(model["parameters"], 1))


def excess_bytes(report: Mapping[str, Any]) -> float:
    """By which share the ONNX file exceeds what its bit widths demand; 0.03 is 3 %."""
    onnx = report["onnx"]
    return float(onnx["bytes"] / max(onnx["expected_bytes"], 1) - 1)


def format_bytes(count: float | None) -> str:
    """`1.34 MB`; a dash for None."""
    if count is None:
        return "-"
    if abs(count) < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(abs(count)) // 3), 3)
    return f"{count / 1000**power:.2f} {('B', 'kB', 'MB', 'GB')[power]}"


def format_number(value: float | str | None) -> str:
    """At most five significant digits, whole numbers in full; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _png(name: str, array: Any) -> str:
    """A picture as a data URI."""
    pixels = np.asarray(array)
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise DataError(
            f"samples(run) of the {name} model gave {pixels.dtype}{list(pixels.shape)}, which is no picture.",
            "Return uint8, (height, width) or (height, width, 3).",
        )
    buffer = io.BytesIO()
    imsave(buffer, np.stack([pixels] * 3, axis=-1) if grey else pixels, format="png")
    return _data_uri(buffer.getvalue(), "image/png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Legible on a light and on a dark page; a hash salt keeps the ids in the SVG the same from run to run.
_INK, _BITS, _LOSS = "#868e9c", "#7a6cff", "#e08a3c"
_STYLE: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
) | {
    "svg.hashsalt": "fraqat",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
}


def _curve(schedule: list[dict[str, Any]]) -> str | None:
    """Width and loss over the steps, as an SVG data URI; None without a fine-tune."""
    if not schedule:
        return None
    with rc_context(_STYLE):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        _draw_curve(figure.subplots(), schedule)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _draw_curve(axes: Axes, schedule: list[dict[str, Any]]) -> None:
    ends = np.cumsum([stage["steps"] for stage in schedule])
    axes.stairs([stage["bits"] for stage in schedule], [0, *ends], baseline=None, color=_BITS, linewidth=2)
    axes.set(xlabel="step", ylabel="weight bits", ylim=(0, None))
    axes.yaxis.label.set_color(_BITS)
    losses = axes.twinx()
    losses.plot(ends, [stage["loss"] for stage in schedule], "o-", color=_LOSS, markersize=4)
    losses.set(ylabel="loss at the end of a stage", yscale="log")
    losses.yaxis.label.set_color(_LOSS)
