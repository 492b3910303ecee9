"""Compile every architecture of `architecture_models.py` in every precision for a target, and print what came of it.

    python tools/architectures.py [--architectures sana,llama] [--precisions W4A8,W8A16] [--seeds 5] [--json]

Needs `pip install diffusers==0.42.0 transformers`. Quantization is post-training, on the example inputs. One row is one
compile: ops that run on the target and those that fell back, ops left in float, seconds, peak memory of this process
and its children, bytes of the binary beside those of the packed weights, and the distance between the target and
onnxruntime on the same file: in steps of the output's quantizer, as cosine, and as slope, which shows a wrong factor
that a cosine hides. With several seeds, of weights and inputs, the distances in the table are medians with the least
and the greatest: in a net of random weights one code that rounds the other way moves many behind it. A row that cannot
be compiled says why; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
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
        seed: of the weights and inputs.
        ops: nodes of the ONNX file that are no quantizers.
        fallback: nodes outside the target.
        floats: ops that were not quantized, with the reason.
        warnings: of the compile, but those on calibration and on the distance to the torch graph.
        parity: the target against onnxruntime without optimizations, on the same file.
    """

    architecture: str
    precision: str
    seed: int = 0
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
    parser.add_argument("--seeds", type=int, default=1, help="weights and inputs of each row (default: %(default)s)")
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
    """One row for each architecture, precision and seed."""
    for architecture, precision, seed in product(options.architectures, options.precisions, range(options.seeds)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = (options.output or Path(scratch)) / f"{architecture}_{precision}_{seed}"
            yield compile_one(Row(architecture, precision, seed), options.target, folder)


def compile_one(row: Row, target: str, folder: Path) -> Row:
    """Compile what a row names and compare the target with onnxruntime."""
    weights, activations = PRECISIONS[row.precision]
    model, inputs = build(row.architecture, row.seed)
    meter, start = PhaseMeter(verbose=False), time.perf_counter()
    try:
        result = fraqat_compiler.compile(
            model, inputs, output=folder, progress=meter, target=target, weights=weights, activations=activations
        )
    except FraqatError as error:
        return replace(row, error=str(error))
    seconds = time.perf_counter() - start
    return filled(row, result, seconds, max(phase.peak_memory for phase in meter.phases))


def filled(row: Row, result: CompileResult, seconds: float, peak_bytes: int) -> Row:
    """The row with the figures of a finished compile."""
    report, model = result.report, onnx.load(result.output / MODEL_FILE, load_external_data=False)
    return replace(
        row,
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
    name = f"{row.architecture} {row.precision} seed {row.seed}"
    if row.parity is None:
        return f"{name}: {row.error}"
    notes = [*row.floats, *row.warnings]
    return "\n    ".join([f"{name}: {_lsb([row.parity])} LSB, cosine {row.parity.cosine:.6f}", *notes])


def print_table(rows: list[Row], target: str) -> None:
    """Print the rows for people, those of several seeds as one."""
    names = ("architecture", "precision", "ops", "fallback", "float", "s", "peak MiB", "binary KiB", "weights KiB")
    table = Table(*names, "max / mean LSB", "cosine", "slope", title=f"{target} against onnxruntime on the same file")
    for (architecture, precision), seeds in groupby(rows, lambda row: (row.architecture, row.precision)):
        group = list(seeds)
        failed = [row.error[:60] for row in group if row.error]
        table.add_row(architecture, precision, *(failed[:1] or _cells(group)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cells(rows: list[Row]) -> list[str]:
    first, distances = rows[0], [row.parity for row in rows if row.parity]
    return [
        str(first.ops),
        str(max(row.fallback or 0 for row in rows)),
        str(len(first.floats)),
        f"{first.seconds:.1f}",
        f"{first.peak_bytes / MIB:.0f}",
        f"{first.binary_bytes / 1024:.0f}",
        f"{first.weight_bytes / 1024:.0f}",
        _lsb(distances),
        _spread([distance.cosine for distance in distances], ".5f"),
        _spread([distance.slope for distance in distances], ".4f"),
    ]


def _lsb(distances: list[Parity]) -> str:
    if any(distance.max_lsb is None for distance in distances):
        return f"{_spread([distance.max_abs for distance in distances], '.3g')} abs"
    greatest, mean = ([getattr(of, name) for of in distances] for name in ("max_lsb", "mean_lsb"))
    return f"{_spread(greatest, '.0f')} / {_spread(mean, '.2f')}"


def _spread(values: list[float], form: str) -> str:
    """The median, and the least and greatest of several."""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())
