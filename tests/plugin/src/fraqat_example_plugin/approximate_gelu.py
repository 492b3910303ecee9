"""approximate-gelu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from fraqat_compiler.pass_base import FxPass, PassContext, PassResult


@dataclass(frozen=True)
class ApproximateGelu(FxPass):
    """Compute every exact GELU by its tanh approximation.

    Before: `gelu(x)`. After: `gelu(x, approximate="tanh")`. Does nothing to modules under `skip`.
    """

    name: ClassVar[str] = "approximate-gelu"
    skip: tuple[str, ...] = ()

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in model.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
            if node.kwargs.get("approximate", "none") == "none" and not self._is_skipped(node):
                node.kwargs = {"approximate": "tanh"}
                changes.append(f"approximated {node.name}")
        model.recompile()
        return PassResult(model, bool(changes), tuple(changes))

    def _is_skipped(self, node: torch.fx.Node) -> bool:
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return any(path.startswith(prefix) for path in paths for prefix in self.skip)
