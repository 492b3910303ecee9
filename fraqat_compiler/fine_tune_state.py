"""State of a fine-tune as plain tensors and JSON, and digests that say which run it belongs to."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import Optimizer

from fraqat_compiler import fx_graph
from fraqat_compiler.checkpoint import Checkpoint
from fraqat_compiler.fake_quant import FakeQuantize, WeightFakeQuantize
from fraqat_compiler.ir_text import listing

_OPTIMIZER = "optimizer."


def trained_parameters(student: GraphModule) -> dict[str, Tensor]:
    """Parameters that the graph reads and that want a gradient, each once, by name; then the learned ranges."""
    names = [str(node.target) for node in student.graph.nodes if node.op == "get_attr"]
    tensors = {name: fx_graph.get_tensor(student, name) for name in dict.fromkeys(names)}
    for name, module in _quantizers(student).items():
        tensors |= {f"{name}.{kind}": parameter for kind, parameter in module.named_parameters(recurse=False)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
    }


def identity(student: GraphModule, parameters: dict[str, Tensor]) -> dict[str, str]:
    """Digests of what a run starts from: the graph with its quantizers, and the float weights."""
    configs = {name: module.to_config() for name, module in _quantizers(student).items()}
    graph = hashlib.sha256((listing(student) + json.dumps(configs, sort_keys=True)).encode())
    weights = hashlib.sha256()
    for name, parameter in parameters.items():
        weights.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        weights.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"graph": graph.hexdigest()[:16], "weights": weights.hexdigest()[:16]}


def tensors_of(student: GraphModule, parameters: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor that the next step depends on: parameters, what the optimizer keeps, buffers of the quantizers.

    The quantizers' are the calibrated ranges and, with range_method "mse", the clip ratios found when a stage began.
    """
    tensors = {f"parameter:{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():  # a parameter without gradient has nothing
            tensors[f"{_OPTIMIZER}{kind}:{name}"] = value
    for name, module in _quantizers(student).items():
        tensors |= {f"quantizer:{name}.{buffer}": value for buffer, value in module.named_buffers()}
    return tensors


def fitted_widths(student: GraphModule) -> dict[str, float | None]:
    """The width that each weight's clip ratios were found at."""
    modules = _quantizers(student).items()
    return {name: module.fitted_bit_width for name, module in modules if isinstance(module, WeightFakeQuantize)}


def load(found: Checkpoint, student: GraphModule, parameters: dict[str, Tensor], optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors in their place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.tensors[f"parameter:{name}"])
    for name, module in _quantizers(student).items():
        buffers = [buffer for buffer, _ in module.named_buffers()]
        kept = {buffer: found.tensors[f"quantizer:{name}.{buffer}"] for buffer in buffers}
        module.load_state_dict(kept, strict=False)  # learned ranges are among the parameters
        if isinstance(module, WeightFakeQuantize):
            module.fitted_bit_width = found.state["fitted"][name]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": _optimizer_state(found, parameters), "param_groups": groups})


def _optimizer_state(found: Checkpoint, parameters: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """In the form that torch keeps: by the parameter's place."""
    place = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in found.tensors.items():
        kind, _, name = key.partition(":")
        if kind.startswith(_OPTIMIZER):
            state.setdefault(place[name], {})[kind.removeprefix(_OPTIMIZER)] = tensor
    return state


def _quantizers(student: GraphModule) -> dict[str, FakeQuantize]:
    return {name: module for name, module in student.named_modules() if isinstance(module, FakeQuantize)}
