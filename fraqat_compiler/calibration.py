"""Calibration: activation ranges from data that runs through the float graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fraqat_compiler import fx_graph, quantizer
from fraqat_compiler.errors import DataError, cause_of
from fraqat_compiler.fake_quant import ActivationFakeQuantize, BiasFakeQuantize, FakeQuantize, WeightFakeQuantize

Batch = tuple[Any, ...] | list[Any] | Mapping[str, Any] | torch.Tensor


def run_batch(model: Callable[..., Any], batch: Batch) -> Any:
    """Call a model on a batch: a tuple of positional or a dict of keyword inputs, or one tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, torch.Tensor):
        return model(batch)
    return model(*batch)


def input_values(graph: GraphModule, batch: Batch) -> list[Any]:
    """A batch as the values of the graph's placeholders."""
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, {})
    return pytree.tree_leaves((args, in_signature_order(graph, kwargs)))


def in_signature_order(graph: GraphModule, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order in which they were captured."""
    info = getattr(graph.graph._codegen, "pytree_info", None)
    if info is None or not kwargs:
        return kwargs
    order = info.in_spec.children()[1].context or []
    return {name: kwargs[name] for name in [*order, *(set(kwargs) - set(order))] if name in kwargs}


def calibrate(graph: GraphModule, batches: Iterable[Batch], on_batch: Callable[[int], None] | None = None) -> int:
    """Find the range of every activation, and of every tensor that the graph owns.

    The data runs through the graph in float: no quantizer's error reaches the ranges of the next.

    Args:
        graph: output of `insert-fake-quant`.
        batches: calibration data, each batch as `run_batch` takes it.
        on_batch: called with the number of batches done.

    Returns:
        How many batches ran.

    Raises:
        DataError: no batch, or NaN or infinite values in one (naming batch and tensor).
    """
    activations = {name: m for name, m in graph.named_modules() if isinstance(m, ActivationFakeQuantize)}
    count = 0
    with float_weights(graph), torch.no_grad():
        for module in activations.values():
            module.start_calibration()
        for batch in batches:
            run_observed(graph, batch, count)
            count += 1
            if on_batch:
                on_batch(count)
        if not count:
            raise DataError("the calibration data is empty.", "Let calibration_data() yield at least one batch.")
        for module in activations.values():
            module.finish_calibration()
    leave_room_for_biases(graph)
    update_weight_ranges(graph)
    return count


def run_observed(graph: Callable[..., Any], batch: Batch, index: int) -> Any:
    """`run_batch` on a batch of the calibration data.

    Raises:
        DataError: it does not run, or holds NaN or infinite values; the message names the batch.
    """
    try:
        return run_batch(graph, batch)
    except DataError as error:
        raise DataError(f"calibration batch {index}: {error.message}", error.remedy) from error
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"calibration batch {index} does not run through the captured graph: {cause_of(error)}.",
            "Every batch needs the structure, shapes and types of example_inputs().",
        ) from error


def first_samples(batches: Iterable[Batch], count: int | None) -> Iterator[Batch]:
    """Batches until they hold `count` samples (the first dimension of the first tensor); all of them for None."""
    held = 0
    for batch in batches:
        if count is not None and held >= count:
            return
        yield batch
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        held += tensors[0].shape[0] if tensors else 1


@contextmanager
def float_weights(graph: GraphModule) -> Iterator[None]:
    """Let weights, biases and constants pass in float."""
    owned = [m for m in graph.modules() if isinstance(m, FakeQuantize) and not isinstance(m, ActivationFakeQuantize)]
    for module in owned:
        module.enabled = False
    try:
        yield
    finally:
        for module in owned:
            module.enabled = True


def update_weight_ranges(graph: GraphModule) -> None:
    """Take every weight quantizer's scale from its tensor now, without a forward."""
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, WeightFakeQuantize) and not module.frozen:
            module.update_range(fx_graph.get_tensor(graph, str(node.args[0].target)).detach())


@torch.no_grad()
def leave_room_for_biases(graph: GraphModule) -> None:
    """Raise the least scale of weights under which an int32 bias would saturate, to where it takes half the codes."""
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), BiasFakeQuantize):
            continue
        bias, input_scale, weight_scale = (fx_graph.get_tensor(graph, str(argument.target)) for argument in node.args)
        weight = graph.get_submodule(str(node.args[2].target).removesuffix(".scale"))
        if not isinstance(weight, WeightFakeQuantize):  # a bias in steps of the result
            continue
        needed, wanted = (quantizer.least_weight_scale(bias, input_scale, headroom) for headroom in (1.01, 2.0))
        if not weight_scale.ndim:
            needed, wanted = needed.amax(), wanted.amax()
        weight.least_scale = torch.where(needed > weight.least_scale, wanted, weight.least_scale)
