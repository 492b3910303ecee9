"""Hold our quantized files against those of onnxruntime's own quantizer for QNN, on the HTP of one SoC.

    python tools/compare_ort_quantizer.py [--models sana,digits_dit] [--precisions W8A8,W8A16] [--json FILE]

Needs `pip install diffusers==0.42.0 transformers`, and for the models of examples/ what their READMEs name. For each
model and precision there are three files of the same weights, calibrated on the same data, min-max in onnxruntime's:

- fraqat: `fraqat_compiler.compile`, post training;
- ort: `torch.onnx.export`, `qnn_preprocess_model`, `quantize` with `get_qnn_qdq_config`, whose weights are uint8 per
  tensor as by default (at W4: int4, symmetric);
- ort-per-channel: the same with symmetric signed weights and `per_channel=True`.

All three go through one measurement: onnxruntime-qnn partitions the file with fallback to the CPU allowed, and what is
outside its context binaries has fallen back. Distances are in steps of a quantizer of the float outputs' own range, at
the width of the activations: against the float model, and against onnxruntime on the CPU without optimizations for the
same file. A file that cannot be made or compiled is a row with the reason. Rows that lie in the JSON file already are
kept and not measured again, so it can be cut off at any moment.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model
from torch import Tensor
from torch.utils import _pytree as pytree

import fraqat_compiler
from fraqat_compiler import parity
from fraqat_compiler.compiler import MODEL_FILE
from fraqat_compiler.errors import FraqatError
from fraqat_compiler.job import Job, load_job
from fraqat_compiler.parity import Parity
from fraqat_compiler.pipeline_text import to_text
from fraqat_compiler.target import Arrays
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.client import QnnProcess

PRECISIONS = {"W8A16": (8, 16), "W8A8": (8, 8), "W4A16": (4, 16), "W4A8": (4, 8)}
QUANTIZER_NAMES = ("fraqat", "ort", "ort-per-channel")
EXAMPLES = ("digits_dit", "mobilenet_v2_real", "minilm")
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
CALIBRATION_BATCHES = 4
OPSET = 21  # the first with int4 and uint16 in QuantizeLinear
FOLDER = Path(__file__).parents[1] / "examples"
Batch = tuple[Tensor, ...]
Key = tuple[str, str, str]  # model, precision, quantizer
Quantizer = Callable[["Task", Path], Path]


@dataclass(frozen=True)
class Task:
    """A float model with the data that every quantizer gets.

    Attributes:
        job: the model.
        batches: for the activation ranges; the first is also what outputs are compared on.
        weights, activations: bit widths.
    """

    job: Job
    batches: Sequence[Batch]
    weights: int
    activations: int


@dataclass(frozen=True)
class Placed:
    """What the HTP's provider made of a file.

    Attributes:
        outputs: by name.
        contexts: context binaries that it cut the graph into.
        fallback: op types outside of them, with their numbers; quantizers do not count.
    """

    outputs: Arrays
    contexts: int
    fallback: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One file: where its nodes run and how far its outputs are; or why there is none.

    Attributes:
        nodes: of the file, without quantizers.
        contexts, fallback: as of Placed.
        to_float: the HTP's outputs against the float model's.
        to_file: the HTP's outputs against onnxruntime's on the same file.
    """

    model: str
    precision: str
    quantizer: str
    error: str = ""
    seconds: float = 0.0
    nodes: int = 0
    contexts: int = 0
    fallback: dict[str, int] | None = None
    to_float: Parity | None = None
    to_file: Parity | None = None


def main() -> int:
    """Measure and print; 0 however the figures are."""
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = read_rows(options.json) if options.json else {}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    for row in measure(options.models, options.precisions, HtpTarget(soc=options.soc), set(rows)):
        print(line(row), file=sys.stderr, flush=True)
        rows[key(row)] = row
        if options.json:
            options.json.write_text(
                json.dumps([asdict(row) for row in in_order(rows)], indent=1) + "\n", encoding="utf-8"
            )
    print("\n".join(markdown(in_order(rows))))
    return 0


def key(row: Row) -> Key:
    """What identifies a row."""
    return row.model, row.precision, row.quantizer


def in_order(rows: Mapping[Key, Row]) -> list[Row]:
    """Rows as `measure` makes them."""
    known = product(model_names(), PRECISIONS, QUANTIZER_NAMES)
    return [rows[key] for key in known if key in rows]


def read_rows(path: Path) -> dict[Key, Row]:
    """The rows of a file that `--json` wrote; none where there is no file."""
    if not path.is_file():
        return {}
    rows = [_row(content) for content in json.loads(path.read_text(encoding="utf-8"))]
    return {key(row): row for row in rows}


def _row(content: dict[str, Any]) -> Row:
    distances = {name: Parity(**content[name]) if content[name] else None for name in ("to_float", "to_file")}
    return Row(**content | distances)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=[], help="default: all")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=list(PRECISIONS))
    parser.add_argument("--soc", default="sm8750")
    parser.add_argument("--json", type=Path, help="write the rows to this file as they come, and keep those in it")
    options = parser.parse_args()
    known = model_names()
    options.models = options.models or known
    unknown = [name for name in options.models if name not in known] + [
        name for name in options.precisions if name not in PRECISIONS
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join((*known, *PRECISIONS))}")
    return options


def model_names() -> list[str]:
    """The architectures, and the examples whose packages are here."""
    from architecture_models import ARCHITECTURES

    return [*ARCHITECTURES, *EXAMPLES]


def measure(models: Sequence[str], precisions: Sequence[str], target: HtpTarget, done: Set[Key]) -> Iterator[Row]:
    """One row for each model, precision and quantizer that is not done."""
    ways = quantizers(target)
    for model in models:
        missing = [key for key in product([model], precisions, ways) if key not in done]
        try:
            job, batches = job_of(model) if missing else (None, [])
        except Exception as error:  # a package of an example that is not here
            print(f"{model}: {first_line(error)}", file=sys.stderr)
            continue
        for _, precision, way in missing:
            assert job is not None
            task = Task(job, batches, *PRECISIONS[precision])
            yield measure_one(Row(model, precision, way), task, ways[way], target)


def job_of(model: str) -> tuple[Job, list[Batch]]:
    """A model as a job, and its calibration data."""
    if model in EXAMPLES:
        job = load_job(str(FOLDER / model.removesuffix("_real") / "job.py"))
        assert job.calibration_data is not None
        batches = [job.example_inputs(), *job.calibration_data()]
        return job, batches[:CALIBRATION_BATCHES]
    from architecture_models import build

    module, inputs = build(model)
    return Job(model, lambda: module, lambda: inputs), [inputs]


def quantizers(target: HtpTarget) -> dict[str, Quantizer]:
    """The ways to a quantized file, by name."""
    ways = (
        partial(quantize_here, target=target),
        partial(quantize_there, per_channel=False),
        partial(quantize_there, per_channel=True),
    )
    return dict(zip(QUANTIZER_NAMES, ways, strict=True))


def quantize_here(task: Task, folder: Path, target: HtpTarget) -> Path:
    """Our file."""
    job = Job(task.job.name, task.job.model, lambda: task.batches[0], lambda: task.batches)
    weights, activations, text = task.weights, task.activations, to_text(target)
    made = fraqat_compiler.compile(job, output=folder / "fraqat", target=text, weights=weights, activations=activations)
    return made.output / MODEL_FILE


def quantize_there(task: Task, folder: Path, per_channel: bool) -> Path:
    """The file of onnxruntime's quantizer, used as https://onnxruntime.ai/docs/execution-providers/ says of QNN."""
    model, made = folder / "float.onnx", folder / "quantized.onnx"
    exported = torch.onnx.export(task.job.model(), task.batches[0], dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    exported.save(str(model))
    prepared = folder / "prepared.onnx"
    if not qnn_preprocess_model(str(model), str(prepared), fuse_layernorm=True):
        prepared = model
    config = get_qnn_qdq_config(
        str(prepared),
        Reader(prepared, task.batches),
        activation_type=QuantType.QUInt8 if task.activations == 8 else QuantType.QUInt16,
        weight_type=weight_type(task.weights, per_channel),
        per_channel=per_channel,
    )
    quantize(str(prepared), str(made), config)
    return made


def weight_type(bits: int, per_channel: bool) -> QuantType:
    """Unsigned is the default there; HTP takes scales per channel of signed weights only, and int4 is signed."""
    if bits == 4:
        return QuantType.QInt4
    return QuantType.QInt8 if per_channel else QuantType.QUInt8


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Batches, by the names of a file's inputs."""

    def __init__(self, model: Path, batches: Sequence[Batch]) -> None:
        self._feeds = iter([feeds_of(model, batch) for batch in batches])

    def get_next(self) -> Arrays | None:
        """The next batch; None at the end."""
        return next(self._feeds, None)


def feeds_of(model: Path, batch: Batch) -> Arrays:
    """A batch by the names of a file's inputs, which are in the order of the model's."""
    graph = onnx.load(str(model), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]
    return dict(zip(names, (tensor.numpy() for tensor in batch), strict=True))


def measure_one(row: Row, task: Task, quantizer: Quantizer, target: HtpTarget) -> Row:
    """The row, filled in."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = quantizer(task, Path(scratch))
            seconds = time.perf_counter() - start
            feeds = feeds_of(model, task.batches[0])
            placed = place(model, feeds, target, Path(scratch))
            exact = parity.onnx_runner(model, optimized=False)(feeds)
        except Exception as error:  # whatever ends a quantizer or the provider is the result
            return Row(row.model, row.precision, row.quantizer, first_line(error))
        nodes = onnx.load(str(model), load_external_data=False).graph.node
    references = dict(zip(exact, float_outputs(task), strict=True))
    steps = {name: float(np.ptp(array)) / (2**task.activations - 1) or None for name, array in references.items()}
    return Row(
        row.model,
        row.precision,
        row.quantizer,
        seconds=round(seconds, 1),
        nodes=sum(node.op_type not in QUANTIZERS for node in nodes),
        contexts=placed.contexts,
        fallback=placed.fallback,
        to_float=parity.compare([references], [placed.outputs], steps),
        to_file=parity.compare([exact], [placed.outputs], steps),
    )


def float_outputs(task: Task) -> list[Any]:
    """Outputs of the float model, in order."""
    with torch.no_grad():
        return [leaf.numpy() for leaf in pytree.tree_leaves(task.job.model()(*task.batches[0]))]


def place(model: Path, feeds: Arrays, target: HtpTarget, folder: Path) -> Placed:
    """Compile a file as far as the HTP takes it, and run all of it.

    Raises:
        QnnError: the library refuses the file as a whole, or crashes.
    """
    made = folder / "placed.onnx"
    config = {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": str(made)}
    process = QnnProcess()
    process.load(model, target.provider_options(), config)
    outputs = process.run(feeds)
    # Where the provider takes nothing, it writes nothing.
    nodes = onnx.load(str(made if made.is_file() else model), load_external_data=False).graph.node
    ops = Counter(node.op_type for node in nodes if node.op_type not in QUANTIZERS)
    return Placed(outputs, ops.pop("EPContext", 0), dict(ops.most_common()))


def first_line(error: BaseException) -> str:
    """What ended a row, short."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"/\S+/", "", lines[0]) if lines else ""  # a scratch folder's name tells nobody anything
    return text if isinstance(error, FraqatError) else f"{type(error).__name__}: {text}"


def line(row: Row) -> str:
    """One row for people."""
    return " ".join((*key(row), *(cells(row) or [row.error])))


def cells(row: Row) -> list[str]:
    """Figures of a row; none of a file that there is not."""
    if row.to_float is None or row.to_file is None or row.fallback is None:
        return []
    return [
        str(sum(row.fallback.values())),
        f"{row.to_float.cosine:.5f}",
        f"{row.to_float.slope:.3f}",
        f"{row.to_file.max_lsb or 0:.0f}",
    ]


def markdown(rows: Sequence[Row]) -> list[str]:
    """The table of docs/figures.md: a row for each model and precision, the quantizers beside each other."""
    head = ["model", "precision", "nodes on the CPU", "cosine with float", "slope", "steps from its own file"]
    lines = [head, ["---"] * len(head)]
    for which, group in groupby(rows, lambda row: key(row)[:2]):
        made = {row.quantizer: cells(row) or ["fails"] * (len(head) - 2) for row in group}
        files = [made.get(name, ["-"] * (len(head) - 2)) for name in QUANTIZER_NAMES]
        lines.append([*which, *(" · ".join(beside) for beside in zip(*files, strict=True))])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
