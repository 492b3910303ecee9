"""fold-constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.ops import module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "empty")


@dataclass(frozen=True)
class FoldConstants(FxPass):
    """Compute at compile time what depends on weights and constants alone.

    Before: a weight made from two by weight normalization, position tables made by `arange` and `sin`, masks made by
    `full` and `triu`, and the `x * 0` that a `where` chooses, as softshrink is captured. After: one constant each,
    named after the module that used it. Does nothing where every computation depends on an input, and leaves alone what
    would grow past `max_elements`.
    """

    name: ClassVar[str] = "fold-constants"
    max_elements: int = 1 << 26

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        values = self._evaluate(model)
        folded = []
        for node, value in values.items():
            if not self._is_worth_folding(node, value, values):
                continue
            name = _constant_name(model, node)
            fx_graph.replace(node, fx_graph.add_constant(model, node, name, value.detach().clone()))
            folded.append(f"folded {node.name} into {name}")
        fx_graph.finish(model)
        return PassResult(model, bool(folded), tuple(folded))

    def _evaluate(self, model: GraphModule) -> dict[Node, Any]:
        """Values of all calls that depend on no input, in graph order."""
        values: dict[Node, Any] = {}
        constants: dict[Node, Any] = {}
        for node in model.graph.nodes:
            if node.op == "get_attr":
                constants[node] = fx_graph.constant_of(model, node)
            elif self._is_constant(node, constants):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda other: constants[other])
                with torch.no_grad():
                    constants[node] = values[node] = node.target(*args, **kwargs)
            elif _is_chosen_zero(node):
                constants[node] = values[node] = torch.zeros((), dtype=node.meta["val"].dtype)
        return values

    def _is_constant(self, node: Node, constants: dict[Node, Any]) -> bool:
        if node.op != "call_function" or any(word in op_name(node) for word in _RANDOM):
            return False
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.numel() > self.max_elements:
            return False
        return all(other in constants for other in node.all_input_nodes)

    def _is_worth_folding(self, node: Node, value: Any, values: dict[Node, Any]) -> bool:
        """Only the last of a chain of constants becomes one."""
        return isinstance(value, Tensor) and any(user not in values for user in node.users)


def _is_chosen_zero(node: Node) -> bool:
    """Whether a product is 0 wherever its input is finite, and read where a single 0 will do."""
    if op_name(node) != "aten.mul" or not any(isinstance(factor, int | float) and not factor for factor in node.args):
        return False
    return bool(node.users) and all(op_name(user) == "aten.where" for user in node.users)


def _constant_name(model: GraphModule, node: Node) -> str:
    """A free name under the module of the first user, so that reports can say whose constant it is."""
    owner = module_path(next(iter(node.users))).replace("@", "_")
    base = f"{owner}.{node.name}" if owner else node.name
    taken = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(model.named_modules())
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name
