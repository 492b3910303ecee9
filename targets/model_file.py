"""Reading the ONNX file that a target is given, without its weights."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from fraqat_compiler.errors import TargetError


def read_model(path: Path) -> ModelProto:
    """The model; weights that lie in files beside it are not read.

    Raises:
        TargetError: there is none, it is damaged, or it lacks its weights.
    """
    model = _parsed(path)
    lost = [name for name in data_files(model) if not (path.parent / name).is_file()]
    if lost:
        raise TargetError(f"{path.name} needs {lost[0]}, which is not beside it.", "Copy both, or compile again.")
    return model


def _parsed(path: Path) -> ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise TargetError(f"there is no {path.name} in {path.parent.name}.", "Compile the model first.") from error
    except (OSError, DecodeError) as error:
        raise TargetError(f"{path.name} cannot be read as an ONNX model: {error}.", "Compile it again.") from error


def data_files(model: ModelProto) -> list[str]:
    """Names of the files that hold the model's weights, where they are not inside."""
    tensors = model.graph.initializer
    return sorted({str(ExternalDataInfo(tensor).location) for tensor in tensors if uses_external_data(tensor)})
