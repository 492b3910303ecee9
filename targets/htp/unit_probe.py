"""Asking the library about one op at a time, for a failure that names none."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from fraqat_compiler.targets.htp.client import NO_FALLBACK, QnnError, QnnProcess

QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


def failures(model: ModelProto, folder: Path, options: Mapping[str, str]) -> dict[int, QnnError]:
    """What the library says against ops that fail to compile alone, by their place in the graph.

    Args:
        model: with the types of all values, without its external data.
        folder: where the external data lies.
        options: of the provider.
    """
    found: dict[int, QnnError] = {}
    process = QnnProcess()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "unit.onnx"
        for index, unit in units(model, folder):
            onnx.save(unit, str(path))
            try:
                process.load(path, options, NO_FALLBACK)
            except QnnError as error:
                found[index] = error
                process = QnnProcess()  # a failure may leave the library in any state
    return found


def units(model: ModelProto, folder: Path) -> Iterator[tuple[int, ModelProto]]:
    """Each op that reads an input of known type, with the quantizers around it, as a model of its own."""
    graph = _Graph(model)
    for index, node in enumerate(model.graph.node):
        if node.op_type in QDQ:
            continue
        members = {index, *graph.quantizers_before(node), *graph.quantizers_after(node)}
        unit = graph.cut(sorted(members), folder)
        if unit is not None:
            yield index, unit


class _Graph:
    """A model with lookups by name."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._nodes = model.graph.node
        self._values = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producer = {name: index for index, node in enumerate(self._nodes) for name in node.output}
        self._readers: defaultdict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self._nodes):
            for name in node.input:
                self._readers[name].append(index)

    def quantizers_before(self, node: NodeProto) -> Iterator[int]:
        for name in node.input:
            dequantizer = self._producer_of(name, "DequantizeLinear")
            if dequantizer is None:
                continue
            yield dequantizer
            quantizer = self._producer_of(self._nodes[dequantizer].input[0], "QuantizeLinear")
            if quantizer is not None:
                yield quantizer

    def quantizers_after(self, node: NodeProto) -> Iterator[int]:
        for quantizer in self._readers_of(node, "QuantizeLinear"):
            yield quantizer
            yield from self._readers_of(self._nodes[quantizer], "DequantizeLinear")[:1]

    def _producer_of(self, name: str, op: str) -> int | None:
        index = self._producer.get(name)
        return index if index is not None and self._nodes[index].op_type == op else None

    def _readers_of(self, node: NodeProto, op: str) -> list[int]:
        readers = [index for name in node.output for index in self._readers[name]]
        return [index for index in readers if self._nodes[index].op_type == op]

    def cut(self, members: list[int], folder: Path) -> ModelProto | None:
        """A model of these nodes; None when the type of an input is unknown, or when they read constants alone.

        The library takes no graph without inputs; inside the whole one it computes such nodes when it compiles.
        """
        nodes = [self._nodes[index] for index in members]
        made = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in node.input if name}
        free = sorted(read - made - set(self._constants))
        if not free or any(name not in self._values for name in free):
            return None
        inputs = [self._values[name] for name in free]
        outputs = [ValueInfoProto(name=name) for name in sorted(made - read)]
        constants = [_with_data(self._constants[name], folder) for name in sorted(read & set(self._constants))]
        graph = helper.make_graph(nodes, "unit", inputs, outputs, initializer=constants)
        model = self._model
        return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _with_data(tensor: TensorProto, folder: Path) -> TensorProto:
    if not uses_external_data(tensor):
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    load_external_data_for_tensor(copy, str(folder))
    copy.ClearField("data_location")
    del copy.external_data[:]
    return copy
