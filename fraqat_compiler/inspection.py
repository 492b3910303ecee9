"""What a graph, or a model that is not compiled yet, consists of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import lazy_values, onnx_io, qdq
from fraqat_compiler.reproducer import MODEL_FILE, load_model

_QDQ = (qdq.QUANTIZE, qdq.DEQUANTIZE)


def inspect_graph(path: Path) -> dict[str, Any]:
    """Facts of what `load_model` opens: an ONNX file, or a folder with a stored graph.

    Raises:
        UsageError: the path is neither.
        VerificationError: the files are damaged.
    """
    model = load_model(path)
    if isinstance(model, GraphModule):
        return inspect_fx(model)
    return inspect_onnx(path if path.is_file() else path / MODEL_FILE)


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Facts of an ONNX file: ops, constants by type, inputs and outputs, and which nodes stand between DQ and Q.

    Raises:
        VerificationError: the file cannot be read.
    """
    graph = onnx_io.load(path)
    compute = [node for node in graph.nodes if node.op not in _QDQ]
    in_float = [node.name for node in compute if not is_quantized(node, graph)]
    return {
        "kind": "onnx",
        "path": path.name,
        "bytes": onnx_io.file_bytes(path),
        "opset": graph.opset,
        "domains": sorted({node.domain or "ai.onnx" for node in graph.nodes}),
        "inputs": [_tensor(tensor) for tensor in graph.inputs],
        "outputs": [_tensor(tensor) for tensor in graph.outputs],
        "ops": _counted(node.op for node in graph.nodes),
        "constants": _constants(graph),
        "qdq": {"nodes": len(compute), "quantized": len(compute) - len(in_float), "float": in_float},
    }


def is_quantized(node: gs.Node, graph: gs.Graph) -> bool:
    """Whether a node reads floats from DQ alone and hands its results to Q alone, as an integer backend wants it."""
    reads = [tensor for tensor in node.inputs if _is_float(tensor)]
    if not all(qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in reads):
        return False
    writes = [tensor for tensor in node.outputs if _is_float(tensor)]
    if any(tensor in graph.outputs for tensor in writes):
        return False
    return all(reader.op == qdq.QUANTIZE for tensor in writes for reader in tensor.outputs)


def _is_float(tensor: gs.Tensor) -> bool:
    return bool(tensor.name) and tensor.dtype is not None and lazy_values.dtype_of(tensor).kind not in "iub"


def _tensor(tensor: gs.Tensor) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else str(dim) for dim in tensor.shape or ()]
    return {"name": tensor.name, "dtype": str(lazy_values.dtype_of(tensor)), "shape": shape}


def _counted(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _constants(graph: gs.Graph) -> list[dict[str, Any]]:
    """Number, elements and bytes of the constants of each type, the largest first."""
    totals: dict[str, list[int]] = {}
    for tensor in graph.tensors().values():
        if not qdq.is_constant(tensor):
            continue
        dtype = lazy_values.dtype_of(tensor)
        total = totals.setdefault(str(dtype), [0, 0, 0])
        facts = (1, lazy_values.element_count(tensor.shape), lazy_values.stored_bytes(tensor.shape, dtype))
        totals[str(dtype)] = [old + new for old, new in zip(total, facts, strict=True)]
    keys = ("count", "elements", "bytes")
    rows = [{"dtype": dtype, **dict(zip(keys, total, strict=True))} for dtype, total in totals.items()]
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def inspect_fx(graph: GraphModule) -> dict[str, Any]:
    """Facts of a stored FX graph, such as a reproducer's: ops, and the tensors that it owns."""
    calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    modules = {str(node.target): graph.get_submodule(str(node.target)) for node in calls if node.op == "call_module"}
    names = [type(modules[str(n.target)]).__name__ if n.op == "call_module" else str(n.target) for n in calls]
    return {
        "kind": "fx",
        "inputs": [node.name for node in graph.graph.nodes if node.op == "placeholder"],
        "ops": _counted(names),
        "parameters": sum(parameter.numel() for parameter in graph.parameters()),
    }


def inspect_module(model: nn.Module) -> dict[str, Any]:
    """The modules of a model by their names, which `--weights`, `--activations` and `--skip` take patterns over."""
    rows = [
        {"name": name, "class": type(module).__name__, "parameters": _own_parameters(module)}
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    return {"kind": "module", "parameters": sum(p.numel() for p in model.parameters()), "modules": rows}


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
