"""Questions to the outputs of finished compiles: what became of a layer, and how two compiles differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from fraqat_compiler import lazy_values, onnx_io, qdq
from fraqat_compiler.errors import UsageError
from fraqat_compiler.manifest import read_manifest
from fraqat_compiler.report import read_report

# Measured anew by every compile.
_RUN_DEPENDENT = re.compile(
    r"^phases\b|\.seconds$|peak_memory_bytes$|^(?!estimate\b).*latency_ms$|^profile\.(ops|notes)\b"
)


def explain(folder: Path, name: str) -> dict[str, Any]:
    """What happened to a layer: its verdict, the passes that touched it, its nodes and constants in the file, its cost.

    Args:
        folder: output folder of a compile.
        name: of a layer in the report, or of a module that holds some.

    Raises:
        UsageError: the report knows no such layer.
        VerificationError: the folder holds no finished compile.
    """
    report = read_report(folder)
    mentions = re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)")
    layers = [layer for layer in report["layers"] if _belongs(layer["name"], name)]
    if not layers:
        raise _unknown(name, [layer["name"] for layer in report["layers"]])
    graph = onnx_io.load(folder / report["onnx"]["path"])
    return {
        "name": name,
        "layers": layers,
        "passes": [
            {"pass": row["name"], "change": line}
            for row in report["passes"]
            for line in row.get("changes", [])
            if mentions.search(line)
        ],
        "nodes": [{"name": node.name, "op": node.op} for node in graph.nodes if _belongs(node.name, name)],
        "constants": list(_constants_of(graph, name)),
        "profile": [op for op in report["profile"].get("ops", []) if _belongs(str(op["name"]), name)],
        "profile_unit": report["profile"].get("unit"),
    }


def _belongs(inner: str, outer: str) -> bool:
    """`blocks.0.attn/Gemm` belongs to `blocks.0.attn` and to `blocks.0`."""
    return inner == outer or inner.startswith((f"{outer}/", f"{outer}."))


def _unknown(name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(near)}?" if near else "`fraqat inspect` lists the layers."
    return UsageError(f"the report knows no layer {name!r}.", hint)


def _constants_of(graph: gs.Graph, name: str) -> Iterator[dict[str, Any]]:
    for tensor in graph.tensors().values():
        if qdq.is_constant(tensor) and _belongs(tensor.name, name):
            dtype = lazy_values.dtype_of(tensor)
            size = lazy_values.stored_bytes(tensor.shape, dtype)
            yield {"name": tensor.name, "dtype": str(dtype), "shape": list(tensor.shape), "bytes": size}


def differences(first: Path, second: Path) -> list[dict[str, Any]]:
    """What differs between two compiles: one entry for each report key and each file; measured times are left out.

    Raises:
        VerificationError: a folder holds no finished compile.
    """
    keys = _differing(_flat(read_report(first)), _flat(read_report(second)))
    return [*keys, *_differing(_digests(first), _digests(second))]


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": key, "first": first.get(key), "second": second.get(key)}
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"model.name": ...}`; an entry of a list goes by its name where it has one, so that an insertion stays one."""
    if isinstance(value, Mapping):
        pairs = [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{path}[{_label(inner, index)}]", inner) for index, inner in enumerate(value)]
    else:
        return {} if _RUN_DEPENDENT.search(path) else {path: value}
    return {key: leaf for inner_path, inner in pairs for key, leaf in _flat(inner, inner_path).items()}


def _label(entry: Any, index: int) -> Any:
    return entry["name"] if isinstance(entry, Mapping) and "name" in entry else index


def _digests(folder: Path) -> dict[str, str]:
    manifest = read_manifest(folder)
    files = manifest["files"].items()
    return {f"file {name}": entry["sha256"] for name, entry in files if name not in manifest["not_reproducible"]}
