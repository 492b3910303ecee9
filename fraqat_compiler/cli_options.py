"""Flags that several commands of the command line share: what each is called, says and defaults to.

A command takes a group of flags as one parameter, annotated with a dataclass of this module; `grouped` tells typer.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from fraqat_compiler.default_recipe import AUTO
from fraqat_compiler.quant_spec import RangeMethod

if TYPE_CHECKING:
    from fraqat_compiler.instruments import Instrument

_Result = TypeVar("_Result")

_IR, _TUNE = "Looking inside", "Fine-tune"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a compile.")]
PrintBefore = Annotated[
    list[str] | None,
    typer.Option("--print-ir-before", metavar="PASS", help="Print the graph before a pass.", rich_help_panel=_IR),
]
PrintAfter = Annotated[
    list[str] | None,
    typer.Option("--print-ir-after", metavar="PASS", help="Print the graph after a pass.", rich_help_panel=_IR),
]
PrintAll = Annotated[
    bool, typer.Option("--print-ir-after-all", help="Print the graph after every pass.", rich_help_panel=_IR)
]
PrintChange = Annotated[
    bool,
    typer.Option("--print-ir-after-change", help="Print it after every pass that changed it.", rich_help_panel=_IR),
]
DumpIr = Annotated[
    Path | None,
    typer.Option("--dump-ir", metavar="DIR", help="Write the graph after every pass to DIR.", rich_help_panel=_IR),
]
TimePasses = Annotated[bool, typer.Option("--time-passes", help="Print the time of each pass.", rich_help_panel=_IR)]
JobText = Annotated[str, typer.Argument(metavar="JOB", help="FILE.py, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results (default: out/JOB).")
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="BITS", help="Weight bits; overrides by module: 4,lm_head=8. By sensitivity: auto{mean-bits=4.5}."
    ),
]
Activations = Annotated[str, typer.Option(metavar="BITS", help="Activation bits: 8,proj_out=16.")]
Schedule = Annotated[
    str,
    typer.Option(metavar="NAME|TEXT", help="Bits over the fine-tune: a name, as geometric{stages=5}, or 8x1,6x1,4x2."),
]
Steps = Annotated[int | None, typer.Option(min=0, help="Steps of the fine-tune; 0 is post-training quantization.")]
Epochs = Annotated[float | None, typer.Option(help="The same in passes over the training data.", rich_help_panel=_TUNE)]
Loss = Annotated[
    str,
    typer.Option(
        metavar="TEXT", help="Loss: mse, kl, features{at=...}, task, with commas; or auto.", rich_help_panel=_TUNE
    ),
]
Train = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="What is trained: all, ff, attn, blocks, module patterns.", rich_help_panel=_TUNE
    ),
]
RecipeText = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="TEXT", help="Ingredients: adamw{...},ema,lsq,...; or auto.", rich_help_panel=_TUNE
    ),
]
TargetText = Annotated[str, typer.Option("--target", metavar="TEXT", help="Target, as in htp{soc=sm8750}.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")]
Strict = Annotated[bool, typer.Option("--strict", help="An op that stays in float is an error.")]
Skip = Annotated[str, typer.Option(metavar="NAMES", help="Modules left in float, with commas; * matches.")]
CalibrationRange = Annotated[
    RangeMethod | None,
    typer.Option(
        "--calibration-range",
        help="How activation ranges follow from the data (default: minmax; mse with a fine-tune, but for logits).",
    ),
]
CalibrationSamples = Annotated[
    int | None, typer.Option(min=1, help="Samples of the data that are used (default: all).")
]
WeightRange = Annotated[
    RangeMethod | None,
    typer.Option(help="The same for weights (default: mse; minmax with a fine-tune, and for logits)."),
]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_TUNE)]
CheckpointEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_TUNE)]
TracerName = Annotated[Literal["export", "symbolic_trace"], typer.Option(help="How the model is captured.")]
Dynamic = Annotated[
    bool, typer.Option("--dynamic", help="Activation ranges from every token anew, as no file can hold them.")
]
VerifyEach = Annotated[
    bool,
    typer.Option("--verify-each/--no-verify-each", help="Verify the graph after every pass.", rich_help_panel=_IR),
]


@dataclass(frozen=True)
class CheckFlags:
    """What decides which ops a model consists of, and their widths."""

    weights: Weights = "4"
    activations: Activations = "8"
    target: TargetText = "onnxruntime"
    skip: Skip = ""
    tracer: TracerName = "export"


@dataclass(frozen=True)
class TuneFlags:
    """Options of `compile` and of `simulate`, by the names of `CompileOptions`."""

    weights: Weights = "4"
    activations: Activations = "8"
    schedule: Schedule = AUTO
    steps: Steps = None
    epochs: Epochs = None
    loss: Loss = AUTO
    train: Train = "all"
    recipe: RecipeText = AUTO
    target: TargetText = "onnxruntime"
    seed: Seed = 0
    strict: Strict = False
    skip: Skip = ""
    range_method: CalibrationRange = None
    calibration_samples: CalibrationSamples = None
    weight_range: WeightRange = None
    lr: LearningRate = None
    checkpoint_every: CheckpointEvery = None


@dataclass(frozen=True)
class CompileFlags(TuneFlags):
    """And how a model is captured."""

    tracer: TracerName = "export"


@dataclass(frozen=True)
class SimulateFlags(TuneFlags):
    """And what no file can hold."""

    dynamic: Dynamic = False


@dataclass(frozen=True)
class WatchFlags:
    """What looks inside a pipeline."""

    print_ir_before: PrintBefore = None
    print_ir_after: PrintAfter = None
    print_ir_after_all: PrintAll = False
    print_ir_after_change: PrintChange = False
    dump_ir: DumpIr = None
    time_passes: TimePasses = False
    verify_each: VerifyEach = True

    @contextmanager
    def instruments(self) -> Iterator[list[Instrument]]:
        """The instruments that the flags ask for; times are printed at the end, also of a pipeline that failed."""
        from fraqat_compiler.instruments import Timing, Verification, stderr_console

        timing = Timing()
        verification = [Verification()] if self.verify_each else []
        try:
            yield [*self._dump(), *verification, *([timing] if self.time_passes else [])]
        finally:
            if timing.seconds:
                stderr_console().print(timing.table())

    def _dump(self) -> list[Instrument]:
        from fraqat_compiler.instruments import IRDump

        before, after = self.print_ir_before or (), self.print_ir_after or ()
        always, changed = self.print_ir_after_all, self.print_ir_after_change
        if not (before or after or always or changed or self.dump_ir):
            return []
        _refuse_unknown([*before, *after])
        return [IRDump(before, after, after_all=always, after_change=changed, folder=self.dump_ir)]


def _refuse_unknown(names: list[str]) -> None:
    from fraqat_compiler.registry import find_pass

    for name in names:
        find_pass(name)


def grouped(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """A command whose parameters that are dataclasses are flags, one for each field."""
    hints = get_type_hints(command, include_extras=True)
    taken = inspect.signature(command).parameters
    groups: dict[str, type] = {name: hints[name] for name in taken if dataclasses.is_dataclass(hints[name])}

    @functools.wraps(command)
    def run(**flags: Any) -> _Result:
        made = {
            name: group(**{item.name: flags.pop(item.name) for item in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return command(**flags, **made)

    parameters = [
        flag
        for parameter in taken.values()
        for flag in _flags(parameter.replace(annotation=hints[parameter.name]), groups.get(parameter.name))
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {flag.name: flag.annotation for flag in parameters}
    return run


def _flags(parameter: inspect.Parameter, group: type | None) -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    if group is None:
        return [parameter.replace(kind=keyword)]
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(item.name, keyword, default=item.default, annotation=hints[item.name])
        for item in dataclasses.fields(group)
    ]
