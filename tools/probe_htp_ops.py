"""Ask the HTP library about every op, width, granularity and rank, and write what it says into the package's table.

    python tools/probe_htp_ops.py [--soc sm8750] [--output targets/htp/ops_v79.csv] [--fresh]

Each probe is a graph of one op between quantizers, compiled with fallback to the CPU forbidden, run in the library's
emulator and compared with onnxruntime without graph optimizations. Two processes share the work; 1,200 probes take
some ten minutes on two cores. What has been probed is kept in OUTPUT.part after a Ctrl-C and is not asked again.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
from htp_op_cases import Feeds, GraphBuilder, Probe, probes

from fraqat_compiler.errors import VerificationError
from fraqat_compiler.parity import measure, onnx_runner
from fraqat_compiler.progress import RichProgress
from fraqat_compiler.target import Arrays
from fraqat_compiler.targets.htp.client import NO_FALLBACK, QnnError, QnnProcess
from fraqat_compiler.targets.htp.context_binary import read_binary
from fraqat_compiler.targets.htp.log_messages import CODES, explain, node_verdicts
from fraqat_compiler.targets.htp.op_table import COLUMNS, DISTRIBUTION, OpRow, header
from fraqat_compiler.targets.htp.target import HtpTarget

VERBOSE = 0
WORKERS = 2
STRAY_SHARE = 10 / 255  # of the output's range: 10 steps at 8 bits
STRAYING = 0.01  # of the elements; a lone one may stand at a jump, as those of Floor do
SLOPE = 0.05
_CODE = re.compile(r"of type `(\w+)` with error code (\d+)")


class Prober:
    """Asks the library about one probe after the other."""

    def __init__(self, target: HtpTarget, folder: Path) -> None:
        self._options = target.provider_options()
        self._path = folder / f"probe_{threading.get_ident()}.onnx"
        self._process = QnnProcess()

    def row(self, probe: Probe) -> OpRow:
        """The library's answer."""
        try:
            scale, feeds, reference = self._reference(probe)
        except VerificationError as error:
            return _row(probe, "unknown", reason=_clause(str(error)))
        try:
            self._process.load(self._path, self._options, NO_FALLBACK, VERBOSE)
        except QnnError as error:
            self._process = QnnProcess()  # a failure may leave the library in any state
            return _row(probe, "refused", reason=_reason(error))
        try:
            actual = self._process.run(feeds)
        except QnnError as error:
            self._process = QnnProcess()
            return _row(probe, "refused", reason=f"compiles, but does not run: {_reason(error)}")
        return _compared(probe, reference, actual, scale)

    def _reference(self, probe: Probe) -> tuple[np.float32, Feeds, Arrays]:
        """Write the model; its step, its inputs and what onnxruntime makes of them."""
        builder = GraphBuilder(probe)
        in_float, _ = builder.model(None)
        onnx.save(in_float, str(self._path))
        values = onnx_runner(self._path, optimized=False)(builder.feeds)["y0"]
        model, scale = builder.model((float(values.min()), float(values.max())))
        assert scale is not None
        onnx.save(onnx.shape_inference.infer_shapes(model), str(self._path))
        return scale, builder.feeds, onnx_runner(self._path, optimized=False)(builder.feeds)


def _compared(probe: Probe, reference: Arrays, actual: Arrays, scale: np.float32) -> OpRow:
    name = next(iter(reference))
    first, second = reference[name].astype(np.float64), actual[name].astype(np.float64)
    distance = measure(first, second, float(scale))
    steps = np.abs(first - second) / float(scale)
    strays = float(np.mean(steps > STRAY_SHARE * (2**probe.activation_bits - 1)))
    wrong = strays > STRAYING or abs(distance.slope - 1) > SLOPE
    return _row(probe, "wrong" if wrong else "runs", distance.max_lsb, distance.slope)


def _row(
    probe: Probe, verdict: str, max_lsb: float | None = None, slope: float | None = None, reason: str = ""
) -> OpRow:
    rounded = (None if max_lsb is None else round(max_lsb, 1), None if slope is None else round(slope, 4))
    return OpRow(*probe.key, verdict, *rounded, reason)


def _reason(error: QnnError) -> str:
    """The library's words about the op; where it has none, about a quantizer of it, which fails at rank 6."""
    refused = (verdict.reason for verdict in node_verdicts(error.log).values() if not verdict.accepted)
    reason, code = next(refused, ""), _CODE.search(error.log)
    if code is not None and "code" not in reason:
        reason = f"{CODES.get(int(code[2]), 'refused')} (QNN op {code[1]}, code {code[2]})"
    return _clause(reason or explain(str(error), error.log))


def _clause(text: str) -> str:
    return " ".join(text.split())[:160]


def probe_all(asked: Sequence[Probe], target: HtpTarget, known: dict[tuple[object, ...], OpRow], part: Path) -> None:
    """Add the rows that `known` lacks to it, and each at once to the file `part`."""
    left = [probe for probe in asked if probe.key not in known]
    local, progress = threading.local(), RichProgress()
    with tempfile.TemporaryDirectory() as scratch, part.open("a", newline="", encoding="utf-8") as file:

        def ask(probe: Probe) -> OpRow:
            if not hasattr(local, "prober"):
                local.prober = Prober(target, Path(scratch))
            row: OpRow = local.prober.row(probe)
            return row

        pool = ThreadPoolExecutor(WORKERS)
        try:
            with progress.phase("probe", len(left)):
                for done, future in enumerate(as_completed([pool.submit(ask, probe) for probe in left]), 1):
                    row = future.result()
                    known[row.key] = row
                    csv.writer(file).writerow(row.cells())
                    file.flush()
                    progress.update(done, f"{row.op} rank {row.rank}")
        finally:
            pool.shutdown(cancel_futures=True)


def read_part(path: Path) -> dict[tuple[object, ...], OpRow]:
    """The rows that an earlier run left."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [OpRow.from_cells(cells) for cells in csv.reader(file) if len(cells) == len(COLUMNS)]
    return {row.key: row for row in rows}


def qairt_version(target: HtpTarget) -> str:
    """Read back from a binary that the library makes."""
    probe = next(iter(probes()))
    with tempfile.TemporaryDirectory() as folder:
        model, _ = GraphBuilder(probe).model((-1.0, 1.0))
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        return read_binary(target.compile(path, Path(folder)).files[1]).qairt_version


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soc", default="sm8750")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fresh", action="store_true", help="ask again what an earlier run has asked")
    options = parser.parse_args()
    target = HtpTarget(soc=options.soc)
    arch = target.chip.htp_arch
    output = options.output or Path(__file__).parents[1] / f"targets/htp/ops_v{arch}.csv"
    part = output.with_suffix(".csv.part")
    if options.fresh:
        part.unlink(missing_ok=True)
    asked, known = list(probes()), read_part(part)
    probe_all(asked, target, known, part)
    with output.open("w", newline="", encoding="utf-8") as file:
        file.write(header(metadata.version(DISTRIBUTION), qairt_version(target), arch) + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(known[probe.key].cells() for probe in asked)
    part.unlink()


if __name__ == "__main__":
    main()
