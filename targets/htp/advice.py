"""What the op-support table says of the nodes of a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import onnx_graphsurgeon as gs

from fraqat_compiler import qdq
from fraqat_compiler.target import Finding
from fraqat_compiler.targets.htp.op_table import DISTRIBUTION, Key, OpRow, OpTable, has_weights, nearest_that_runs
from fraqat_compiler.targets.htp.unit_probe import QDQ

# Whether they go wrong hangs on ranges, shapes and constants that the table does not hold: rules.py looks at those.
RULED_OPS = frozenset("Tanh Log Softmax Reciprocal CumSum Resize Floor Ceil Round".split())


@dataclass(frozen=True)
class Advice:
    """What the table knows of a file.

    Attributes:
        wrong: a finding for every node that it calls wrong, where no rule looks closer.
        ways: by name and op of a node, how its op would run if it does not as it stands.
        notes: that the table is of another library than the one installed.
    """

    wrong: tuple[Finding, ...] = ()
    ways: Mapping[tuple[str, str], str] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()


def advise(graph: gs.Graph, table: OpTable | None) -> Advice:
    """Look the nodes up.

    Args:
        graph: with the shapes of its tensors.
        table: of the architecture; None where it was not probed, of which nothing is known.
    """
    if table is None:
        return Advice()
    keys = {(node.name, node.op): key_of(node, table) for node in graph.nodes if node.op not in QDQ}
    known = {place: key for place, key in keys.items() if key is not None}
    ways = {key: nearest_that_runs(table, key) for key in set(known.values())}
    rows = {place: table.rows.get(key) for place, key in known.items() if place[1] not in RULED_OPS}
    wrong = {place: row for place, row in rows.items() if row is not None and row.verdict == "wrong"}
    return Advice(
        wrong=tuple(_wrong_finding(*place, row, ways[row.key]) for place, row in wrong.items()),
        ways={place: ways[key] for place, key in known.items() if ways[key]},
        notes=tuple(_version_notes(table)),
    )


def key_of(node: gs.Node, table: OpTable) -> Key | None:
    """Where the table would have the node; None for one of unknown shape, in float, or of several widths."""
    shape = node.inputs[0].shape if node.inputs else None
    constant, computed = _operands(node)
    weight = next(iter(constant), None) if has_weights(table, node.op) else None
    widths = {_bits(quantizer) for quantizer in (*computed, *_results(node))}
    if shape is None or len(widths) != 1:
        return None
    weight_bits, granularity = (None, "") if weight is None else (_bits(weight), _granularity(weight))
    return node.op, _variant(node), len(shape), weight_bits, widths.pop(), granularity


def _wrong_finding(node: str, op: str, row: OpRow, way: str) -> Finding:
    reason = f"the emulator strayed by {row.max_lsb:g} LSB (slope {row.slope:g}) on this op at these widths and rank"
    return Finding(node, op, "wrong", reason, f"It is right {way}." if way else "Write it with other ops.")


def _version_notes(table: OpTable) -> Iterator[Finding]:
    installed = metadata.version(DISTRIBUTION)
    if installed != table.package_version:
        reason = f"what HTP computes wrongly is known of {DISTRIBUTION} {table.package_version}, here is {installed}"
        yield Finding("", DISTRIBUTION, "runs", reason, "Ask the library anew: python tools/probe_htp_ops.py --fresh")


def _operands(node: gs.Node) -> tuple[list[gs.Node], list[gs.Node]]:
    """The dequantizers of weights, and those of activations; of biases, which have 32 bits, none."""
    sources = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs]
    found = [source for source in sources if source is not None and _bits(source) <= 16]
    constant = [source for source in found if qdq.is_constant(source.inputs[0])]
    return constant, [source for source in found if not qdq.is_constant(source.inputs[0])]


def _results(node: gs.Node) -> Iterator[gs.Node]:
    return (reader for tensor in node.outputs for reader in tensor.outputs if reader.op == qdq.QUANTIZE)


def _bits(quantizer: gs.Node) -> int:
    return int(re.sub(r"\D", "", str(qdq.code_type(quantizer))))


def _granularity(dequantizer: gs.Node) -> str:
    if qdq.is_scalar(dequantizer):
        return "per_tensor"
    return "per_block" if dequantizer.attrs.get("block_size") else "per_channel"


def _variant(node: gs.Node) -> str:
    """As the probes name what differs from the plain op."""
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        return str(node.attrs["approximate"]) if node.attrs.get("approximate", "none") != "none" else ""
    return "depthwise" if node.inputs[0].shape and groups == node.inputs[0].shape[1] else "grouped"
