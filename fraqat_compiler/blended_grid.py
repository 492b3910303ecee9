"""FracBits' reading of a fractional width: a blend of the two integer grids around it.

Yang and Jin 2021 (arXiv 2007.02017): at width b a weight is (ceil(b) - b) Q_floor(b)(w) + (b - floor(b)) Q_ceil(b)(w).
FraQAT instead puts one grid of 2^b levels. At integer widths both are the same, so what is exported does not differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.target import Role


@dataclass(frozen=True)
class BlendedGrid:
    """Blend the two integer grids around a fractional width: FracBits (Yang and Jin 2021, arXiv 2007.02017).

    The width is given by the schedule; FracBits itself learns it. No options.
    """

    name: ClassVar[str] = "blended-grid"


def blend_grids(graph: GraphModule) -> int:
    """Let the weights of a graph go through blended grids; returns how many do."""
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    plain = {target: graph.get_submodule(target) for target in sorted(targets)}
    weights = {
        target: module
        for target, module in plain.items()
        if type(module) is WeightFakeQuantize and module.role == "weight"
    }
    for target, module in weights.items():
        graph.set_submodule(target, BlendedWeightFakeQuantize.of(module))
    return len(weights)


class BlendedWeightFakeQuantize(WeightFakeQuantize):
    """Fake quant of a weight by two integer grids at fractional widths, and as its base at integer ones.

    Attributes:
        lower, upper: the quantizers of those grids.
    """

    def __init__(self, spec: QuantSpec, role: Role, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__(spec, role, scale_shape)
        self.lower = WeightFakeQuantize(spec, role, scale_shape)
        self.upper = WeightFakeQuantize(spec, role, scale_shape)
        self.set_bit_width(spec.bit_width)

    @classmethod
    def of(cls, module: WeightFakeQuantize) -> BlendedWeightFakeQuantize:
        """The same, blended."""
        made = cls(module.spec, module.role, module.scale_shape).to(module.scale.device)
        made.load_state_dict(module.state_dict(), strict=False)
        made.fitted_bit_width = module.fitted_bit_width
        return made

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlendedWeightFakeQuantize:
        module = cls(QuantSpec(**config["spec"]), config["role"], tuple(config["scale_shape"]))
        module.frozen = config["frozen"]
        return module

    def set_bit_width(self, bit_width: float) -> None:
        super().set_bit_width(bit_width)
        self.lower.set_bit_width(math.floor(bit_width))
        self.upper.set_bit_width(math.ceil(bit_width))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled or self.spec.is_integer:
            return super().forward(weight)
        for quantizer in (self.lower, self.upper):
            quantizer.least_scale.copy_(self.least_scale)
        share = self.spec.bit_width - math.floor(self.spec.bit_width)
        blended: Tensor = self.lower(weight).lerp(self.upper(weight), share)
        self.scale = self.lower.scale.clone()
        return blended
