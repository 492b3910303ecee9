"""Learned ranges: LSQ and LSQ+, the step (and the zero point) of a quantizer as trained parameters.

LSQ: Esser et al. 2020 (arXiv 1902.08153). LSQ+: Bhalgat et al. 2020 (arXiv 2004.09576).

What is trained is not the scale but its ratio to a base: scale = base * ratio, ratio 1 at first. Two reasons. Adam
moves every parameter by about the learning rate, whatever its gradient's size, so a ratio is moved by the same share in
every layer, where a scale of 1e-3 would jump. And when the width falls, the base alone follows: it is multiplied by
what the quantizer's own range rule (max, or least squared error) gives for the weight as it is at the new width over
what it gives at the old one. With max that is the ratio of the code ranges, (2^(b-1) - 1) / (2^(b'-1) - 1), so the
range in values stays where it was learned to be; what was learned, and the optimizer's moments of it, carry over.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fraqat_compiler import quantizer
from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.target import Role

LEAST_RATIO = 0.01  # a scale stays positive


@dataclass(frozen=True)
class Lsq:
    """Learn the step of weights and activations: LSQ (Esser et al. 2020, arXiv 1902.08153).

    The gradient of the step is LSQ's, scaled by 1 / sqrt(elements * quant_max). Ranges start where calibration put
    them. Tensors whose grid is given (a softmax's) keep it, and so do weights on asymmetric grids.

    Options: `weights` and `activations`, false to leave them as they are; `rate`, the learning rate of the ratio of a
    step to its start, over that of the weights.
    """

    name: ClassVar[str] = "lsq"
    offset: ClassVar[bool] = False
    weights: bool = True
    activations: bool = True
    rate: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise UsageError(f"{self.name} cannot run with rate={self.rate:g}.", "It is positive.")
        if not (self.weights or self.activations):
            raise UsageError(f"{self.name} is asked to learn nothing.", "Leave weights or activations true.")


@dataclass(frozen=True)
class LsqPlus(Lsq):
    """`lsq`, and the zero point of asymmetric activations is learned too: LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576).

    A file holds an integer zero point, so it is rounded in training, with a straight-through gradient. Options as those
    of `lsq`.
    """

    name: ClassVar[str] = "lsq-plus"
    offset: ClassVar[bool] = True


def learn_ranges(graph: GraphModule, options: Lsq, trained: Collection[str]) -> int:
    """Let the calibrated fake quants of a graph learn their ranges.

    Args:
        graph: changed in place.
        options: what is learned.
        trained: names of the parameters that are trained. Ranges of other weights stay; and where not all are trained,
            so do those of activations that no op with a trained parameter reads or computes.

    Returns:
        How many fake quants learn.
    """
    near = _near_trained(graph, trained)
    targets = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    learning = 0
    for target, node in targets.items():
        module = graph.get_submodule(target)
        learner: FakeQuantize | None = None
        if isinstance(module, WeightFakeQuantize) and options.weights and str(node.args[0].target) in trained:
            learner = LearnedWeightFakeQuantize.of(module)
        if isinstance(module, ActivationFakeQuantize) and options.activations and node in near:
            learner = LearnedActivationFakeQuantize.of(module, options.offset)
        if learner is not None:
            graph.set_submodule(target, learner)
            learning += 1
    return learning


def _near_trained(graph: GraphModule, trained: Collection[str]) -> set[Node]:
    """Fake quants that an op with a trained parameter reads or feeds; all of them where every parameter is trained."""
    parameters = {name for name, _ in graph.named_parameters()}
    if parameters <= set(trained):
        return set(graph.graph.nodes)
    owned = {node for node in graph.graph.nodes if node.op == "get_attr" and str(node.target) in trained}
    readers = {user for node in owned for user in node.users}
    ops = {user for node in readers if node.op == "call_module" for user in node.users} | readers
    return {near for op in ops for near in (*op.all_input_nodes, *op.users)}


def settle_ranges(graph: GraphModule) -> None:
    """Let activations keep what they have learned as constants. Weights keep theirs when they are frozen."""
    for name, module in list(graph.named_modules()):
        if isinstance(module, LearnedActivationFakeQuantize):
            graph.set_submodule(name, module.settled())


class LearnedWeightFakeQuantize(WeightFakeQuantize):
    """Fake quant of a weight whose scale is base_scale * range_ratio.

    Attributes:
        base_scale: float32 buffer, compact: what the range rule gave, carried from width to width.
        range_ratio: trained, shaped like it.
    """

    base_scale: Tensor

    def __init__(self, spec: QuantSpec, role: Role, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__(spec, role, scale_shape)
        self.register_buffer("base_scale", torch.ones(scale_shape))
        self.range_ratio = nn.Parameter(torch.ones(scale_shape))

    @classmethod
    def of(cls, module: WeightFakeQuantize) -> LearnedWeightFakeQuantize | None:
        """The same, learning; None where the range cannot be learned."""
        if not module.spec.symmetric or module.role != "weight":
            return None
        made = cls(module.spec, module.role, module.scale_shape).to(module.scale.device)
        made.least_scale.copy_(module.least_scale)
        made.scale.copy_(module.scale)
        if module.fitted_bit_width is not None:  # clip ratios stay those of calibration, whatever the weight is by now
            made.base_scale.copy_(module.scale)
            made.fitted_bit_width = module.fitted_bit_width
        return made

    def to_config(self) -> dict[str, Any]:
        return super().to_config() | {"fitted_bit_width": self.fitted_bit_width}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LearnedWeightFakeQuantize:
        module = cls(QuantSpec(**config["spec"]), config["role"], tuple(config["scale_shape"]))
        module.frozen, module.fitted_bit_width = config["frozen"], config["fitted_bit_width"]
        return module

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled or self.frozen or torch.compiler.is_exporting():
            return super().forward(weight)
        self.update_range(weight.detach())
        spec = self.spec
        values = quantizer.grouped(weight, spec.group_size)
        step = self._broadcast(self._learned_scale(), weight)
        elements = weight.numel() / self.scale.numel()
        rounded = quantizer.learned_step(values, step, spec.quant_min, spec.quant_max, elements)
        return rounded.view(weight.shape)

    @torch.no_grad()
    def update_range(self, weight: Tensor) -> None:
        if self.fitted_bit_width != self.spec.bit_width:
            self._carry_over(weight)
        self.scale = self._learned_scale().detach()

    def _learned_scale(self) -> Tensor:
        ratio = self.range_ratio.clamp(min=LEAST_RATIO)
        return torch.maximum(self.base_scale * ratio, self.least_scale)

    def _carry_over(self, weight: Tensor) -> None:
        """Take the base to the width, see the module's docstring."""
        fitted = self._fitted_scale(weight, self.spec.bit_width)
        if self.fitted_bit_width is not None:
            fitted = self.base_scale * (fitted / self._fitted_scale(weight, self.fitted_bit_width))
        self.base_scale = fitted
        self.fitted_bit_width = self.spec.bit_width

    def _fitted_scale(self, weight: Tensor, bit_width: float) -> Tensor:
        """The scale that the range rule gives at a width."""
        rule = WeightFakeQuantize(self.spec.with_bit_width(bit_width), self.role, self.scale_shape).to(weight.device)
        rule.least_scale = self.least_scale
        rule.update_range(weight)
        return rule.scale


class LearnedActivationFakeQuantize(ActivationFakeQuantize):
    """Fake quant of an activation with scale base_scale * range_ratio and, with `offset`, a learned zero point.

    Attributes:
        base_scale, base_zero_point: float32 buffers, scalars: what calibration found.
        range_ratio: trained, scalar.
        range_shift: trained, scalar: how far the zero point moved, in shares of the code range. Only with `offset`.
    """

    base_scale: Tensor
    base_zero_point: Tensor

    def __init__(
        self, spec: QuantSpec, role: Role = "activation", scale_shape: tuple[int, ...] = (), offset: bool = False
    ) -> None:
        super().__init__(spec, role, scale_shape)
        self.offset = offset and not spec.symmetric
        self.register_buffer("base_scale", torch.ones(scale_shape))
        self.register_buffer("base_zero_point", torch.zeros(scale_shape))
        self.range_ratio = nn.Parameter(torch.ones(scale_shape))
        self.range_shift = nn.Parameter(torch.zeros(scale_shape)) if self.offset else None

    @classmethod
    def of(cls, module: ActivationFakeQuantize, offset: bool) -> LearnedActivationFakeQuantize | None:
        """The same, learning; None where the range cannot be learned."""
        if module.spec.dynamic or module.spec.range_max is not None:
            return None
        made = cls(module.spec, module.role, module.scale_shape, offset).to(module.scale.device)
        made.base_scale.copy_(module.scale)
        made.base_zero_point.copy_(module.zero_point)
        made.update_range()
        return made

    def settled(self) -> ActivationFakeQuantize:
        """A plain fake quant with what was learned."""
        self.update_range()
        plain = ActivationFakeQuantize(self.spec, self.role, self.scale_shape).to(self.scale.device)
        plain.scale.copy_(self.scale)
        plain.zero_point.copy_(self.zero_point)
        return plain

    def to_config(self) -> dict[str, Any]:
        return super().to_config() | {"offset": self.offset}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LearnedActivationFakeQuantize:
        shape = tuple(config["scale_shape"])
        return cls(QuantSpec(**config["spec"]), config["role"], shape, config["offset"])

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None or not self.enabled or torch.compiler.is_exporting():
            return super().forward(x)
        self.update_range()
        spec = self.spec
        scale, zero_point = self._learned_scale(), self._learned_zero_point()
        return quantizer.learned_step(x, scale, spec.quant_min, spec.quant_max, x.numel(), zero_point)

    @torch.no_grad()
    def update_range(self) -> None:
        """Put what is learned into the buffers that biases and exports read."""
        self.scale = self._learned_scale().detach()
        self.zero_point = self._learned_zero_point().detach().to(torch.int32)
        self._forget()

    def _learned_scale(self) -> Tensor:
        return self.base_scale * self.range_ratio.clamp(min=LEAST_RATIO)

    def _learned_zero_point(self) -> Tensor:
        """Float, of integer value, with a straight-through gradient to the shift."""
        if self.range_shift is None:
            return self.base_zero_point
        lowest, highest = self.spec.quant_min, self.spec.quant_max
        exact = self.base_zero_point + self.range_shift * (highest - lowest)
        rounded = quantizer.centre(exact.detach().round().clamp(lowest, highest), self.spec)
        passed: Tensor = _RoundedAs.apply(exact, rounded)  # type: ignore[no-untyped-call]
        return passed


class _RoundedAs(torch.autograd.Function):
    """A value in place of another, whose gradient passes to the other."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


LEARNED = {options.name: options for options in (Lsq, LsqPlus)}
