"""freeze-bit-width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import leave_room_for_biases
from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult


@dataclass(frozen=True)
class FreezeBitWidth(FxPass):
    """Fix every quantizer's scale for good, so that the graph computes what a file can hold.

    Before: weight scales follow the weights. After: they are constants, and forward uses exactly the codes that will
    be exported. Refuses fractional widths, ranges per token and activations that were never calibrated. Does nothing
    when all is frozen.
    """

    name: ClassVar[str] = "freeze-bit-width"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        leave_room_for_biases(model)
        for node in model.graph.nodes:
            if node.op != "call_module":
                continue
            module = model.get_submodule(str(node.target))
            if isinstance(module, WeightFakeQuantize) and not module.frozen:
                module.freeze(fx_graph.get_tensor(model, str(node.args[0].target)))
                changes.append(f"froze {node.args[0].target} at {module.spec.bit_width:g} bits")
            if isinstance(module, ActivationFakeQuantize):
                _refuse_unexportable(str(node.target), module)
        return PassResult(model, bool(changes), tuple(changes))


def _refuse_unexportable(name: str, module: ActivationFakeQuantize) -> None:
    if module.spec.dynamic:
        raise QuantizationError(
            f"{name} takes its range from every token, which no QDQ file can hold.", "Insert with dynamic=false."
        )
    if not module.calibrated:
        raise QuantizationError(f"{name} has no range.", "Calibrate the graph before freezing it.")
    if not module.spec.is_exportable:
        raise QuantizationError(
            f"{name} has {module.spec.bit_width:g} bits; activations are exported at 8 or 16.",
            "Use --activations 8 or 16.",
        )
