"""Is a graph well-formed? What every pass must leave behind, for either IR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx
import onnx_graphsurgeon as gs
import torch
from onnx import checker, shape_inference
from torch import Tensor, fx
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import VerificationError
from fraqat_compiler.lazy_values import element_count

_UNPREDICTABLE = (
    *(fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException),
    *(fake_tensor.UnsupportedFakeTensorException, fake_tensor.UnsupportedOperatorException),
)
LARGE_CONSTANT = 1024  # elements beyond which the ONNX checker sees a constant as an input, without its data


def verify(model: fx.GraphModule | gs.Graph) -> None:
    """Verify a graph of either IR.

    Raises:
        VerificationError: the graph is malformed; node and rule are named.
    """
    if isinstance(model, fx.GraphModule):
        verify_fx(model)
    else:
        verify_onnx(model)


def verify_fx(model: fx.GraphModule) -> None:
    """Arguments come before their use, names are unique, targets exist, recorded shapes are what the ops give.

    Raises:
        VerificationError: one of these does not hold.
    """
    try:
        model.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise VerificationError(f"the FX graph is malformed: {str(error).splitlines()[0]}") from error
    _refuse_missing_output(model.graph)
    for node in model.graph.find_nodes(op="get_attr"):
        _verify_attribute(model, node)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for node in model.graph.nodes:
            _verify_shape(node)


def _refuse_missing_output(graph: fx.Graph) -> None:
    nodes = list(graph.nodes)
    if not nodes or nodes[-1].op != "output" or sum(node.op == "output" for node in nodes) != 1:
        raise VerificationError("the FX graph does not end with its one output node.")


def _verify_attribute(model: fx.GraphModule, node: fx.Node) -> None:
    path, _, name = str(node.target).rpartition(".")
    value = getattr(model.get_submodule(path), name)
    if not isinstance(value, Tensor):
        raise VerificationError(f"node {node.name} reads {node.target}, which is a {type(value).__name__}, no tensor.")
    _compare(node, value, f"the tensor {node.target}")


def _compare(node: fx.Node, actual: object, origin: str) -> None:
    """Hold recorded against actual values, as far as both are tensors of known shape."""
    recorded = pytree.tree_leaves(node.meta.get("val"))
    for old, new in zip(recorded, pytree.tree_leaves(actual), strict=False):
        if not (_is_static(old) and _is_static(new)):
            continue
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise VerificationError(
                f"node {node.name} records {_type_text(old)} but {origin} is {_type_text(new)}.",
                "The pass must update node.meta['val'].",
            )


def _is_static(value: object) -> bool:
    return isinstance(value, Tensor) and all(isinstance(dim, int) for dim in value.shape)


def _type_text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _verify_shape(node: fx.Node) -> None:
    """Run the op on fake tensors of the recorded input shapes."""
    known = all(_is_static(source.meta.get("val")) for source in node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload) or not known or "val" not in node.meta:
        return
    try:
        result = node.target(*_fake(node.args), **_fake(node.kwargs))
    except _UNPREDICTABLE:
        return  # its shape depends on data, so there is nothing to hold against
    except Exception as error:  # an op refuses arguments with any type of exception
        raise VerificationError(f"node {node.name} ({node.target}) refuses its inputs: {error}") from error
    _compare(node, result, "its result")


def _fake(arguments: Any) -> Any:
    """The arguments with every node replaced by an empty tensor like the recorded one, in the current fake mode."""
    return fx.map_arg(arguments, lambda source: _empty_like(source.meta["val"]))


def _empty_like(value: Tensor) -> Tensor:
    return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device)


def verify_onnx(graph: gs.Graph) -> None:
    """Every tensor has one producer, nodes form no cycle and have names of their own, and ONNX's checker agrees.

    Large constants are hidden from the checker, so it costs no memory for weights.

    Raises:
        VerificationError: one of these does not hold.
    """
    _refuse_repeated("node name", [node.name for node in graph.nodes if node.name])
    produced = [tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name]
    _refuse_repeated("tensor", [*produced, *(tensor.name for tensor in graph.inputs)])
    _refuse_unproduced(graph, produced)
    _refuse_cycle(graph)
    _check_with_onnx(graph)


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise VerificationError(f"the {what} {repeated[0]!r} is defined more than once.")


def _refuse_unproduced(graph: gs.Graph, produced: Sequence[str]) -> None:
    known = {*produced, *(tensor.name for tensor in graph.inputs)}
    for node in graph.nodes:
        for tensor in node.inputs:
            if tensor.name and tensor.name not in known and not isinstance(tensor, gs.Constant):
                raise VerificationError(f"node {node.name} ({node.op}) reads {tensor.name!r}, which nothing produces.")
    for tensor in graph.outputs:
        if tensor.name not in known and not isinstance(tensor, gs.Constant):
            raise VerificationError(f"the output {tensor.name!r} is produced by nothing.")


def _refuse_cycle(graph: gs.Graph) -> None:
    producers = {tensor.name: index for index, node in enumerate(graph.nodes) for tensor in node.outputs}
    order = nx.DiGraph()
    for index, node in enumerate(graph.nodes):
        order.add_edges_from((producers[tensor.name], index) for tensor in node.inputs if tensor.name in producers)
    if not nx.is_directed_acyclic_graph(order):
        cycle = " -> ".join(graph.nodes[source].name or graph.nodes[source].op for source, _ in nx.find_cycle(order))
        raise VerificationError(f"the ONNX graph has a cycle: {cycle}.")


def _check_with_onnx(graph: gs.Graph) -> None:
    """Checker and type inference; graphsurgeon's nodes need no order, files do, so a copy is sorted first."""
    light = graph.copy().toposort()
    light.inputs = [*light.inputs, *_hide_large_constants(light)]
    try:
        checker.check_model(gs.export_onnx(light), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise VerificationError(f"the ONNX checker refuses the graph: {str(error).strip()}") from error


def _hide_large_constants(graph: gs.Graph) -> list[gs.Variable]:
    """Let nodes read a variable, which is to become a graph input, in place of each large constant."""
    hidden: dict[str, gs.Variable] = {}
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and element_count(tensor.shape) > LARGE_CONSTANT:
                variable = gs.Variable(tensor.name, tensor.dtype, list(tensor.shape))
                node.inputs[index] = hidden.setdefault(tensor.name, variable)
    return list(hidden.values())
