"""The ONNX file of one EPContext node: what the library wrote, and what we note in it beside that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from fraqat_compiler.errors import TargetError
from fraqat_compiler.targets.htp.quantized_io import Codes
from fraqat_compiler.targets.model_file import read_model

METADATA_KEY = "fraqat_compiler"


@dataclass(frozen=True)
class ContextFacts:
    """What is known of a compiled graph.

    Attributes:
        codes: how the codes of its inputs and outputs are meant; none for what is in float.
        weight_bytes: size of the constants in the file that it was compiled from, packed.
        spill_fill_bytes: memory beside the VTCM that its intermediate results need; 0 without the option `spill_fill`.
    """

    codes: Mapping[str, Codes]
    weight_bytes: int
    spill_fill_bytes: int


def weight_bytes(model: ModelProto) -> int:
    """Bytes of all constants of a model, wherever they lie."""
    return sum(map(_packed_bytes, model.graph.initializer))


def _packed_bytes(tensor: TensorProto) -> int:
    """Two 4-bit codes lie in one byte."""
    count: int = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def note(path: Path, codes: Mapping[str, Codes], weights: int) -> None:
    """Write into an EPContext model what it cannot tell by itself."""
    model = onnx.load(str(path), load_external_data=False)
    text = {"weight_bytes": weights, "codes": {name: asdict(code) for name, code in codes.items()}}
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(text))
    onnx.save(model, str(path))


def read_context(path: Path) -> ContextFacts:
    """The facts of an EPContext model.

    Raises:
        TargetError: it is missing, damaged, or not one that `compile` wrote.
    """
    model = read_model(path)
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    nodes = [node for node in model.graph.node if node.op_type == "EPContext"]
    try:
        known = json.loads(texts[0])
        codes = {name: Codes(**fields) for name, fields in known["codes"].items()}
        return ContextFacts(codes, known["weight_bytes"], max(map(_spill_fill_bytes, nodes)))
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        raise TargetError(f"{path.name} is no compiled model, or is damaged.", "Compile again.") from None


def graph_name(path: Path) -> str:
    """The name of an EPContext model's graph in the binary."""
    (node,) = (node for node in read_model(path).graph.node if node.op_type == "EPContext")
    names = [item.s.decode() for item in node.attribute if item.name == "partition_name"]
    return str(names[0] if names else node.name)


def _spill_fill_bytes(node: NodeProto) -> int:
    return next((int(item.i) for item in node.attribute if item.name == "max_size"), 0)
