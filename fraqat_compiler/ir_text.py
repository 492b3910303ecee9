"""Readable text of a graph of either IR: one node a line, weights by shape alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, fx, nn

from fraqat_compiler import lazy_values

SMALL_CONSTANT = 8  # elements up to which a constant's values are shown


def listing(model: fx.GraphModule | gs.Graph) -> str:
    """The graph as text; it ends with a newline.

    A line of an FX graph reads `%linear : float32[2, 8] = aten.linear.default(%x, %weight)  # encoder.layers.0`, one of
    an ONNX graph `%y : float32[2, 8] = Gemm(%x, %w) {transB=1}  # node name`.
    """
    lines = _fx_lines(model) if isinstance(model, fx.GraphModule) else _onnx_lines(model)
    return "\n".join(lines) + "\n"


def _fx_lines(model: fx.GraphModule) -> Iterable[str]:
    return (_fx_line(node, model) for node in model.graph.nodes)


def _fx_line(node: fx.Node, model: fx.GraphModule) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    head = f"%{node.name} : {_value_text(node.meta.get('val'))} = "
    return head + _operation(node, model) + _comment(_module_path(node))


def _operation(node: fx.Node, model: fx.GraphModule) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{'input' if node.op == 'placeholder' else 'weight'} {node.target}"
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    return f"{_callee(node, model)}({', '.join(arguments)})"


def _callee(node: fx.Node, model: fx.GraphModule) -> str:
    if node.op != "call_module":
        return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else torch.typename(node.target)
    module: nn.Module = model.get_submodule(str(node.target))
    return f"{node.target}<{type(module).__name__}: {module.extra_repr()}>"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(element) for element in value)}]"
    return str(value)


def _value_text(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype_text(value.dtype)}[{', '.join(str(dim) for dim in value.shape)}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(_value_text(element) for element in value)})"
    return "?" if value is None else str(value)


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _comment(text: str | None) -> str:
    return f"  # {text}" if text else ""


def _onnx_lines(graph: gs.Graph, indent: str = "") -> Iterable[str]:
    for tensor in graph.inputs:
        yield f"{indent}{_typed(tensor)} = input"
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            yield f"{indent}{_typed(tensor)} = constant{_small_values(tensor)}"
    for node in graph.nodes:
        yield indent + _onnx_line(node)
        for subgraph in node.subgraphs():
            yield from _onnx_lines(subgraph, indent + "  ")
    yield f"{indent}return {', '.join(f'%{tensor.name}' for tensor in graph.outputs)}"


def _onnx_line(node: gs.Node) -> str:
    outputs = ", ".join(_typed(tensor) for tensor in node.outputs)
    inputs = ", ".join(f"%{tensor.name}" if tensor.name else "-" for tensor in node.inputs)
    op = f"{node.domain}::{node.op}" if node.domain else node.op
    attributes = [f"{name}={_attribute(value)}" for name, value in node.attrs.items()]
    shown = f" {{{' '.join(attributes)}}}" if attributes else ""
    return f"{outputs} = {op}({inputs}){shown}{_comment(node.name)}"


def _attribute(value: object) -> str:
    if isinstance(value, gs.Graph):
        return "graph"
    return _type_text(value) if isinstance(value, gs.Tensor) else str(value).replace("\n", " ")


def _typed(tensor: gs.Tensor) -> str:
    return f"%{tensor.name} : {_type_text(tensor)}"


def _type_text(tensor: gs.Tensor) -> str:
    if tensor.dtype is None:
        return "?"
    shape = "?" if tensor.shape is None else ", ".join(str(dim) for dim in tensor.shape)
    return f"{lazy_values.dtype_of(tensor)}[{shape}]"


def _small_values(tensor: gs.Constant) -> str:
    if lazy_values.element_count(tensor.shape) > SMALL_CONSTANT:
        return ""
    return " " + np.array2string(lazy_values.values_of(tensor), separator=", ").replace("\n", "")
