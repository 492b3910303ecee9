"""Compile random small programs for HTP and print those whose results are not those of onnxruntime on the same file.

    python tools/fuzz_htp.py [--programs 300] [--first-seed 0] [--precisions W8A8,W8A16] [--json FILE]

`random_programs.py` makes them: two to five ops between two linear layers, printed as the Python that was computed,
with x0 the result of the first layer. Those with a constant tensor, as of x - x, say nothing and are skipped. Each is
lowered by the pipelines that `fraqat compile` runs, quantized post training, and computed in HTP's emulator, which
takes some three seconds. Rows that lie in the JSON file already are kept and not measured again, so it can be cut off
at any moment. The exit status is 1 when a program strays or is refused.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_programs import case, program_of, says_nothing
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration as exporter_registration

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.parity import Parity
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.progress import RichProgress
from fraqat_compiler.targets.htp import HtpTarget

PRECISIONS = {"W8A8": (8, 8), "W8A16": (8, 16), "W4A8": (4, 8), "W4A16": (4, 16)}
# Linear layers and softmax stray by themselves, as the library rounds sums early, and others pass it on: of a hundred
# programs those that are right come to at most 0.8 at 8 bits and 7 at 16. Wrong ones come to hundreds of steps.
MEAN_LSB = {8: 1.5, 16: 12.0}
COSINE = 0.995
Key = tuple[int, str, str]  # seed, precision, program


@dataclass(frozen=True)
class Row:
    """One compile.

    Attributes:
        program: what is computed between the layers, by name.
        parity: HTP against onnxruntime on the same file.
        error: why there is no parity.
    """

    seed: int
    precision: str
    program: str
    error: str = ""
    parity: Parity | None = None

    @property
    def key(self) -> Key:
        """What was computed, so that a row of another catalogue is not taken for the seed's."""
        return self.seed, self.precision, self.program

    @property
    def verdict(self) -> str:
        """right, strayed or refused."""
        if self.parity is None:
            return "refused"
        limit = MEAN_LSB[PRECISIONS[self.precision][1]]
        near = self.parity.cosine >= COSINE and (self.parity.mean_lsb or 0.0) <= limit  # both false of NaN
        return "right" if near else "strayed"

    def __str__(self) -> str:
        return f"seed {self.seed} {self.precision} {self.verdict}: {self._figures()}: {self.program}"

    def _figures(self) -> str:
        if self.parity is None:
            return self.error
        largest, mean = self.parity.max_lsb or 0.0, self.parity.mean_lsb or 0.0
        return f"{largest:.1f} / {mean:.2f} LSB, cosine {self.parity.cosine:.5f}"


def measured(row: Row) -> Row:
    """The row, filled in."""
    net, x = case(row.seed)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return replace(row, parity=distance(net, x, *PRECISIONS[row.precision], Path(scratch)))
        except Exception as error:  # a fault of the compiler, of torch or of the library is what we look for
            return replace(row, error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def distance(model: nn.Module, x: Tensor, weights: int, activations: int, folder: Path) -> Parity:
    """HTP's emulator against onnxruntime without optimizations, on the file that the target lowers a model to.

    Raises:
        FraqatError: the model cannot be compiled, or its outputs cannot be compared.
    """
    target, path = HtpTarget(), folder / "model.onnx"
    context = PassContext(target=target, example_inputs=((x,), {}))
    text = f"{target.prepare_pipeline()},insert-fake-quant{{weights={weights} activations={activations}}}"
    graph = PassManager.from_text(text).run(capture(model, (x,)), context).model
    calibrate(graph, [(x,)])
    lowered = PassManager.from_text(target.lower_pipeline()).run(graph, context).model
    onnx_io.save(lowered, path)
    onnx_io.verify(path)
    feeds = {lowered.inputs[0].name: x.numpy()}
    expected = parity.onnx_runner(path, optimized=False)(feeds)
    actual = target.run(target.compile(path, folder), feeds)
    return parity.compare([expected], [actual], dict(zip(expected, parity.output_scales(graph), strict=True)))


def main() -> int:
    """Measure and print; 1 when a program strays or is refused, 2 where the library cannot run."""
    options = parse_arguments()
    if reason := HtpTarget.missing():
        print(reason, file=sys.stderr)
        return 2
    prepare()
    seeds = range(options.first_seed, options.first_seed + options.programs)
    telling = [seed for seed in seeds if not says_nothing(seed)]
    asked = [Row(seed, precision, str(program_of(seed))) for seed in telling for precision in options.precisions]
    rows = measure(asked, options.json)
    verdicts = Counter(row.verdict for row in rows)
    counts = ", ".join(f"{verdicts[name]} {name}" for name in ("right", "strayed", "refused"))
    print(f"{len(rows)} compiles of {len(telling)} programs: {counts}; {len(seeds) - len(telling)} programs skipped.")
    return int(verdicts["right"] < len(rows))


def prepare() -> None:
    """One thread and no chatter; the sources of torch's ONNX functions, which every export parses, once."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    apis: Any = vars(exporter_registration)["onnxscript_apis"]
    apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first program (default: %(default)s)")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["W8A8", "W8A16"])
    parser.add_argument("--json", type=Path, help="write the rows to this file as they come, and keep those in it")
    options = parser.parse_args()
    unknown = [name for name in options.precisions if name not in PRECISIONS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PRECISIONS)}")
    return options


def measure(asked: Sequence[Row], path: Path | None) -> list[Row]:
    """The rows filled in, from the file where it has them; each that is not right is printed."""
    known = read_rows(path) if path else {}
    progress, rows = RichProgress(), []
    with progress.phase("fuzz", len(asked)):
        for done, row in enumerate(asked, 1):
            if row.key not in known:
                known[row.key] = measured(row)
                write_rows(known, path)
            rows.append(known[row.key])
            if rows[-1].verdict != "right":
                print(rows[-1], file=sys.stderr, flush=True)
            progress.update(done, f"seed {row.seed} {row.precision}")
    return rows


def read_rows(path: Path) -> dict[Key, Row]:
    """The rows of a file that `--json` wrote; none where there is no file."""
    if not path.is_file():
        return {}
    contents = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**of | {"parity": Parity(**of["parity"]) if of["parity"] else None}) for of in contents]
    return {row.key: row for row in rows}


def write_rows(rows: Mapping[Key, Row], path: Path | None) -> None:
    """Write the rows in the order of their keys; nowhere without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [asdict(rows[key]) for key in sorted(rows)]
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
