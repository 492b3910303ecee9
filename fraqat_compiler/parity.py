"""Parity: how far a file's outputs, or a target's, are from the fake-quantized torch graph's, on the same inputs.

Distances are counted in LSB, steps of the output's own quantizer: cosine alone hides a wrong slope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fraqat_compiler.calibration import Batch, in_signature_order, input_values
from fraqat_compiler.errors import VerificationError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.ops import is_pass_through
from fraqat_compiler.target import Arrays

Runner = Callable[[Arrays], Arrays]
# Rounding of float32 sums differs between kernels; a value at a tie may fall to either side, never further.
LSB_TOLERANCE = 1.0
# A step of a 16-bit quantizer is this well known: its values are float32 products of a code and the scale.
LSB_ROUNDING = 0.01


@dataclass(frozen=True)
class Parity:
    """Distance between two sets of outputs.

    Attributes:
        max_lsb: greatest distance in steps of the output's quantizer; None where no output has one.
        mean_lsb: mean distance in steps; None likewise.
        max_abs: greatest absolute distance.
        cosine: least cosine between two outputs.
        slope: least-squares factor from reference to actual, of the output where it is furthest from 1.
        samples: inputs compared.
    """

    max_lsb: float | None
    mean_lsb: float | None
    max_abs: float
    cosine: float
    slope: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(references: Sequence[Arrays], actuals: Sequence[Arrays], scales: Mapping[str, float | None]) -> Parity:
    """Compare outputs by name over several inputs.

    Args:
        references, actuals: one mapping of output name to array for each input.
        scales: step of each output's quantizer; None for a float output.

    Raises:
        VerificationError: a missing output, another shape, or NaN where the reference has none.
    """
    parts = [
        measure(reference[name], _output(actual, name, reference[name]), scales.get(name))
        for reference, actual in zip(references, actuals, strict=True)
        for name in reference
        if np.issubdtype(reference[name].dtype, np.floating)
    ]
    steps = [part.max_lsb for part in parts if part.max_lsb is not None]
    means = [part.mean_lsb for part in parts if part.mean_lsb is not None]
    return Parity(
        max_lsb=max(steps) if steps else None,
        mean_lsb=float(np.mean(means)) if means else None,
        max_abs=max((part.max_abs for part in parts), default=0.0),
        cosine=min((part.cosine for part in parts), default=1.0),
        slope=max((part.slope for part in parts), key=lambda slope: abs(slope - 1), default=1.0),
        samples=len(references),
    )


def _output(actual: Arrays, name: str, reference: Any) -> Any:
    if name not in actual:
        raise VerificationError(f"output {name!r} is missing; there are {', '.join(actual)}.")
    if actual[name].shape != reference.shape:
        raise VerificationError(f"output {name!r} has shape {actual[name].shape} instead of {reference.shape}.")
    if np.isnan(actual[name]).any() and not np.isnan(reference).any():
        raise VerificationError(f"output {name!r} holds NaN where the reference has none.")
    return actual[name]


def measure(reference: NDArray[Any], actual: NDArray[Any], scale: float | None) -> Parity:
    """Compare one array with its reference; their elements in the same order."""
    first, second = reference.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    distance = np.abs(first - second)
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    energy = float(first @ first)
    return Parity(
        max_lsb=float(distance.max(initial=0.0) / scale) if scale else None,
        mean_lsb=float(distance.mean() / scale) if scale and distance.size else None,
        max_abs=float(distance.max(initial=0.0)),
        cosine=float(first @ second) / norms if norms else float(np.array_equal(first, second)),
        slope=float(first @ second) / energy if energy else 1.0,
        samples=1,
    )


def output_scales(graph: GraphModule) -> list[float | None]:
    """Step of the quantizer of each output of a frozen graph, in flattened order; None for a float output."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    leaves = [leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, Node)]
    return [_scale_of(graph, leaf) for leaf in leaves]


def _scale_of(graph: GraphModule, node: Node) -> float | None:
    while is_pass_through(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return float(module.scale) if isinstance(module, ActivationFakeQuantize) and not module.spec.dynamic else None


# The noise floor


def noise_floor(
    graph: GraphModule, batches: Sequence[Batch], outputs: Sequence[Arrays], scales: Mapping[str, float | None]
) -> Parity:
    """Distance of a frozen graph from itself, computed in float64: what the rounding of float32 alone does to outputs.

    A sum that ends near the middle between two codes goes to either side by its rounding; the ops behind it carry the
    step on, and in a deep net outputs move by many.

    Args:
        graph: frozen, with fake quants.
        batches: inputs.
        outputs: what the graph computes from them in float32, by name, in the order of its outputs.
        scales: step of each output's quantizer; None for a float output.
    """
    with torch.no_grad():
        exact = [name_arrays(list(outputs[0]), _in_float64(graph, batch)) for batch in batches]
    return compare(exact, outputs, scales)


def _in_float64(graph: GraphModule, batch: Batch) -> list[Tensor]:
    results = flat_inputs(_InFloat64(graph).run(*input_values(graph, batch), enable_io_processing=False))
    return [result.float() if result.dtype == torch.float64 else result for result in results]


class _InFloat64(Interpreter):
    """Runs a graph in float64 on the weights and biases, and with the grids, that it has in float32."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        wide_args, wide_kwargs = pytree.tree_map_only(Tensor, _widened, (args, kwargs))
        return super().call_function(target, wide_args, wide_kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _widened(super().call_module(target, args, kwargs))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def beyond_noise(distance: Parity, floor: Parity) -> bool:
    """Whether a distance is more than one step at its greatest, and in the mean more than rounding explains.

    Two right implementations are each as far from the exact result as the floor says, so up to twice as far from each
    other. Only the mean is held against it: the greatest is a matter of chance.

    Args:
        distance, floor: of the same inputs.
    """
    if distance.max_lsb is None or distance.mean_lsb is None:
        return False
    return distance.max_lsb > LSB_TOLERANCE + LSB_ROUNDING and distance.mean_lsb > 2 * (floor.mean_lsb or 0.0)


# Inputs and outputs


def input_tensors(graph: GraphModule, batch: Batch) -> list[Tensor]:
    """The tensors of a batch in the order of the graph's inputs."""
    return [leaf for leaf in input_values(graph, batch) if isinstance(leaf, Tensor)]


def flat_inputs(batch: Any) -> list[Tensor]:
    """The tensors of inputs or outputs (tuple, dict or tensor), as they come."""
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def name_arrays(names: Sequence[str], tensors: Sequence[Tensor]) -> Arrays:
    """NumPy arrays by name.

    Raises:
        VerificationError: as many names as tensors are expected.
    """
    if len(names) != len(tensors):
        raise VerificationError(f"the graph has {len(names)} inputs or outputs, {len(tensors)} tensors were given.")
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def onnx_runner(model: Path, *, optimized: bool) -> Runner:
    """A function that runs an ONNX file on the host CPU, with ORT's default graph optimizations or with none.

    Raises:
        VerificationError: onnxruntime refuses the file; from the function: it cannot run it on these inputs.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _onnxruntime_errors(model):
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        with _onnxruntime_errors(model):
            return dict(zip(names, session.run(names, inputs), strict=True))

    return run


@contextmanager
def _onnxruntime_errors(model: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise VerificationError(f"onnxruntime refuses {model.name}: {str(error).splitlines()[0]}.") from error


class TorchRunner:
    """Makes a runner over named arrays callable like the captured model: tensors in, the same structure out.

    Attributes:
        graph: the captured graph whose calling convention is followed.
        runner: what computes.
        inputs, outputs: names of the file's inputs and outputs.
    """

    def __init__(self, graph: GraphModule, runner: Runner, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.runner = runner
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._graph = graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        info = getattr(self._graph.graph._codegen, "pytree_info", None)
        ordered = (args, in_signature_order(self._graph, kwargs))
        results = self.runner(name_arrays(self.inputs, flat_inputs(ordered)))
        tensors = [torch.from_numpy(np.ascontiguousarray(results[name])) for name in self.outputs]
        return pytree.tree_unflatten(tensors, info.out_spec) if info is not None else tensors[0]
