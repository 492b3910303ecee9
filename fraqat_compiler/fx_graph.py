"""Small edits of FX graphs that several passes need."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node


def get_tensor(graph_module: GraphModule, name: str) -> Tensor:
    """The parameter or buffer under a dotted name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(graph_module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor), name
    return tensor


def set_tensor(graph_module: GraphModule, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer under a dotted name, making the modules on the way."""
    owner, _, leaf = name.rpartition(".")
    module: nn.Module = graph_module
    for part in owner.split(".") if owner else []:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def shared_copy(graph_module: GraphModule) -> GraphModule:
    """A graph of its own over the same tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's copy of its own tree specs warns of itself
        return GraphModule(graph_module, copy.deepcopy(graph_module.graph))


def constant_of(graph_module: GraphModule, node: Any) -> Tensor | None:
    """The tensor that a `get_attr` node reads; None for anything else."""
    if isinstance(node, Node) and node.op == "get_attr":
        return get_tensor(graph_module, str(node.target))
    return None


def add_constant(graph_module: GraphModule, before: Node, name: str, tensor: Tensor) -> Node:
    """A new `get_attr` node for a tensor registered under `name`, placed before a node, with its metadata."""
    set_tensor(graph_module, name, tensor)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(name)
    return copy_meta(before, node, fake_like(before, tensor))


def call(before: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A new call placed before a node, with that node's provenance; its value is computed on fake tensors."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs or {})
    fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs or {}), lambda argument: argument.meta["val"])
    with _fake_mode(before), torch.no_grad():
        return copy_meta(before, node, target(*fake_args, **fake_kwargs))


def copy_meta(source: Node, node: Node, value: Any) -> Node:
    """Give a new node the provenance (module, source line) of another, and its own value."""
    node.meta = {key: source.meta[key] for key in ("nn_module_stack", "stack_trace") if key in source.meta}
    node.meta["val"] = value
    return node


def fake_like(node: Node, tensor: Tensor) -> Tensor:
    """The fake tensor of a real one, in the fake mode that captured the graph."""
    mode = _fake_mode(node)
    fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake


def _fake_mode(node: Node) -> Any:
    for other in node.graph.nodes:
        mode = getattr(other.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


def replace(node: Node, replacement: Node) -> None:
    """Let every user of `node` use `replacement`, and remove `node`."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def finish(graph_module: GraphModule) -> None:
    """Drop what nothing uses any more and make the graph callable again."""
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()


def readers(model: GraphModule) -> Counter[str]:
    """How many ops read each tensor that the graph owns."""
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "get_attr" for _ in node.users)
