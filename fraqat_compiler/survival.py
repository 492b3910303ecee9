"""Does a file survive the optimizers that its users run on it? They are run, and their files' outputs compared."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.errors import VerificationError
from fraqat_compiler.target import Arrays

LARGEST = 500_000_000  # bytes; each optimizer holds the file in memory several times
ONNXSLIM_SECONDS = 300


def survey(model: Path, inputs: Sequence[Arrays], scales: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """What each optimizer does to the outputs of `model`, in steps of their quantizers.

    Args:
        model: the file; it stays as it is.
        inputs: what is compared on.
        scales: step of each output's quantizer; None for a float output.

    Returns:
        For each optimizer `name`, `outcome` ("same": bit for bit; "differs"; "breaks"; "not tried"), `max_lsb`, and
        `reason` where it breaks the file or was not tried.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = parity.onnx_runner(model, optimized=False)
        expected = [runner(feeds) for feeds in inputs]
        return [
            _outcome(name, optimize, model, Path(folder) / f"{index}.onnx", inputs, expected, scales)
            for index, (name, optimize) in enumerate(OPTIMIZERS.items())
        ]


def _outcome(
    name: str,
    optimize: Callable[[Path, Path], None],
    model: Path,
    optimized: Path,
    inputs: Sequence[Arrays],
    expected: Sequence[Arrays],
    scales: Mapping[str, float | None],
) -> dict[str, Any]:
    if onnx_io.file_bytes(model) > LARGEST:
        return {"name": name, "outcome": "not tried", "max_lsb": None, "reason": "the file is large"}
    try:
        optimize(model, optimized)
        runner = parity.onnx_runner(optimized, optimized=False)
        distance = parity.compare(expected, [runner(feeds) for feeds in inputs], scales)
    except ModuleNotFoundError as error:
        return {"name": name, "outcome": "not tried", "max_lsb": None, "reason": str(error)}
    except Exception as error:  # whatever a foreign tool, or onnxruntime on what it left, stumbles over
        return {"name": name, "outcome": "breaks", "max_lsb": None, "reason": str(error).splitlines()[0]}
    outcome = "same" if distance.max_abs == 0 else "differs"
    return {"name": name, "outcome": outcome, "max_lsb": distance.max_lsb, "reason": None}


def _onnxruntime(level: ort.GraphOptimizationLevel) -> Callable[[Path, Path], None]:
    def optimize(model: Path, optimized: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(optimized)
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    return optimize


def _onnxslim(model: Path, optimized: Path) -> None:
    if importlib.util.find_spec("onnxslim") is None:
        raise ModuleNotFoundError("onnxslim is not installed")
    command = [sys.executable, "-m", "onnxslim", str(model), str(optimized)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ONNXSLIM_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise VerificationError(f"onnxslim {importlib.metadata.version('onnxslim')}: {last}")


OPTIMIZERS: Mapping[str, Callable[[Path, Path], None]] = {
    "onnxruntime offline, basic": _onnxruntime(ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
    "onnxruntime offline, extended": _onnxruntime(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
    "onnxslim": _onnxslim,
}
