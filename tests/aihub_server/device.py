"""What AI Hub does with a model: the HTP target's compiler and emulator, on one model at a time."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import onnx
from numpy.typing import NDArray
from qai_hub import public_api_pb2 as api

from fraqat_compiler.target import Arrays, Artifact
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.target import BINARY_FILE, CONTEXT_FILE

_ONE_AT_A_TIME = threading.Lock()
Columns = dict[str, list[NDArray]]


def compiled(model: bytes, is_folder: bool, device: str, name: str) -> bytes:
    """An archive with a precompiled model, under file names of AI Hub's own choice.

    The library names its graphs after the path of the model, so that the same content goes to the same place.
    """
    place = Path(tempfile.gettempdir()) / f"aihub-server-{hashlib.sha256(model).hexdigest()}"
    with _ONE_AT_A_TIME, tempfile.TemporaryDirectory() as output:
        try:
            HtpTarget(soc=device).compile(_written(model, is_folder, place), Path(output))
        finally:
            shutil.rmtree(place)
        return _archive(Path(output), name)


def _written(model: bytes, is_folder: bool, folder: Path) -> Path:
    """The ONNX file of an upload."""
    if is_folder:
        zipfile.ZipFile(io.BytesIO(model)).extractall(folder)
    else:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(model)
    (path,) = (path for path in folder.rglob("*.onnx") if path.is_file())
    return path


def _archive(folder: Path, name: str) -> bytes:
    content = io.BytesIO()
    wrapper = onnx.load(folder / CONTEXT_FILE)
    _refer(wrapper, f"{name}.bin")
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"{name}.onnx/{name}.onnx", wrapper.SerializeToString())
        archive.writestr(f"{name}.onnx/{name}.bin", (folder / BINARY_FILE).read_bytes())
    return content.getvalue()


def _refer(wrapper: onnx.ModelProto, binary: str) -> None:
    for attribute in (attribute for node in wrapper.graph.node for attribute in node.attribute):
        if attribute.name == "ep_cache_context":
            attribute.s = binary.encode()


def ran(model: bytes, device: str, inputs: Columns) -> Columns:
    """Outputs for each sample."""
    with _ONE_AT_A_TIME, tempfile.TemporaryDirectory() as folder:
        target, artifact = _loaded(model, device, Path(folder))
        results = [target.run(artifact, sample) for sample in _samples(inputs)]
    return {name: [result[name] for result in results] for name in results[0]}


def profiled(model: bytes, device: str, inputs: Columns) -> api.ProfileDetail:
    """A profile as AI Hub gives it: microseconds of the emulator's run, and the cycles that it counts."""
    with _ONE_AT_A_TIME, tempfile.TemporaryDirectory() as folder:
        target, artifact = _loaded(model, device, Path(folder))
        sample = _samples(inputs)[0]
        start = time.perf_counter()
        target.run(artifact, sample)
        microseconds = round(1e6 * (time.perf_counter() - start))
        ops = target.profile(artifact, sample).ops
    detail = api.ProfileDetail(
        major_version=1, minor_version=2, execution_time=microseconds, all_execution_times=[microseconds]
    )
    detail.execution_memory.peak.lower, detail.execution_memory.peak.upper = 1_000_000, 2_000_000
    for op in ops:
        detail.layer_details.add(
            name=op["name"], layer_type_name="op", compute_unit=api.COMPUTE_UNIT_NPU, execution_cycles=op["cycles"]
        )
    return detail


def _loaded(model: bytes, device: str, folder: Path) -> tuple[HtpTarget, Artifact]:
    path = _written(model, True, folder / "upload")
    (binary,) = path.parent.glob("*.bin")
    wrapper = onnx.load(path)
    _refer(wrapper, BINARY_FILE)
    onnx.save(wrapper, folder / CONTEXT_FILE)
    binary.rename(folder / BINARY_FILE)
    target = HtpTarget(soc=device)
    return target, target.load(folder, "")


def _samples(inputs: Columns) -> list[Arrays]:
    count = len(next(iter(inputs.values())))
    return [{name: arrays[index] for name, arrays in inputs.items()} for index in range(count)]
