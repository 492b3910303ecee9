"""clip-masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_SCALAR_OPS = {"aten.masked_fill", "aten.where", "aten.full", "aten.scalar_tensor", "aten.full_like", "aten.fill"}
_MASK_LIKE = -1e4


@dataclass(frozen=True)
class ClipMasks(FxPass):
    """Replace minus infinity and its stand-ins (-65504, -3.4e38) in masks by a value that a quantizer can span.

    Before: `add(scores, [[0, -3.4e38], [0, 0]])`, `masked_fill(scores, m, -inf)`. After: the same with `value`; after
    softmax the difference is below exp(value) of the row. Does nothing where no constant lies below -10,000.
    """

    name: ClassVar[str] = "clip-masks"
    value: float = -50.0

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            if self._clip_scalars(node) or self._clip_constant(model, node):
                changes.append(f"clipped {layer_name(node)} at {self.value:g}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))

    def _clip_scalars(self, node: Node) -> bool:
        if op_name(node) not in _SCALAR_OPS:
            return False
        clipped = tuple(self._clipped(argument) for argument in node.args)
        changed = clipped != tuple(node.args)
        node.args = clipped
        return changed

    def _clipped(self, argument: Any) -> Any:
        return self.value if isinstance(argument, float) and argument < _MASK_LIKE else argument

    def _clip_constant(self, model: GraphModule, node: Node) -> bool:
        constant = fx_graph.constant_of(model, node)
        if constant is None or not constant.is_floating_point() or constant.device.type == "meta":
            return False
        if constant.numel() == 0 or not bool((constant < _MASK_LIKE).any()):
            return False
        fx_graph.set_tensor(model, str(node.target), constant.detach().clamp(min=self.value))
        return True
