"""Error-compensated rounding of a whole graph, from its first linear to its last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph, gptq
from fraqat_compiler.calibration import Batch
from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.graph_walk import GraphWalk
from fraqat_compiler.ops import op_name

WIDEST = 8  # bits; above them rounding errors are nothing to make up for
LEAST_ENERGY = 1e-30  # of a layer that computes nothing


@dataclass(frozen=True)
class Gptq:
    """Let the rounding errors of a linear weight make up for each other: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

    The codes of a layer shall minimize ||(W - Q) X||^2 = tr((W - Q) H (W - Q)^T) for its calibration inputs X, with
    H = X X^T. Column after column is rounded, and its error goes off the columns still to come, by
    -e / [H^-1]_jj [H^-1]_j:. It needs no fine-tune, and a fine-tune may start from it. It acts on weights of linear
    layers at up to 8 bits that one op alone reads; convolutions are rounded to nearest.

    Options: `damp`, what is added to the diagonal of H, in means of it.
    """

    name: ClassVar[str] = "gptq"
    damp: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damp <= gptq.MOST_DAMP:
            raise UsageError(f"gptq cannot run with damp={self.damp:g}.", "It lies above 0 and at most 1.")


@dataclass(frozen=True)
class Compensation:
    """What became of one weight.

    Attributes:
        weight: name of the tensor.
        nearest_error: ||(W - Q) X||^2 / ||W X||^2 on the calibration data for rounding to nearest.
        error: the same for what it was left as.
        damp: that its Hessian took.
        reason: why it was left as it was; empty where it was not.
    """

    weight: str
    nearest_error: float
    error: float
    damp: float | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Layer:
    """A linear whose weight is compensated.

    Attributes:
        node: the op.
        source: its input.
        weight: name of the tensor.
        quantizer: of the weight.
    """

    node: Node
    source: Node
    weight: str
    quantizer: WeightFakeQuantize


@torch.no_grad()
def compensate(
    graph: GraphModule, batches: Sequence[Batch], options: Gptq, on_layers: Callable[[int], None] = lambda done: None
) -> list[Compensation]:
    """Give the linear weights of a calibrated graph values whose rounding errors make up for each other.

    The data runs through the quantized graph once, op by op (see `GraphWalk`), so that the Hessian of a layer is that
    of the inputs which the layers before it, compensated already, leave it. There is one Hessian at a time.

    Args:
        graph: its fake quants are calibrated. Weights are exchanged for new tensors: others may share the old ones.
        batches: the calibration data.
        options: see there.
        on_layers: called with the number of layers done.

    Returns:
        One entry for each weight, in the order of the graph.

    Raises:
        DataError: the inputs of a layer are not finite.
    """
    walk, done = GraphWalk(graph, batches), list[Compensation]()
    for layers in _by_input(compensated_layers(graph)):
        walk.advance_to(layers[0].node)
        hessian = _hessian(walk.values_of(layers[0].source), layers[0])
        factor = gptq.factorized(hessian, options.damp)
        done += [_compensate_layer(graph, layer, hessian, factor) for layer in layers]
        on_layers(len(done))
    return done


def compensated_layers(graph: GraphModule) -> list[Layer]:
    """The linears that `compensate` takes, in the order of the graph: those whose weight no other op reads."""
    reads = fx_graph.readers(graph)
    layers = (_layer_of(graph, node) for node in graph.graph.nodes if op_name(node) == "aten.linear")
    return [layer for layer in layers if layer is not None and reads[layer.weight] == 1]


def _layer_of(graph: GraphModule, node: Node) -> Layer | None:
    source, weight = node.args[:2]
    if not isinstance(source, Node) or not isinstance(weight, Node) or weight.op != "call_module":
        return None
    module, tensor = graph.get_submodule(str(weight.target)), weight.args[0]
    if not isinstance(module, WeightFakeQuantize) or module.spec.bit_width > WIDEST or len(weight.users) > 1:
        return None
    return Layer(node, source, str(tensor.target), module) if isinstance(tensor, Node) else None


def _by_input(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Those that read the same tensor together: they have one Hessian."""
    groups: dict[Node, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.source, []).append(layer)
    return list(groups.values())


def _hessian(inputs: Iterable[Tensor], layer: Layer) -> Tensor:
    """X X^T over all batches, float32 (columns, columns)."""
    total = torch.zeros(())
    for tensor in inputs:
        rows = tensor.flatten(0, -2).float()
        total = total.to(rows.device) + rows.T @ rows
    if not torch.isfinite(total).all():
        raise DataError(
            f"the inputs of {layer.weight} are not finite on the calibration data.",
            "Look for NaN or infinite values in the data and the model.",
        )
    return total


def _compensate_layer(graph: GraphModule, layer: Layer, hessian: Tensor, factor: gptq.Factor | None) -> Compensation:
    weight, quantizer = fx_graph.get_tensor(graph, layer.weight).detach(), layer.quantizer
    whole = max(gptq.energy(weight, hessian), LEAST_ENERGY)
    nearest = gptq.energy(quantizer(weight) - weight, hessian) / whole
    if factor is None:
        return Compensation(layer.weight, nearest, nearest, None, "its Hessian has no Cholesky factor")
    made = gptq.compensated(weight, gptq.Grid.of(quantizer, weight), factor)
    error = gptq.energy(quantizer(made) - weight, hessian) / whole
    if not error < nearest:
        return Compensation(layer.weight, nearest, nearest, factor.damp, "rounding to nearest is no worse")
    _exchange(graph, layer.weight, made)
    return Compensation(layer.weight, nearest, error, factor.damp)


def _exchange(graph: GraphModule, name: str, made: Tensor) -> None:
    old = fx_graph.get_tensor(graph, name)
    is_parameter = isinstance(old, nn.Parameter)
    fx_graph.set_tensor(graph, name, nn.Parameter(made, requires_grad=old.requires_grad) if is_parameter else made)
