from __future__ import annotations

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fraqat_compiler import terminal
from fraqat_compiler.errors import DataError, VerificationError
from fraqat_compiler.report import (
    PAGE_FILE,
    REPORT_FILE,
    excess_bytes,
    format_bytes,
    format_number,
    quantized_share,
    read_report,
    render,
    to_json,
    validate,
    write_report,
)

PARITY = {"max_lsb": 0.5, "mean_lsb": 0.01, "max_abs": 0.002, "cosine": 0.99999, "slope": 1.0, "samples": 4}
ARM = {"mean_bits": 4.9, "bytes": 1000, "predicted_loss": 0.01, "measured_loss": 0.02}
ASSIGNED = [
    {"name": "blocks.0.up", "parameters": 1200, "losses": {"4": 0.01, "8": 1e-5}, "share": 0.2, "bits": 4.0}
    | {"reason": "lowest: 20 % of the loss"},
    {"name": "head<1>", "parameters": 300, "losses": {"4": 0.04, "8": 4e-5}, "share": 0.8, "bits": 8.0}
    | {"reason": "raised: 80 % of the loss"},
]
VOID = {"meta", "img", "input", "br", "link", "hr"}


def layer(name: str, **changes: Any) -> dict[str, Any]:
    base = {"name": name, "op": "linear", "status": "quantized", "reason": "", "weight_bits": 4.0}
    return base | {"activation_bits": 8.0, "granularity": "per-channel", "expected": True} | changes


@pytest.fixture
def report() -> dict[str, Any]:
    """A report with everything in it that a page can show."""
    return {
        "schema_version": 1,
        "model": {"name": "tiny", "parameters": 2000, "quantized_parameters": 1500},
        "layers": [layer("blocks.0.up"), layer("head", status="float", reason="left out by <skip>", weight_bits=None)],
        "assignment": {"measure": "mse", "budget": "mean-bits=5", "weights": "4,head=8", "layers": ASSIGNED}
        | {"uniform": [ARM | {"bits": 4, "mean_bits": 4.0}, ARM | {"bits": 8, "mean_bits": 8.0}]}
        | ARM,
        "compensation": [
            {"weight": "blocks.0.up.weight", "nearest_error": 0.25, "error": 0.05, "damp": 0.01, "reason": ""},
            {"weight": "head.weight", "nearest_error": 0.0, "error": 0.0, "damp": None, "reason": "<shared>"},
        ],
        "schedule": [{"bits": 8, "steps": 10, "loss": 0.1}, {"bits": 4.25, "steps": 30, "loss": 0.0}],
        "metrics": {"float": {"accuracy": 0.98}, "quantized": {"accuracy": 0.97, "new": 1}},
        "passes": [
            {"name": "pack-int4", "seconds": 0.01, "nodes_before": 9, "nodes_after": 9, "modified": True}
            | {"changes": ["packed head.weight"] * 201},
            {"name": "clip-masks", "seconds": 0.0, "nodes_before": 9, "nodes_after": 9, "modified": False},
        ],
        "phases": [{"name": "capture", "seconds": 2.0, "peak_memory_bytes": 5e8}],
        "onnx": {"path": "model.onnx", "bytes": 1030, "expected_bytes": 1000, "opset": 21, "domains": ["ai.onnx"]},
        "parity": {"onnx_unoptimized": PARITY, "onnx_optimized": PARITY, "target": PARITY | {"max_lsb": None}},
        "optimizers": [{"name": "onnxslim", "outcome": "breaks", "max_lsb": None, "reason": "a node is gone"}],
        "target": {"name": "htp", "text": "htp{soc=sm8750}", "artifact": "b.bin", "bytes": 5, "fallback_nodes": 0}
        | {"soc": "SM8750"},
        "profile": {"source": "simulator", "latency_ms": None, "peak_memory_bytes": None, "unit": "cycles"}
        | {"ops": [{"name": "head/Gemm", "cycles": 12345}, {"name": "odd"}], "notes": ["not a phone's time"]},
        "warnings": ["look <here>"],
        "pipeline": "export-onnx,pack-int4",
    }


OPTIONAL = ("phases", "warnings", "pipeline", "assignment", "compensation")


def minimal(report: dict[str, Any]) -> dict[str, Any]:
    """The required keys alone, as another program may write them."""
    short = {key: value for key, value in report.items() if key not in OPTIONAL}
    short["profile"] = {"source": "host", "latency_ms": 1.5, "peak_memory_bytes": 1000}
    short["schedule"], short["metrics"] = [], {"float": {}, "quantized": {}}
    short["parity"] = {stage: dict.fromkeys(("max_lsb", "max_abs", "cosine"), 0.0) for stage in report["parity"]}
    return short


class Page(HTMLParser):
    """What a page holds; closing a tag that is not open is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_is_written_is_read_again(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert {path.name for path in tmp_path.iterdir()} == {REPORT_FILE, PAGE_FILE}


@pytest.mark.parametrize(
    ("place", "key"),
    [((), "parity"), (("model",), "parameters"), (("layers", 1), "reason"), (("parity", "target"), "cosine")],
)
def test_a_missing_key_is_named(report: dict[str, Any], place: tuple[Any, ...], key: str) -> None:
    broken = copy.deepcopy(report)
    holder = broken
    for step in place:
        holder = holder[step]
    del holder[key]
    with pytest.raises(VerificationError, match=rf"lacks '{key}'"):
        validate(broken)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1}', '{"schema_version": 1, "model": 3}'])
def test_a_damaged_report_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_FILE).write_text(text)
    with pytest.raises(VerificationError):
        read_report(tmp_path)


def test_a_folder_without_a_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="holds no report"):
        read_report(tmp_path)


def test_json_takes_the_numbers_of_other_libraries_and_is_strict() -> None:
    text = to_json({"a": np.float32(0.5), "b": np.int64(3), "c": [float("nan"), float("inf")], "d": (True, None, "x")})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": 0.5, "b": 3, "c": [None, None], "d": [True, None, "x"]}


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(report: dict[str, Any]) -> None:
    text = render(report, {"float": np.zeros((8, 8), np.uint8), "compiled": np.zeros((8, 8, 3), np.uint8)})
    page = Page(text)
    assert page.open == []
    assert len(page.links) == 3
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?://", re.sub(r"data:[^\"]*", "", text))


def test_the_page_shows_every_figure(report: dict[str, Any]) -> None:
    text = Page(render(report, {})).text
    shown = [
        "blocks.0.up",
        "left out by <skip>",
        "look <here>",
        "breaks: a node is gone",
        "1.03 kB",
        "+3.0",
        "75.0 %",
        "htp{soc=sm8750}",
        "12,345",
    ]
    shown += ["not known to a simulator", "not a phone's time", "0.98", "and 1 more in report.json", "500.00 MB"]
    assert [figure for figure in shown if figure not in text] == []


def test_the_page_shows_why_each_layer_has_its_width_the_weightiest_first(report: dict[str, Any]) -> None:
    text = Page(render(report, {})).text
    texts = ["within mean-bits=5: 4.900 bits a weight, 1.00 kB", "all at 4", "assigned", "all at 8", "head<1>", "4e-05"]
    places = [text.find(words) for words in (*texts, "raised: 80 %", "blocks.0.up", "lowest: 20 % of the loss")]
    assert -1 not in places and places == sorted(places)


def test_the_page_shows_what_compensated_rounding_bought(report: dict[str, Any]) -> None:
    page = Page(render(report, {}))
    assert "blocks.0.up.weight0.250.0520 %" in page.text  # cells without what lies between them
    assert "head.weight00<shared>" in page.text


def test_the_page_of_a_minimal_report(report: dict[str, Any]) -> None:
    page = Page(render(minimal(report), {}))
    assert page.open == []
    assert "Fine-tune" not in page.text
    assert "1.500 ms" in page.text


def test_the_page_is_the_same_for_the_same_report(report: dict[str, Any]) -> None:
    assert render(report, {}) == render(report, {})


def test_images_keep_their_pixels(report: dict[str, Any]) -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    (link,) = [link for link in Page(render(report, {"float": picture})).links if link.startswith("data:image/png")]
    pixels = imread(io.BytesIO(base64.b64decode(link.partition(",")[2])))
    np.testing.assert_array_equal(np.round(pixels[..., 0] * 255), picture)


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros(4, np.uint8), np.zeros((4, 4, 2), np.uint8), "picture"])
def test_what_is_no_picture_is_told(report: dict[str, Any], array: Any) -> None:
    with pytest.raises(DataError, match="samples"):
        render(report, {"float": array})


def test_shares(report: dict[str, Any]) -> None:
    assert quantized_share(report) == 0.75
    assert excess_bytes(report) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_340_000, "1.34 MB"), (2e12, "2000.00 GB")],
)
def test_format_bytes(count: float | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (8.0, "8"), (4.25, "4.25"), (1234567, "1,234,567"), (1e-7, "1e-07"), ("x", "x")]
)
def test_format_number(value: float | str | None, text: str) -> None:
    assert format_number(value) == text


def shown(show: Any, *arguments: Any) -> str:
    console = Console(width=120, file=io.StringIO())
    show(console, *arguments)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_shows_the_figures_and_where_the_report_lies(report: dict[str, Any]) -> None:
    text = shown(terminal.show_report, report, Path("out/tiny"))
    figures = ["75.0 %", "1 quantized, 1 float", "1.03 kB", "+3.0 %", "htp{soc=sm8750}", "0.999990", "0.98", "<here>"]
    assert [figure for figure in [*figures, "out/tiny/report.html"] if figure not in text] == []


def test_brackets_in_a_users_names_are_no_markup(report: dict[str, Any]) -> None:
    report["model"]["name"], report["warnings"] = "[bold]x[/bold]", ["a[red]b"]
    text = shown(terminal.show_report, minimal(report) | {"warnings": report["warnings"]}, Path("out"))
    assert "[bold]x[/bold]" in text
    assert "a[red]b" in text


def test_tables_of_layers_and_passes(report: dict[str, Any]) -> None:
    text = shown(lambda console: console.print(terminal.layer_table(report["layers"])))
    assert re.search(r"head +linear +float +per-channel +left out by <skip> +- +8", text)
    text = shown(lambda console: console.print(terminal.pass_table(report["passes"])))
    assert re.search(r"pack-int4 +yes +10\.0 +9 +9", text)


def test_profile_ops_show_words_before_figures(report: dict[str, Any]) -> None:
    report["profile"]["ops"] = [{"cycles": 7, "name": "head/Gemm"}, {"name": "tail/Gemm", "cycles": 5}]
    assert re.search(r"head/Gemm +7\n", re.sub(r" +\n", "\n", shown(terminal.show_profile, report["profile"])))
    assert "tail" not in shown(terminal.show_profile, report["profile"], 1)
