"""`fraqat check`: what a target will make of a model, op by op, before any calibration or training.

The model goes the whole way to a file, with activation ranges from the example inputs alone, and the target is asked
about that file. What is told is which ops run, at which widths, after which rewrites; no figure of the file is kept.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
from torch import nn

from fraqat_compiler import onnx_io, qdq
from fraqat_compiler.auto_widths import parse_auto
from fraqat_compiler.compile_options import make_options
from fraqat_compiler.errors import TargetError, UsageError
from fraqat_compiler.job import Job
from fraqat_compiler.output_folder import OutputFolder
from fraqat_compiler.pass_manager import PassManager, PassRecord
from fraqat_compiler.progress import Progress
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import Finding, Target
from fraqat_compiler.tuning import Tuning, job_of


@dataclass(frozen=True)
class CheckedOp:
    """What the target says of one op, and what becomes of it.

    Attributes:
        node, op: name (it starts with the user's module path) and type in the file.
        verdict: `runs`, `refused`, or `wrong` for what the target accepts but computes wrongly.
        reason, remedy: why, and what to do.
        weight_bits, activation_bits: widths of its weight and of its result; None where it has none or is in float.
        rewritten_by: the passes that made it out of what the user wrote.
    """

    node: str
    op: str
    verdict: str
    reason: str
    remedy: str
    weight_bits: int | None
    activation_bits: int | None
    rewritten_by: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check(
    job: Job | nn.Module | str | Path, example_inputs: Any = None, *, progress: Progress | None = None, **options: Any
) -> list[CheckedOp]:
    """Ask a target about a model.

    Args:
        job, example_inputs, options: as those of `compile`; data functions of the job are not called.
        progress: hears of the phases.

    Returns:
        One entry for each op of the file, in its order; quantizers belong to their ops.

    Raises:
        FraqatError: the model cannot be captured, an op has no ONNX form, the target's package is missing ...
    """
    settings = make_options(options | {"steps": 0, "epochs": None}, exported=True)
    if parse_auto(settings.weights):
        raise UsageError(
            "--weights auto takes calibration data, which a check does without.",
            "Check the widths that it may choose, one after the other: --weights 4, --weights 8.",
        )
    target, progress = parse_target(settings.target), progress or Progress()
    missing = target.missing()
    if missing:
        raise TargetError(f'target "{target.name}" cannot run here: {missing}')
    whole = job_of(job, example_inputs)
    without_data = Job(whole.name, whole.model, whole.example_inputs)
    with tempfile.TemporaryDirectory() as scratch, OutputFolder(Path(scratch)) as folder:
        tuning = Tuning(without_data, settings, target, folder, progress, (), resume=False)
        student = tuning.tune().student
        with progress.phase("lower"):
            lowered = PassManager.from_text(target.lower_pipeline()).run(student, tuning.context)
            onnx_io.save(lowered.model, folder.staging / "model.onnx")
        with progress.phase("check"):
            findings = target.check(folder.staging / "model.onnx")
    return _checked(findings, lowered.model, [*tuning.records, *lowered.records], target)


def _checked(
    findings: Sequence[Finding], graph: gs.Graph, records: Iterable[PassRecord], target: Target
) -> list[CheckedOp]:
    nodes = {(node.name, node.op): node for node in graph.nodes}
    rewrites = _rewrites(records, target)
    return [
        CheckedOp(
            finding.node,
            finding.op,
            finding.verdict,
            finding.reason,
            finding.remedy,
            *_widths(nodes.get((finding.node, finding.op))),
            rewritten_by=tuple(name for name, text in rewrites.items() if _mentions(text, finding.node)),
        )
        for finding in findings
    ]


def _widths(node: gs.Node | None) -> tuple[int | None, int | None]:
    """(of the weight, of the result)."""
    if node is None:
        return None, None
    sources = [qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs[1:2]]
    weights = [_bits(source) for source in sources if source is not None and qdq.is_constant(source.inputs[0])]
    results = [_bits(user) for tensor in node.outputs for user in tensor.outputs if user.op == qdq.QUANTIZE]
    return next(iter(weights), None), next(iter(results), None)


def _bits(quantizer: gs.Node) -> int:
    return int(re.sub(r"\D", "", str(qdq.code_type(quantizer))))


def _rewrites(records: Iterable[PassRecord], target: Target) -> Mapping[str, str]:
    """What each pass says that it changed, of the passes that rewrite what the user wrote."""
    of_every_target = PassManager.from_text(f"insert-fake-quant,{Target.lower_pipeline(target)}").passes
    known = {step.name for step in of_every_target}
    return {record.name: "\n".join(record.changes) for record in records if record.name not in known}


def _mentions(text: str, node: str) -> bool:
    """Whether a text names a node or the module that it belongs to."""
    module = node.rpartition("/")[0]
    return any(name and re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text) for name in (node, module))
