"""How models travel: what is uploaded to AI Hub, and what comes back as a precompiled ONNX model."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import ModelProto

from fraqat_compiler.errors import TargetError
from fraqat_compiler.manifest import sha256
from fraqat_compiler.targets.model_file import data_files, read_model

CONTEXT_FILE = "aihub_context.onnx"
BINARY_FILE = "aihub_context_qnn.bin"
_BINARY = "ep_cache_context"  # attribute of an EPContext node: the name of the file with its binary


def digest(files: Sequence[Path]) -> str:
    """Hex digest of the contents of several files, in this order."""
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def model_files(model: Path) -> tuple[Path, ...]:
    """An ONNX file and the files with its weights.

    Raises:
        TargetError: one is missing or damaged.
    """
    return (model, *(model.parent / name for name in data_files(read_model(model))))


def packed(files: Sequence[Path], folder: Path) -> Path:
    """What is uploaded: the file itself where it is alone, else an archive of them all in `folder`.

    Quantized weights hardly compress, so that nothing is.
    """
    if len(files) == 1:
        return files[0]
    path = folder / f"{files[0].stem}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, f"{files[0].name}/{file.name}")
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Write the ONNX file and the binary of an archive into `folder` under fixed names, whatever AI Hub calls them.

    Raises:
        TargetError: it is no archive with one of each.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            wrapper = onnx.load_model_from_string(content.read(_only(content, ".onnx")))
            (folder / BINARY_FILE).write_bytes(content.read(_only(content, ".bin")))
    except zipfile.BadZipFile as error:
        raise TargetError(f"AI Hub sent {archive.name}, which is no archive: {error}.") from error
    for node in context_nodes(wrapper):
        for attribute in node.attribute:
            if attribute.name == _BINARY:
                attribute.s = BINARY_FILE.encode()
    onnx.save(wrapper, folder / CONTEXT_FILE)


def _only(content: zipfile.ZipFile, suffix: str) -> str:
    names = [name for name in content.namelist() if name.endswith(suffix)]
    if len(names) != 1:
        raise TargetError(f"AI Hub sent an archive with {len(names)} files *{suffix}, where there is to be one.")
    return names[0]


def context_nodes(wrapper: ModelProto) -> list[onnx.NodeProto]:
    """The nodes that stand for a binary; all others of a precompiled model run on the CPU."""
    return [node for node in wrapper.graph.node if node.op_type == "EPContext"]
