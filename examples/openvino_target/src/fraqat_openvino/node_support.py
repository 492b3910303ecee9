"""Which nodes of an ONNX file OpenVINO refuses, and why."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from onnx import ModelProto, NodeProto

from fraqat_compiler.errors import TargetError
from fraqat_compiler.target import Finding
from fraqat_compiler.targets.model_file import read_model
from fraqat_compiler.targets.node_probe import refusals
from fraqat_openvino.model_ir import core, plain

REMEDY = "Leave its module out with --skip, or write a pass that replaces the node."


def findings(path: Path, device: str) -> list[Finding]:
    """One finding for each node: OpenVINO is asked about the whole file, and where it refuses about each node alone.

    Raises:
        TargetError: there is no such file, it is damaged, or it is refused without a node to blame.
    """
    model = read_model(path)
    refusal = _against(path, device)
    refused = refusals(model, partial(_against_one, device=device)) if refusal else {}
    if refusal and not refused:
        raise TargetError(f"OpenVINO refuses {path.name}: {refusal}.")
    return [_finding(node, refused.get(index)) for index, node in enumerate(model.graph.node)]


def _against_one(model: ModelProto, device: str) -> str | None:
    return _against(model.SerializeToString(), device)


def _against(model: Path | bytes, device: str) -> str | None:
    """What OpenVINO says against a model; None where it converts and compiles it."""
    try:
        core().compile_model(core().read_model(model), device)
    except RuntimeError as error:  # all that OpenVINO raises
        return plain(error)
    return None


def _finding(node: NodeProto, reason: str | None) -> Finding:
    if reason is None:
        return Finding(node.name, node.op_type, "runs")
    return Finding(node.name, node.op_type, "refused", reason, REMEDY)
