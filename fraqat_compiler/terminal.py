"""What the command line shows: tables made from the same dictionaries that `--json` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fraqat_compiler.output_folder import SIMULATION_FILE
from fraqat_compiler.report import PAGE_FILE, STAGES, excess_bytes, format_bytes, format_number, quantized_share

Rows = Iterable[Mapping[str, Any]]
SHOWN_OPS = 20
SHOWN_LAYERS = 10


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> Table:
    """A table whose first `texts` columns are words and whose others are figures."""
    made = Table(title=Text(title, "bold"), title_justify="left", header_style="dim", box=box.SIMPLE_HEAD)
    made.show_header = any(columns)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < texts else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(_words(cell)) for cell in row))
    return made


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else format_number(value)


def lines(rows: Iterable[str]) -> RenderableType:
    """Plain text, a line each; brackets in it are not markup."""
    return Group(*(Text(row) for row in rows))


def show_report(console: Console, report: Mapping[str, Any], folder: Path) -> None:
    """The figures of a compile, and where the rest lies."""
    console.print(_figures(report))
    console.print(_parity(report["parity"]))
    if report.get("assignment"):
        show_assignment(console, report["assignment"])
    if report.get("compensation"):
        console.print(_compensation(report["compensation"]))
    if report["metrics"]["quantized"]:
        console.print(_metrics(report["metrics"]))
    for line in report.get("warnings", []):
        console.print(Text.assemble(("warning: ", "yellow"), line))
    console.print(Text(f"report: {folder / PAGE_FILE}"), soft_wrap=True)


def show_simulation(console: Console, report: Mapping[str, Any], folder: Path) -> None:
    """The figures of a simulation."""
    rows = [
        ("parameters", f"{report['model']['parameters']:,}, {100 * quantized_share(report):.1f} % of them quantized"),
        ("layers", _layer_counts(report["layers"])),
        *([("last loss", format_number(report["schedule"][-1]["loss"]))] if report["schedule"] else []),
    ]
    console.print(table(str(report["model"]["name"]), ("", ""), rows, texts=2))
    if report.get("assignment"):
        show_assignment(console, report["assignment"])
    if report.get("compensation"):
        console.print(_compensation(report["compensation"]))
    if report["metrics"]["quantized"]:
        console.print(_metrics(report["metrics"]))
    for line in report["warnings"]:
        console.print(Text.assemble(("warning: ", "yellow"), line))
    console.print(Text(f"simulation: {folder / SIMULATION_FILE}"), soft_wrap=True)


def show_assignment(console: Console, assignment: Mapping[str, Any], shown: int = SHOWN_LAYERS) -> None:
    """The widths that the sensitivities gave: held against uniform ones, and the layers that matter most with why."""
    arms = [(f"all at {arm['bits']:g}", arm) for arm in assignment["uniform"]] + [("assigned", assignment)]
    rows = [
        (name, f"{arm['mean_bits']:.2f}", format_bytes(arm["bytes"]), arm["predicted_loss"], arm["measured_loss"])
        for name, arm in sorted(arms, key=lambda arm: arm[1]["mean_bits"])
    ]
    title = f"weight widths for {assignment['budget']}; {assignment['measure']} of the weights alone"
    console.print(table(title, ("", "mean bits", "tensors", "predicted", "measured"), rows))
    layers = sorted(assignment["layers"], key=lambda layer: -layer["share"])
    asked = list(layers[0]["losses"])
    columns = ("layer", "why", "bits", *(f"loss at {width}" for width in asked))
    figures = ([layer["name"], layer["reason"], layer["bits"], *layer["losses"].values()] for layer in layers[:shown])
    console.print(table(f"the {min(shown, len(layers))} of {len(layers)} layers that matter most", columns, figures, 2))


def _compensation(weights: Sequence[Mapping[str, Any]], shown: int = SHOWN_LAYERS) -> Table:
    """What compensated rounding bought, where rounding to nearest cost most."""
    worst = sorted(weights, key=lambda weight: -weight["nearest_error"])[:shown]
    rows = [(weight["weight"], weight["reason"], weight["nearest_error"], weight["error"]) for weight in worst]
    title = f"error of a layer's results; the {len(rows)} of {len(weights)} weights where rounding costs most"
    return table(title, ("weight", "why not", "to nearest", "compensated"), rows, texts=2)


def _figures(report: Mapping[str, Any]) -> Table:
    model, onnx, target = report["model"], report["onnx"], report["target"]
    demanded = f"{format_bytes(onnx['expected_bytes'])}, {100 * excess_bytes(report):+.1f} %"
    rows = [
        ("parameters", f"{model['parameters']:,}, {100 * quantized_share(report):.1f} % of them quantized"),
        ("layers", _layer_counts(report["layers"])),
        (onnx["path"], f"{format_bytes(onnx['bytes'])} (its bit widths demand {demanded})"),
        ("target", str(target["text"])),
        (target["artifact"], format_bytes(target["bytes"])),
        ("nodes on the CPU", format_number(target["fallback_nodes"])),
        ("latency", _latency(report["profile"])),
        *([("estimate", _latency(report["estimate"]))] if report.get("estimate") else []),
    ]
    return table(str(model["name"]), ("", ""), rows, texts=2)


def _layer_counts(layers: Rows) -> str:
    statuses = [layer["status"] for layer in layers]
    return f"{statuses.count('quantized')} quantized, {statuses.count('float')} float"


def _latency(profile: Mapping[str, Any]) -> str:
    if profile["latency_ms"] is None:
        return f"not known to a {profile['source']}"
    if profile["source"] == "estimate":
        return f"{profile['latency_ms']:.3f} ms, estimated"
    return f"{profile['latency_ms']:.3f} ms, measured by: {profile['source']}"


def _parity(parity: Mapping[str, Any]) -> Table:
    stages = [(name, parity[name]) for name in STAGES]
    rows = [
        (name.replace("_", " "), row["max_lsb"], row.get("mean_lsb"), f"{row['cosine']:.6f}", row.get("slope"))
        for name, row in stages
    ]
    rows += [(label, row["max_lsb"], row["mean_lsb"], "", "") for label, row in _parity_in_context(parity)]
    return table("parity with the trained graph", ("stage", "max LSB", "mean LSB", "cosine", "slope"), rows)


def _parity_in_context(parity: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What the distances at the end are to be held against."""
    alone, floor = parity.get("layerwise"), parity.get("noise_floor")
    worst = f", worst {alone['node']}" if alone and alone["max_lsb"] else ""
    rows = [(f"each op alone{worst}", alone)] if alone and alone["node"] else []
    return rows + ([("rounding of float32 alone", floor)] if floor else [])


def _metrics(metrics: Mapping[str, Any]) -> Table:
    rows = [(name, metrics["float"].get(name), value) for name, value in metrics["quantized"].items()]
    return table("metrics", ("metric", "float", "quantized"), rows)


def layer_table(layers: Rows) -> Table:
    """Every layer with its status."""
    columns = ("layer", "op", "status", "granularity", "reason", "weights", "activations")
    keys = ("name", "op", "status", "granularity", "reason", "weight_bits", "activation_bits")
    return table("layers", columns, ([layer[key] for key in keys] for layer in layers), texts=5)


def pass_table(passes: Rows) -> Table:
    """Time and effect of each pass."""
    rows = [
        (row["name"], row["modified"], f"{1000 * row['seconds']:.1f}", row["nodes_before"], row["nodes_after"])
        for row in passes
    ]
    return table("passes", ("pass", "modified", "ms", "nodes before", "after"), rows, texts=2)


def show_graph(console: Console, facts: Mapping[str, Any]) -> None:
    """What `inspection` found in a graph or a model."""
    if facts["kind"] == "module":
        columns = ("module", "class", "parameters")
        rows = ([row["name"], row["class"], row["parameters"]] for row in facts["modules"])
        console.print(table(f"{facts['parameters']:,} parameters", columns, rows, texts=2))
        return
    console.print(table("ops", ("op", "nodes"), facts["ops"].items()))
    if facts["kind"] == "onnx":
        _show_onnx(console, facts)


def _show_onnx(console: Console, facts: Mapping[str, Any]) -> None:
    rows = ([row["dtype"], row["count"], row["elements"], format_bytes(row["bytes"])] for row in facts["constants"])
    console.print(table("constants", ("type", "tensors", "elements", "size"), rows))
    ends = [(tensor["name"], f"{tensor['dtype']}{tensor['shape']}") for tensor in facts["inputs"] + facts["outputs"]]
    console.print(table("inputs and outputs", ("name", "type"), ends, texts=2))
    coverage = facts["qdq"]
    notes = [
        f"{facts['path']}: {format_bytes(facts['bytes'])}, opset {facts['opset']}, {', '.join(facts['domains'])}",
        f"{coverage['quantized']} of {coverage['nodes']} nodes stand between DequantizeLinear and QuantizeLinear",
        *(f"  in float: {name}" for name in coverage["float"][:SHOWN_OPS]),
    ]
    console.print(lines(notes), soft_wrap=True)


def show_checks(console: Console, checks: Rows) -> None:
    """What `verify` found."""
    rows = [(_verdict(check["holds"]), check["name"], check["detail"]) for check in checks]
    console.print(table("verify", ("", "check", "detail"), rows, texts=3))


def show_checked(console: Console, ops: Rows) -> None:
    """What a target says of each op: those that run in one line for each kind, the others one by one."""
    kinds: dict[tuple[Any, ...], int] = {}
    keys = ("op", "verdict", "weight_bits", "activation_bits", "rewritten_by")
    for op in ops:
        kind = tuple(", ".join(op[key]) if key == "rewritten_by" else op[key] for key in keys)
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = [(kind[0], _colored(kind[1]), kind[4], count, *kind[2:4]) for kind, count in sorted(kinds.items(), key=str)]
    columns = ("op", "verdict", "after rewrites by", "how many", "weight bits", "activation bits")
    console.print(table(f"{sum(kinds.values())} ops", columns, rows, texts=3))
    for op in ops:
        if op["reason"]:
            said = f"{op['node'] or '(unnamed)'} ({op['op']}): {op['reason']}. {op['remedy']}"
            console.print(Text.assemble((f"{op['verdict']}: ", _VERDICT_COLORS[op["verdict"]]), said))


_VERDICT_COLORS = {"runs": "green", "wrong": "yellow", "refused": "red"}


def _colored(verdict: str) -> Text:
    return Text(verdict, _VERDICT_COLORS[verdict])


def show_layers(console: Console, layers: Sequence[Mapping[str, Any]], shown: int = SHOWN_LAYERS) -> None:
    """The ops of a target that are furthest from the file's on the same inputs, and the first that is wrong."""
    worst = sorted(layers, key=lambda layer: -layer["max_lsb"])[:shown]
    keys = ("name", "op", "max_lsb", "mean_lsb", "cosine", "slope", "path_max_lsb")
    columns = ("op on the target's own inputs", "type", "max LSB", "mean LSB", "cosine", "slope", "with all before it")
    title = f"the {len(worst)} of {len(layers)} ops that are furthest from ONNX Runtime's"
    console.print(table(title, columns, ([layer[key] for key in keys] for layer in worst), texts=2))
    wrong = [layer["name"] for layer in layers if layer["is_wrong"]]
    console.print(lines([f"{len(wrong)} computed wrongly, first {wrong[0]}" if wrong else "none is computed wrongly"]))


def _verdict(holds: bool) -> Text:
    return Text("holds", "green") if holds else Text("FAILS", "bold red")


def show_profile(console: Console, profile: Mapping[str, Any], shown: int = SHOWN_OPS) -> None:
    """Where the time goes."""
    if profile["ops"]:
        console.print(_op_table(f"ops, in {profile['unit']} ({profile['source']})", profile["ops"][:shown]))
    notes = [f"latency: {_latency(profile)}", *profile["notes"]]
    console.print(lines(notes), soft_wrap=True)
    if profile.get("estimate"):
        console.print()
        show_profile(console, profile["estimate"], shown)


def _op_table(title: str, ops: Sequence[Mapping[str, Any]]) -> Table:
    """Ops with whatever keys the target gives them; words come before figures."""
    keys = sorted(dict.fromkeys(key for op in ops for key in op), key=lambda key: not isinstance(ops[0].get(key), str))
    words = sum(isinstance(ops[0].get(key), str) for key in keys)
    return table(title, keys, ([op.get(key) for key in keys] for op in ops), texts=words)


def show_explanation(console: Console, facts: Mapping[str, Any]) -> None:
    """What `explain` found."""
    console.print(layer_table(facts["layers"]))
    changes = [(row["pass"], row["change"]) for row in facts["passes"]]
    console.print(table("passes that touched it", ("pass", "change"), changes, texts=2))
    constants = [(c["name"], c["dtype"], str(c["shape"]), format_bytes(c["bytes"])) for c in facts["constants"]]
    console.print(table("constants in the file", ("name", "type", "shape", "size"), constants, texts=3))
    console.print(table("nodes in the file", ("name", "op"), ((n["name"], n["op"]) for n in facts["nodes"]), texts=2))
    if facts["profile"]:
        console.print(_op_table(f"cost, in {facts['profile_unit']}", facts["profile"]))


def show_differences(console: Console, rows: Rows) -> None:
    """What `diff` found."""
    found = [(row["key"], _shown(row["first"]), _shown(row["second"])) for row in rows]
    if not found:
        console.print("the same, measured times aside")
        return
    console.print(table(f"{len(found)} values differ", ("key", "first", "second"), found, texts=3))


def _shown(value: Any) -> str:
    return "(absent)" if value is None else _words(value)


def show_registered(console: Console, title: str, rows: Rows) -> None:
    """Passes or targets: what there is, whose it is, and what cannot be used and why."""
    shown = [(row["name"], row["irs"], _about(row)) for row in rows]
    if any(irs for _, irs, _ in shown):
        console.print(table(title, ("name", "IR", "what it does"), shown, texts=3))
    else:
        console.print(table(title, ("name", "what it is"), [(name, about) for name, _, about in shown], texts=2))


def _about(row: Mapping[str, Any]) -> Text:
    owner = "" if row["owner"] == "fraqat_compiler" else f" (from {row['owner']})"
    return Text(f"cannot be used: {row['error']}", "red") if row["error"] else Text(row["summary"] + owner)


def show_documentation(console: Console, facts: Mapping[str, Any]) -> None:
    """One pass or target: its docstring and its options."""
    console.print(lines([facts["name"], "", facts["doc"], ""]), soft_wrap=True)
    if facts["options"]:
        rows = [(option["name"], option["type"], option["default"]) for option in facts["options"]]
        console.print(table("options", ("option", "takes", "default"), rows, texts=3))
    if facts.get("missing"):
        console.print(Text.assemble(("cannot run here: ", "yellow"), facts["missing"]))


def show_diagnoses(console: Console, rows: Rows) -> None:
    """What `doctor` found."""
    colours = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    shown = [(Text(row["status"], colours[row["status"]]), row["area"], row["name"], _with_remedy(row)) for row in rows]
    console.print(table("doctor", ("", "", "", ""), shown, texts=4))


def _with_remedy(row: Mapping[str, Any]) -> Text:
    return Text(row["detail"]) if not row["remedy"] else Text.assemble(row["detail"], ("  " + row["remedy"], "cyan"))
