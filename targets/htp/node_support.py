"""Which nodes the library refuses, and why: asked after it refused the whole graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto, NodeProto, shape_inference

from fraqat_compiler.errors import TargetError
from fraqat_compiler.targets.htp import unit_probe
from fraqat_compiler.targets.htp.client import QnnError, QnnProcess
from fraqat_compiler.targets.htp.log_messages import explain, node_verdicts, remedy_for
from fraqat_compiler.targets.model_file import read_model

VERBOSE = 0


@dataclass(frozen=True)
class Refusal:
    """Why the library refuses a node.

    Attributes:
        reason: in words.
        remedy: what to do about it.
        log: what the library printed when it refused the whole graph.
    """

    reason: str
    remedy: str
    log: str = field(default="", repr=False)


def refusals(model: Path, options: Mapping[str, str], error: QnnError) -> dict[int, Refusal]:
    """The refused nodes by their place in the graph; one that has no kernel at all comes first.

    The library's verbose log names the nodes that it would leave to the CPU. A failure after that, as of memory, names
    none: then each op is compiled alone.

    Args:
        model: the ONNX file.
        options: of the provider.
        error: of the whole graph.

    Raises:
        TargetError: every op compiles alone, so no node is to blame.
    """
    graph = shape_inference.infer_shapes(read_model(model))
    reasons = _reasons_in_log(graph, _verbose_log(model, options))
    if not reasons:
        failed = unit_probe.failures(graph, model.parent, options)
        reasons = {index: explain(str(failure), failure.log) for index, failure in failed.items()}
    if not reasons:
        reason = explain(str(error), error.log)
        raise TargetError(
            f"the HTP compiler fails on {model.name} as a whole, though on no node alone: {reason}.", remedy_for(reason)
        )
    ranks = _ranks(graph)
    found = {index: _refusal(graph.graph.node[index], ranks, reason, error.log) for index, reason in reasons.items()}
    return dict(sorted(found.items(), key=lambda item: ("not supported" not in item[1].reason, item[0])))


def _verbose_log(model: Path, options: Mapping[str, str]) -> str:
    """What the library says of each node; in a new process, since in a used one it renames the nodes."""
    process = QnnProcess()
    try:
        process.load(model, options, {}, severity=VERBOSE)
    except QnnError as error:
        return error.log
    return process.log


def _reasons_in_log(graph: ModelProto, log: str) -> dict[int, str]:
    refused = {
        (verdict.node, verdict.op): verdict.reason for verdict in node_verdicts(log).values() if not verdict.accepted
    }
    return {
        index: refused[node.name, node.op_type]
        for index, node in enumerate(graph.graph.node)
        if (node.name, node.op_type) in refused and node.op_type not in unit_probe.QDQ
    }


def _refusal(node: NodeProto, ranks: Mapping[str, int], reason: str, log: str) -> Refusal:
    rank = max((ranks.get(name, 0) for name in (*node.input, *node.output)), default=0)
    return Refusal(reason, remedy_for(f"{node.op_type} rank={rank} {reason}"), log)


def _ranks(graph: ModelProto) -> dict[str, int]:
    values = (*graph.graph.value_info, *graph.graph.input, *graph.graph.output)
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}
