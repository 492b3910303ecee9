"""What the command line shows: rich tables made from the report's dictionary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fraqat_compiler.report import PAGE_FILE, format_bytes, format_number, quantized_share


def show_report(console: Console, report: Mapping[str, Any], folder: Path) -> None:
    """The figures of a compile, and where the rest lies."""
    console.print(_figures(report))
    console.print(_parity(report["parity"]))
    if report["metrics"]["quantized"]:
        console.print(_metrics(report["metrics"]))
    for line in report.get("warnings", []):
        console.print(f"[yellow]warning[/] {line}", highlight=False)
    console.print(f"report: {folder / PAGE_FILE}", highlight=False, soft_wrap=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table whose first column is a name and whose others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, str) else format_number(cell) for cell in row))
    return made


def _figures(report: Mapping[str, Any]) -> Table:
    model, onnx, target = report["model"], report["onnx"], report["target"]
    counts = {status: sum(layer["status"] == status for layer in report["layers"]) for status in ("quantized", "float")}
    rows = [
        ("parameters", f"{model['parameters']:,} ({100 * quantized_share(report):.1f} % quantized)"),
        ("layers", f"{counts['quantized']} quantized, {counts['float']} float"),
        ("onnx", f"{format_bytes(onnx['bytes'])} (bit widths demand {format_bytes(onnx['expected_bytes'])})"),
        ("target", str(target["text"])),
        ("artifact", f"{target['artifact']}, {format_bytes(target['bytes'])}"),
        ("nodes on the CPU", format_number(target["fallback_nodes"])),
    ]
    return table(f"{model['name']}", ("", "figure"), rows)


def _parity(parity: Mapping[str, Any]) -> Table:
    rows = [
        (name.replace("_", " "), row["max_lsb"], row.get("mean_lsb"), f"{row['cosine']:.6f}", row.get("slope"))
        for name, row in parity.items()
    ]
    return table("parity with the trained graph", ("stage", "max LSB", "mean LSB", "cosine", "slope"), rows)


def _metrics(metrics: Mapping[str, Any]) -> Table:
    rows = [(name, metrics["float"].get(name), value) for name, value in metrics["quantized"].items()]
    return table("metrics", ("metric", "float", "quantized"), rows)


def show_layers(console: Console, report: Mapping[str, Any]) -> None:
    """Every layer with its status."""
    columns = ("layer", "op", "status", "weights", "activations", "granularity", "reason")
    rows = [
        (
            layer["name"],
            layer["op"],
            layer["status"],
            layer["weight_bits"],
            layer["activation_bits"],
            layer["granularity"] or "",
            layer["reason"],
        )
        for layer in report["layers"]
    ]
    console.print(table("layers", columns, rows))


def show_passes(console: Console, passes: Iterable[Mapping[str, Any]]) -> None:
    """Time and effect of each pass."""
    rows = [
        (row["name"], f"{1000 * row['seconds']:.1f}", row["nodes_before"], row["nodes_after"], str(row["modified"]))
        for row in passes
    ]
    console.print(table("passes", ("pass", "ms", "nodes before", "after", "modified"), rows))
