"""Asking a runtime about one node at a time: one that refuses a whole model names one node or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    shape_inference,
)

LARGEST_CONSTANT = 1024  # elements; shapes, axes and scales must be constants, while a weight may as well be an input


def refusals(model: ModelProto, ask: Callable[[ModelProto], str | None]) -> dict[int, str]:
    """What a runtime says against nodes, by their place in the graph.

    A node whose inputs have no known type, because a refused node makes them, is not asked.

    Args:
        ask: given a model of one node, what the runtime says against it; None where it takes it.
    """
    inferred = shape_inference.infer_shapes(model)
    values = {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.input)}
    constants = {tensor.name: tensor for tensor in inferred.graph.initializer}
    alone = (_alone(node, inferred, values, constants) for node in inferred.graph.node)
    reasons = {index: ask(probe) for index, probe in enumerate(alone) if probe is not None}
    return {index: reason for index, reason in reasons.items() if reason is not None}


def _alone(
    node: NodeProto, model: ModelProto, values: Mapping[str, ValueInfoProto], constants: Mapping[str, TensorProto]
) -> ModelProto | None:
    """A model of this node only; None when the type of an input is unknown."""
    if any(name and name not in values and name not in constants for name in node.input):
        return None
    read = {name for name in _names_read(node) if name in values or name in constants}
    kept = [constants[name] for name in sorted(read) if name in constants and _is_small(constants[name])]
    free = read - {tensor.name for tensor in kept}
    inputs = [values[name] if name in values else _as_value(constants[name]) for name in sorted(free)]
    outputs = [ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "probe", inputs, outputs, initializer=kept)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _names_read(node: NodeProto) -> set[str]:
    """Names that the node or its subgraphs read; those that a subgraph makes itself are among them."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            names.update(*map(_names_read, attribute.g.node))
    return names


def _is_small(tensor: TensorProto) -> bool:
    if tensor.data_location == TensorProto.EXTERNAL:
        return False
    return numpy_helper.to_array(tensor).size <= LARGEST_CONSTANT


def _as_value(tensor: TensorProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
