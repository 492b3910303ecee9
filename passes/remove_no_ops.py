"""remove-no-ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_ALWAYS = {"aten.alias", "aten.detach", "aten.clone", "aten.contiguous", "aten.lift_fresh_copy", "aten.dropout"}
_ALWAYS |= {"aten.feature_dropout", "aten.alpha_dropout", "aten.dropout_"}
_IF_SAME_TYPE = {"aten._to_copy", "aten.to", "aten.type_as"}
_IF_SAME_SHAPE = {"aten.reshape", "aten.expand", "aten.flatten"}
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_CHECKS = {"aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar", "aten.sym_constrain_range"}


@dataclass(frozen=True)
class RemoveNoOps(FxPass):
    """Remove what does nothing at inference.

    Before: `clone(dropout(x))`, a cast to the type a tensor has, a view to the shape it has, `cat([empty, x])`, runtime
    assertions.
    After: `x`. A `view` becomes a `reshape`, because the copies that made its memory contiguous are gone. Does nothing
    to a graph without such calls.
    """

    name: ClassVar[str] = "remove-no-ops"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        removed = []
        for node in list(model.graph.nodes):
            if op_name(node) in _CHECKS:
                model.graph.erase_node(node)
                removed.append(f"removed {node.name}")
                continue
            if node.target in _VIEWS:
                node.target = torch.ops.aten.reshape.default
                removed.append(f"made {node.name} a reshape")
            if _drop_empty_parts(node):
                removed.append(f"dropped empty parts of {node.name}")
            if _does_nothing(node):
                fx_graph.replace(node, node.all_input_nodes[0])
                removed.append(f"removed {node.name} ({op_name(node)})")
        fx_graph.finish(model)
        return PassResult(model, bool(removed), tuple(removed))


def _drop_empty_parts(node: Node) -> bool:
    """A cache that holds nothing yet is put before its first entry."""
    if op_name(node) != "aten.cat":
        return False
    parts: Any = node.args[0]
    kept = [part for part in parts if part.meta["val"].numel()]
    if not kept or len(kept) == len(parts):
        return False
    node.args = (kept, *node.args[1:])
    return True


def _does_nothing(node: Node) -> bool:
    name = op_name(node)
    if name in _ALWAYS:
        return True
    if name == "aten.cat":
        return len(node.args[0]) == 1  # type: ignore[arg-type]
    if name not in _IF_SAME_TYPE | _IF_SAME_SHAPE or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.shape == after.shape and before.device == after.device
