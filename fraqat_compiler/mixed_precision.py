"""Mixed precision: what the layers may choose from, what the budget allows, and the widths that come out."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.auto_widths import AutoRequest, AutoWidths, parse_size
from fraqat_compiler.bit_assignment import Choice, least_loss
from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.layers import demanded_bytes, quantizer_bytes
from fraqat_compiler.ops import module_path
from fraqat_compiler.report import format_bytes
from fraqat_compiler.sensitivity import Sensitivities
from fraqat_compiler.widths import Widths

Insert = Callable[[str], GraphModule]
ROUNDING = 1e-9  # of a mean times a number of weights


@dataclass(frozen=True)
class Weight:
    """One tensor.

    Attributes:
        elements: how many.
        quantizers: what the target makes of each width that is asked for.
    """

    elements: int
    quantizers: Mapping[float, WeightFakeQuantize]

    def bits(self, width: float) -> float:
        return self.quantizers[width].spec.bit_width * self.elements

    def bytes(self, width: float) -> int:
        return quantizer_bytes(self.quantizers[width], self.elements)


@dataclass(frozen=True)
class Layer:
    """The weights that one of the user's modules holds; they have one width.

    Attributes:
        name: of the module; empty for the model itself.
        weights: by tensor name.
        fixed: why it has no choice; empty where it has one.
    """

    name: str
    weights: Mapping[str, Weight]
    fixed: str

    @property
    def parameters(self) -> int:
        return sum(weight.elements for weight in self.weights.values())

    def bits(self, width: float) -> float:
        """Bits of all its weights when `width` is asked for; the target may make it another."""
        return sum(weight.bits(width) for weight in self.weights.values())

    def bytes(self, width: float) -> int:
        """The same in a file: codes in the type that holds them, scales and zero points."""
        return sum(weight.bytes(width) for weight in self.weights.values())

    def width(self, width: float) -> float:
        """Width that comes of asking for one, the mean where its tensors differ."""
        return self.bits(width) / self.parameters

    def loss(self, sensitivities: Sensitivities, width: float) -> float:
        """Predicted loss of its weights at a width."""
        return sum(sensitivities[name][width] for name in self.weights)


@dataclass(frozen=True)
class Plan:
    """The layers and their choices, before anything is measured.

    Attributes:
        auto: what was asked for.
        pins: text of the widths that stay as given.
        layers: in the order of the graph.
        other_bytes: what the file holds besides their codes and scales.
    """

    auto: AutoWidths
    pins: str
    layers: tuple[Layer, ...]
    other_bytes: int

    @cached_property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def candidates(self) -> dict[str, Mapping[float, WeightFakeQuantize]]:
        """Quantizers of each tensor by the width asked for."""
        return {name: weight.quantizers for layer in self.layers for name, weight in layer.weights.items()}

    def mean_bits(self, widths: Mapping[str, float]) -> float:
        """Of all quantized weights, when each layer is asked for its entry of `widths`."""
        return sum(layer.bits(widths[layer.name]) for layer in self.layers) / self.parameters

    def bytes(self, widths: Mapping[str, float]) -> int:
        """Of all tensors of the file."""
        return sum(layer.bytes(widths[layer.name]) for layer in self.layers) + self.other_bytes

    def uniform(self, width: float) -> dict[str, float]:
        """The same width for every layer that may choose."""
        return dict.fromkeys((layer.name for layer in self.layers), width)

    def quantizers(self, widths: Mapping[str, float]) -> dict[str, WeightFakeQuantize]:
        """The quantizer of each tensor under an assignment."""
        return {
            name: weight.quantizers[widths[layer.name]]
            for layer in self.layers
            for name, weight in layer.weights.items()
        }

    def assign(self, sensitivities: Sensitivities) -> dict[str, float]:
        """The width to ask for by layer name, so that the predicted loss is least within the budget."""
        choices = [
            [Choice(self._cost(layer, width), layer.loss(sensitivities, width)) for width in self.auto.widths]
            for layer in self.layers
        ]
        picks = least_loss(choices, self._budget)
        return {layer.name: self.auto.widths[pick] for layer, pick in zip(self.layers, picks, strict=True)}

    def text(self, widths: Mapping[str, float]) -> str:
        """Text of the option `weights` that gives every layer its width, the outer modules first."""
        default, overrides = widths.get("", self.auto.lowest), list[tuple[str, float | None]]()
        for layer in sorted(self.layers, key=lambda layer: layer.name.count(".")):
            if not layer.fixed and Widths(default, tuple(overrides)).of(layer.name) != widths[layer.name]:
                overrides.append((glob.escape(layer.name), widths[layer.name]))
        parts = [f"{pattern}={width:g}" for pattern, width in overrides]
        return ",".join([f"{default:g}", *parts, *([self.pins] if self.pins else [])])

    # The budget

    def _cost(self, layer: Layer, width: float) -> float:
        return layer.bits(width) if self.auto.mean_bits is not None else layer.bytes(width)

    @property
    def _budget(self) -> float:
        if self.auto.mean_bits is not None:
            return self.auto.mean_bits * self.parameters * (1 + ROUNDING)
        assert self.auto.size is not None
        return parse_size(self.auto.size) - self.other_bytes

    def refuse_impossible(self) -> None:
        """Refuse what no assignment could do, or what needs none.

        Raises:
            UsageError: no layer has a choice, a width that no layer gets, or a budget that none or all would meet.
        """
        free = [layer for layer in self.layers if not layer.fixed]
        if not free:
            raise UsageError("--weights auto finds no layer that may choose its width.", _ways_to_choose(self.layers))
        for width in self.auto.widths:
            if not any(math.isclose(layer.width(width), width) for layer in free):
                raise UsageError(
                    f"the target gives no layer {width:g} bits: of {free[0].name or 'the model'} it makes "
                    f"{free[0].width(width):g}.",
                    "Leave that width out of --weights auto.",
                )
        self._refuse_idle_budget()

    def _refuse_idle_budget(self) -> None:
        sums = [
            sum(pick(self._cost(layer, w) for w in self.auto.widths) for layer in self.layers) for pick in (min, max)
        ]
        if self._budget < sums[0]:
            raise UsageError(
                f"{self.asked} is too little: with every layer at its lowest width it is {self._in_words(sums[0])}.",
                "Give more, offer lower widths (widths=3,4,8), or pin fewer layers.",
            )
        if self._budget > sums[1] * (1 + 2 * ROUNDING):
            raise UsageError(
                f"{self.asked} is more than the {self._in_words(sums[1])} that every layer's highest width takes.",
                f"Then --weights {self.auto.highest:g} says it all.",
            )

    @property
    def asked(self) -> str:
        """The budget as it was asked for."""
        return f"mean-bits={self.auto.mean_bits:g}" if self.auto.mean_bits is not None else f"size={self.auto.size}"

    def _in_words(self, cost: float) -> str:
        if self.auto.mean_bits is not None:
            return f"{cost / self.parameters:.4g}"
        return format_bytes(cost + self.other_bytes)


def _ways_to_choose(layers: tuple[Layer, ...]) -> str:
    reasons = sorted({layer.fixed for layer in layers})
    return (
        f"They are fixed: {'; '.join(reasons)}." if reasons else "The model has no weights that the target quantizes."
    )


def make_plan(request: AutoRequest, rules: str, insert: Insert) -> Plan:
    """Ask the target about every layer at every width.

    Args:
        request: the option `weights`.
        rules: text of widths by module that the compiler itself sets, before the user's pins; may be empty.
        insert: the float graph with fake quants for a text of the option `weights`.

    Raises:
        UsageError: as `Plan.refuse_impossible`, or a pin that matches no module.
    """
    pins = ",".join(text for text in (rules, request.pins) if text)
    auto = request.auto
    whole = AutoRequest(auto, pins)
    graphs = {width: insert(whole.uniform(width)) for width in auto.widths}
    users_own, all_pins = (Widths.parse(item.uniform(auto.lowest)) for item in (request, whole))

    def fixed(name: str, weights: Mapping[str, Weight]) -> str:
        if users_own.overrides_module(name):
            return "pinned by --weights"
        if all_pins.overrides_module(name):
            return f"a low-rank branch has {all_pins.of(name):g} bits"
        return _fixed_by_target(weights)

    grouped = _weights_by_module(graphs)
    layers = tuple(Layer(name, weights, fixed(name, weights)) for name, weights in grouped.items())
    weight_bytes = sum(layer.bytes(auto.lowest) for layer in layers)
    plan = Plan(auto, pins, layers, demanded_bytes(graphs[auto.lowest]) - weight_bytes)
    plan.refuse_impossible()
    return plan


def _fixed_by_target(weights: Mapping[str, Weight]) -> str:
    specs = [{quantizer.spec for quantizer in weight.quantizers.values()} for weight in weights.values()]
    if any(len(found) > 1 for found in specs):
        return ""
    bits = sorted({spec.bit_width for found in specs for spec in found})
    return f"the target takes {' and '.join(f'{width:g}' for width in bits)} only"


def _weights_by_module(graphs: Mapping[float, GraphModule]) -> dict[str, dict[str, Weight]]:
    """Weight quantizers of graphs that differ in the width asked for, by the user's module and tensor name."""
    found: dict[str, dict[str, dict[float, WeightFakeQuantize]]] = {}
    for width, graph in graphs.items():
        for module, name, quantizer in _owned_weights(graph):
            found.setdefault(module, {}).setdefault(name, {})[width] = quantizer
    _refuse_floats(found, graphs)
    first = next(iter(graphs.values()))
    return {
        module: {name: Weight(fx_graph.get_tensor(first, name).numel(), by_width) for name, by_width in tensors.items()}
        for module, tensors in found.items()
    }


def _refuse_floats(
    found: Mapping[str, Mapping[str, Mapping[float, WeightFakeQuantize]]], widths: Collection[float]
) -> None:
    """Refuse a width at which the target leaves a weight in float that it quantizes at another."""
    for module, tensors in found.items():
        floats = [width for by_width in tensors.values() for width in widths if width not in by_width]
        if floats:
            raise UsageError(
                f"the target leaves {module or 'the model'} in float when it is asked for {floats[0]:g} bits.",
                "Leave that width out of --weights auto, or pin the layer by name.",
            )


def _owned_weights(graph: GraphModule) -> Iterator[tuple[str, str, WeightFakeQuantize]]:
    """(module of the first op that reads it, tensor, quantizer) for every weight; that module decides on a tied one."""
    taken: set[str] = set()
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            quantizer = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
            if not isinstance(quantizer, WeightFakeQuantize) or quantizer.role != "weight" or source.name in taken:
                continue
            taken.add(source.name)
            yield module_path(node), str(source.args[0].target), quantizer
