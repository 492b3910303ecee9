"""Compile every architecture of `architecture_models.py` in every precision for a target, and print what came of it.

    python tools/architectures.py [--architectures sana,llama] [--precisions W4A8,W8A16] [--target htp] [--json]

Needs `pip install diffusers==0.42.0 transformers`. Quantization is post-training, on the example inputs. One row is one
compile: ops that run on the target and those that fell back, ops left in float, seconds, peak memory of this process
and its children, bytes of the binary beside those of the packed weights, and the distance between the target and
onnxruntime on the same file: in steps of the output's quantizer, as cosine, and as slope, which shows a wrong factor
that a cosine hides. A row that cannot be compiled says why; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from architecture_models import ARCHITECTURES, build
from benchmark_compile import MIB, PhaseMeter
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import fraqat_compiler
from fraqat_compiler import parity
from fraqat_compiler.compiler import MODEL_FILE, REFERENCE_FILE, CompileResult
from fraqat_compiler.errors import FraqatError
from fraqat_compiler.parity import Parity
from fraqat_compiler.registry import parse_target

PRECISIONS = {"W4A8": (4, 8), "W4A16": (4, 16), "W8A8": (8, 8), "W8A16": (8, 16)}
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Row:
    """What one compile left, or the error that ended it.

    Attributes:
        ops: nodes of the ONNX file that are no quantizers.
        fallback: nodes outside the target.
        floats: ops that were not quantized, with the reason.
        warnings: of the compile, but those on calibration and on the distance to the torch graph.
        parity: the target against onnxruntime without optimizations, on the same file.
    """

    architecture: str
    precision: str
    error: str = ""
    ops: int = 0
    fallback: int | None = None
    floats: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_bytes: int = 0
    binary_bytes: int = 0
    weight_bytes: int = 0
    parity: Parity | None = None


def main() -> int:
    """Compile and print; 1 when a row failed, 2 for an unknown name."""
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for row in measure(options):
        print(summary(row), file=sys.stderr, flush=True)
        rows.append(row)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows, options.target)
    return int(any(row.error for row in rows))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=_names(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--precisions", type=_names(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--target", default="htp", help="target text (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="keep the results of the compiles in this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser.parse_args()


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """One row for each architecture and precision."""
    for architecture in options.architectures:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as scratch:
                folder = (options.output or Path(scratch)) / f"{architecture}_{precision}"
                yield compile_one(architecture, precision, options.target, folder)


def compile_one(architecture: str, precision: str, target: str, folder: Path) -> Row:
    """Compile one architecture and compare the target with onnxruntime."""
    weights, activations = PRECISIONS[precision]
    model, inputs = build(architecture)
    meter, start = PhaseMeter(verbose=False), time.perf_counter()
    try:
        result = fraqat_compiler.compile(
            model, inputs, output=folder, progress=meter, target=target, weights=weights, activations=activations
        )
    except FraqatError as error:
        return Row(architecture, precision, str(error))
    seconds = time.perf_counter() - start
    return row_of(architecture, precision, result, seconds, max(phase.peak_memory for phase in meter.phases))


def row_of(architecture: str, precision: str, result: CompileResult, seconds: float, peak_bytes: int) -> Row:
    """The figures of a finished compile."""
    report, model = result.report, onnx.load(result.output / MODEL_FILE, load_external_data=False)
    return Row(
        architecture,
        precision,
        ops=sum(node.op_type not in QUANTIZERS for node in model.graph.node),
        fallback=report["target"]["fallback_nodes"],
        floats=tuple(f"{layer['name']}: {layer['reason']}" for layer in report["layers"] if layer["status"] == "float"),
        warnings=tuple(text for text in report["warnings"] if not text.startswith(("Parity of", "The job defines"))),
        seconds=seconds,
        peak_bytes=peak_bytes,
        binary_bytes=report["target"]["bytes"],
        weight_bytes=sum(_stored_bytes(tensor) for tensor in model.graph.initializer),
        parity=against_onnxruntime(result),
    )


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initializer as the file holds it: two 4-bit codes in one."""
    count = 1
    for size in tensor.dims:
        count *= size
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def against_onnxruntime(result: CompileResult) -> Parity:
    """Distance between the target and onnxruntime on the same file and inputs."""
    tensors = load_file(result.output / REFERENCE_FILE)
    feeds = {name.removeprefix("input:"): array for name, array in tensors.items() if name.startswith("input:")}
    expected = parity.onnx_runner(result.output / MODEL_FILE, optimized=False)(feeds)
    actual = parse_target(result.artifact.target_text).run(result.artifact, feeds)
    return parity.compare([expected], [actual], result.report["output_scales"])


def summary(row: Row) -> str:
    """One line on a row."""
    name = f"{row.architecture} {row.precision}"
    if row.parity is None:
        return f"{name}: {row.error}"
    notes = [*row.floats, *row.warnings]
    return "\n    ".join([f"{name}: {_lsb(row.parity)} LSB, cosine {row.parity.cosine:.6f}", *notes])


def _lsb(distance: Parity) -> str:
    if distance.max_lsb is None or distance.mean_lsb is None:
        return f"{distance.max_abs:.3g} abs"
    return f"{distance.max_lsb:.0f} / {distance.mean_lsb:.2f}"


def print_table(rows: list[Row], target: str) -> None:
    """Print the rows for people."""
    names = ("architecture", "precision", "ops", "fallback", "float", "s", "peak MiB", "binary KiB", "weights KiB")
    table = Table(*names, "max / mean LSB", "cosine", "slope", title=f"{target} against onnxruntime on the same file")
    for row in rows:
        table.add_row(row.architecture, row.precision, *(_cells(row, row.parity) if row.parity else [row.error[:60]]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cells(row: Row, distance: Parity) -> list[str]:
    return [
        str(row.ops),
        str(row.fallback),
        str(len(row.floats)),
        f"{row.seconds:.1f}",
        f"{row.peak_bytes / MIB:.0f}",
        f"{row.binary_bytes / 1024:.0f}",
        f"{row.weight_bytes / 1024:.0f}",
        _lsb(distance),
        f"{distance.cosine:.6f}",
        f"{distance.slope:.5f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
