"""Running a pipeline of passes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import onnx_graphsurgeon as gs
import torch

from fraqat_compiler.errors import PassError, UsageError
from fraqat_compiler.instruments import Instrument
from fraqat_compiler.pass_base import IR, Pass, PassContext, PassResult
from fraqat_compiler.pipeline_text import join, to_text
from fraqat_compiler.registry import parse_pipeline
from fraqat_compiler.reproducer import Snapshot, write_reproducer

MODEL_TYPES: dict[IR, type] = {"fx": torch.fx.GraphModule, "onnx": gs.Graph}


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, for the report's key `passes`.

    Attributes:
        name: the pass.
        text: the pass with its options.
        seconds: wall time of the pass alone, instruments left out.
        nodes_before, nodes_after: nodes of the graph.
        modified: whether the pass changed anything.
        changes: one line for each thing changed.
    """

    name: str
    text: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    changes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"changes": list(self.changes)}


class PipelineResult(NamedTuple):
    """The graph after the last pass, and a record of each pass."""

    model: Any
    records: tuple[PassRecord, ...]


@dataclass(frozen=True)
class PassManager:
    """A pipeline: passes in the order in which they run.

    Raises:
        UsageError: a pass reads another IR than the pass before it writes.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for earlier, later in pairwise(self.passes):
            if earlier.writes != later.reads:
                raise UsageError(
                    f'"{later.name}" reads {later.reads} but "{earlier.name}" before it writes {earlier.writes}.',
                    "Reorder the pipeline; export-onnx leads from fx to onnx.",
                )

    @classmethod
    def from_text(cls, text: str) -> PassManager:
        """The pipeline that a text such as `freeze-bit-width,export-onnx{opset=21}` names.

        Raises:
            PipelineSyntaxError: the text does not follow the grammar.
            UsageError: an unknown pass or option, or neighbours whose IRs do not fit.
        """
        return cls(parse_pipeline(text))

    def __str__(self) -> str:
        return join(self.passes)

    def run(
        self,
        model: Any,
        ctx: PassContext | None = None,
        instruments: Sequence[Instrument] = (),
        reproducer: Path | None = None,
    ) -> PipelineResult:
        """Run the passes one after another.

        Args:
            model: `torch.fx.GraphModule` or `onnx_graphsurgeon.Graph`, as the first pass reads; it may be changed.
            ctx: handed to every pass.
            instruments: called around every pass, nested: the last one is next to the pass.
            reproducer: folder to write when a pass fails, from which `fraqat opt` repeats the failure.

        Raises:
            UsageError: `model` is not of the IR that the first pass reads.
            Exception: what a pass or an instrument raised, with notes: which pass, which pipeline, where the
                reproducer lies.
        """
        if self.passes and not isinstance(model, MODEL_TYPES[self.passes[0].reads]):
            raise UsageError(f'"{self.passes[0].name}" reads {self.passes[0].reads}, not a {type(model).__name__}.')
        ctx = ctx or PassContext()
        records = []
        for index in range(len(self.passes)):
            model, record = self._run_guarded(index, model, ctx, instruments, reproducer)
            records.append(record)
        return PipelineResult(model, tuple(records))

    def _run_guarded(
        self, index: int, model: Any, ctx: PassContext, instruments: Sequence[Instrument], reproducer: Path | None
    ) -> tuple[Any, PassRecord]:
        """One pass; an exception leaves with its notes."""
        snapshot = Snapshot.take(model) if reproducer is not None else None
        try:
            return _run_pass(self.passes[index], model, ctx, instruments)
        except Exception as error:
            error.add_note(f"in pass {index + 1} of {len(self.passes)}: {to_text(self.passes[index])}")
            error.add_note(f"pipeline: {self}")
            if reproducer is not None and snapshot is not None:
                error.add_note(write_reproducer(reproducer, snapshot, join(self.passes[index:]), ctx, error))
            raise


def _run_pass(step: Pass, model: Any, ctx: PassContext, instruments: Sequence[Instrument]) -> tuple[Any, PassRecord]:
    for instrument in instruments:
        instrument.before_pass(step, model)
    nodes_before = node_count(model)
    start = time.perf_counter()
    result = step.run(model, ctx)
    seconds = time.perf_counter() - start
    _refuse_unfit(step, result)
    for instrument in reversed(instruments):
        instrument.after_pass(step, model, result)
    nodes_after = node_count(result.model)
    record = PassRecord(
        step.name, to_text(step), seconds, nodes_before, nodes_after, result.modified, tuple(result.changes)
    )
    return result.model, record


def _refuse_unfit(step: Pass, result: object) -> None:
    """A third-party pass may return anything."""
    if not isinstance(result, PassResult):
        raise PassError(f'"{step.name}" returned {type(result).__name__} instead of a PassResult.')
    if not isinstance(result.model, MODEL_TYPES[step.writes]):
        raise PassError(f'"{step.name}" writes {step.writes} but returned a {type(result.model).__name__}.')


def node_count(model: torch.fx.GraphModule | gs.Graph) -> int:
    """Nodes of a graph of either IR (FX counts inputs, weights and the output too)."""
    return len(model.graph.nodes) if isinstance(model, torch.fx.GraphModule) else len(model.nodes)
