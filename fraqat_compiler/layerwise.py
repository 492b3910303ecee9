"""Layer-wise comparison: which op of a file, or of a target, computes something else than the one that it stands for?

At the end of a deep net a distance says little: a sum that ends near the middle between two codes goes to either side
by the rounding of float32, and the ops behind it carry that step on. Here each op gets the very inputs that its
counterpart had, so that it strays by itself or not at all.

The tensors compared are those that have a quantizer. `export-onnx` names the codes in the file after the fake quant:
`linear_3_q` holds those of `fake_quant.linear_3`, with the scale `linear_3_scale`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, numpy_helper, shape_inference
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import parity, qdq
from fraqat_compiler.calibration import Batch, run_batch
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.ops import module_path, op_name
from fraqat_compiler.parity import LSB_ROUNDING, LSB_TOLERANCE, Parity
from fraqat_compiler.target import Arrays, Target

LARGEST = 2_000_000_000  # bytes of codes of one batch; they are in memory together
SLOPE_TOLERANCE, LEAST_COSINE = 0.05, 0.99  # beyond them an op does not round differently, it computes something else
_COPY = "model.onnx"
_REPEATING = ("Reshape", qdq.QUANTIZE, qdq.DEQUANTIZE)  # between an op and the quantizer of its result


@dataclass(frozen=True)
class InnerTensor:
    """A tensor of a file that has a quantizer.

    Attributes:
        name: of its fake quant, without `fake_quant.`.
        codes: name of its codes in the file.
        scale, zero_point: its grid.
        node, op: name and type of the node that computes it; the input's own name and `input` where none does.
    """

    name: str
    codes: str
    scale: float
    zero_point: int
    node: str
    op: str

    def values(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """What DequantizeLinear makes of the codes."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class LayerDistance:
    """How far the results of one op lie apart.

    Attributes:
        name: the module that the op belongs to, or the node.
        op: what it computes.
        tensor: its result, by the name of the fake quant.
        max_lsb, mean_lsb, cosine, slope: as in `Parity`, both sides having the same inputs.
        path_max_lsb: greatest distance with all that strayed before; None where it was not measured.
    """

    name: str
    op: str
    tensor: str
    max_lsb: float
    mean_lsb: float
    cosine: float
    slope: float
    path_max_lsb: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"is_wrong": self.is_wrong}

    @property
    def strays(self) -> bool:
        """Whether rounding cannot explain it: more than one step."""
        return self.max_lsb > LSB_TOLERANCE + LSB_ROUNDING

    @property
    def is_wrong(self) -> bool:
        """Whether it is another function, as hardware that computes an op wrongly is."""
        return abs(self.slope - 1) > SLOPE_TOLERANCE or self.cosine < LEAST_COSINE


def summary(layers: Sequence[LayerDistance]) -> dict[str, Any]:
    """The report's key `parity.layerwise`: how far ops are apart, and the one that strays first, or else furthest."""
    if not layers:
        return {"max_lsb": None, "mean_lsb": None, "node": None, "op": None, "strays": 0, "tensors": 0}
    furthest = max(layers, key=lambda layer: layer.max_lsb)
    straying = [layer for layer in layers if layer.strays]
    named = straying[0] if straying else furthest
    return {
        "max_lsb": furthest.max_lsb,
        "mean_lsb": float(np.mean([layer.mean_lsb for layer in layers])),
        "node": named.name,
        "op": named.op,
        "strays": len(straying),
        "tensors": len(layers),
    }


# The fake-quantized graph against its file


def compare_file(graph: GraphModule, batch: Batch, model: Path, feeds: Arrays) -> list[LayerDistance]:
    """Compare each op of a frozen graph with what ONNX Runtime, all optimizations off, makes of it in the file.

    Args:
        graph: the fake-quantized graph from which the file was lowered.
        batch, feeds: the same inputs for the graph and for the file.
        model: the file.

    Returns:
        The ops in the order of the graph; none where their results would not fit into memory together (`LARGEST`).
    """
    if _code_bytes(graph) > LARGEST:
        return []
    tensors = inner_tensors(_structure(model))
    with _copied(model, tensors) as copy:
        computed = parity.onnx_runner(copy, optimized=False)(feeds)
    return compare_graph(graph, batch, {tensor.name: tensor.values(computed[tensor.codes]) for tensor in tensors})


def compare_graph(graph: GraphModule, batch: Batch, values: Mapping[str, NDArray[Any]]) -> list[LayerDistance]:
    """Run a graph in which each op computes from `values`, and compare its result with theirs.

    Args:
        values: quantized tensors by the name of their fake quant, without `fake_quant.`; in the order of elements that
            the graph has, whatever their shape. What is not among them keeps the graph's own values.
    """
    distances: list[LayerDistance] = []
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    hooks = []
    for name, module in _activations(graph):
        actual = values.get(name.removeprefix("fake_quant."))
        if actual is not None:
            hooks.append(module.register_forward_hook(_replacing(nodes[name], torch.from_numpy(actual), distances)))
    try:
        with torch.no_grad():
            run_batch(graph, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return distances


def _activations(graph: GraphModule) -> Iterator[tuple[str, ActivationFakeQuantize]]:
    return ((name, m) for name, m in graph.named_modules() if isinstance(m, ActivationFakeQuantize))


def _code_bytes(graph: GraphModule) -> int:
    """Bytes that the codes of all activations take."""
    shapes = {str(node.target): node.meta["val"].shape for node in graph.graph.find_nodes(op="call_module")}
    return sum(shapes[name].numel() * int(module.spec.bit_width) // 8 for name, module in _activations(graph))


def _replacing(node: Node, actual: Tensor, distances: list[LayerDistance]) -> Callable[..., Tensor]:
    """A forward hook: note how far a fake quant's result is from `actual`, and let the graph go on with that."""

    def hook(module: ActivationFakeQuantize, _: Any, expected: Tensor) -> Tensor:
        found = parity.measure(expected.numpy(), actual.numpy(), float(module.scale))
        distances.append(_distance(*_origin(node), str(node.target).removeprefix("fake_quant."), found))
        return actual.reshape(expected.shape)

    return hook


def _origin(node: Node) -> tuple[str, str]:
    """The user's module and the op whose result a fake quant rounds."""
    source = node.args[0]
    assert isinstance(source, Node)
    return module_path(source) or source.name, op_name(source)


def _distance(name: str, op: str, tensor: str, found: Parity, path: Parity | None = None) -> LayerDistance:
    max_lsb, mean_lsb = found.max_lsb or 0.0, found.mean_lsb or 0.0
    path_max_lsb = path.max_lsb if path else None
    return LayerDistance(name, op, tensor, max_lsb, mean_lsb, found.cosine, found.slope, path_max_lsb)


# A target against the file


def compare_target(model: Path, target: Target, feeds: Arrays) -> list[LayerDistance]:
    """Compare each op of a file on a target with ONNX Runtime, all optimizations off, on the inputs it had there.

    A copy of the file whose inner tensors are outputs is compiled for the target. That may keep the target from fusing
    ops, so what it computes can differ in rounding from the artifact of the file itself.

    Args:
        model: the file.
        target: where it is compiled and run.
        feeds: inputs.

    Returns:
        The ops in the order of the file.

    Raises:
        TargetError: the copy cannot be compiled or run.
    """
    tensors = inner_tensors(_structure(model))
    with _copied(model, tensors) as copy:
        artifact_folder = copy.parent / "target"
        artifact_folder.mkdir()
        actual = target.run(target.compile(copy, artifact_folder), feeds)
        path = parity.onnx_runner(copy, optimized=False)(feeds)
    given = {_given(tensor.codes): actual[tensor.codes] for tensor in tensors}
    with _copied(model, tensors, restart=True) as copy:
        alone = parity.onnx_runner(copy, optimized=False)(feeds | given)
    return [
        _distance(
            tensor.node,
            tensor.op,
            tensor.name,
            _measured(tensor, alone, actual),
            _measured(tensor, path, actual),
        )
        for tensor in tensors
    ]


def _measured(tensor: InnerTensor, reference: Arrays, actual: Arrays) -> Parity:
    first, second = (tensor.values(arrays[tensor.codes]) for arrays in (reference, actual))
    return parity.measure(first, second, tensor.scale)


# Files with their inner tensors as outputs


def inner_tensors(model: ModelProto) -> list[InnerTensor]:
    """The tensors of a file that have a fake quant, in the order of the file.

    Pairs that `share-qdq` put around ops that only move or bound values repeat codes, and are left out.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    return [
        _inner_tensor(node, constants, producers)
        for node in model.graph.node
        if node.op_type == qdq.QUANTIZE
        and node.input[0] not in constants
        and node.output[0].removesuffix("_q") == node.input[1].removesuffix("_scale")
    ]


def _inner_tensor(
    node: NodeProto, constants: Mapping[str, onnx.TensorProto], producers: Mapping[str, NodeProto]
) -> InnerTensor:
    scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    source = producers.get(node.input[0])
    while source is not None and source.op_type in _REPEATING and source.input[0] in producers:
        source = producers[source.input[0]]
    return InnerTensor(
        name=node.output[0].removesuffix("_q"),
        codes=node.output[0],
        scale=float(scale),
        zero_point=int(zero_point),
        node=source.name if source else node.input[0],
        op=source.op_type if source else "input",
    )


def _structure(model: Path) -> ModelProto:
    return onnx.load(model, load_external_data=False)


def _given(codes: str) -> str:
    return f"{codes}_given"


@contextmanager
def _copied(model: Path, tensors: Sequence[InnerTensor], *, restart: bool = False) -> Iterator[Path]:
    """A copy of a file whose inner codes are outputs; with `restart`, whose ops read other codes, that are inputs."""
    proto = _structure(model)
    proto.graph.output.extend(ValueInfoProto(name=tensor.codes) for tensor in tensors)
    proto = shape_inference.infer_shapes(proto)
    if restart:
        _read_given(proto, {tensor.codes for tensor in tensors})
    outside = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    with tempfile.TemporaryDirectory() as folder:
        for name in outside:
            _place(model.parent / name, Path(folder) / name)
        copy = Path(folder) / _COPY
        copy.write_bytes(proto.SerializeToString())
        yield copy


def _read_given(proto: ModelProto, codes: Set[str]) -> None:
    for value in [output for output in proto.graph.output if output.name in codes]:
        proto.graph.input.append(value)
        proto.graph.input[-1].name = _given(value.name)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name in codes:
                node.input[index] = _given(name)


def _place(file: Path, to: Path) -> None:
    """Weights that lie outside are large: a second name for them where the file system lets us."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
