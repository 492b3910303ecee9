"""The command line, `fraqat`.

Exit status: 0 done; 1 the compile failed or something did not hold; 2 wrong usage; 130 interrupted. Progress goes to
stderr, results to stdout. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fraqat_compiler.answers import Answer, answering
from fraqat_compiler.default_recipe import AUTO
from fraqat_compiler.quant_spec import RangeMethod

if TYPE_CHECKING:
    from fraqat_compiler.instruments import Instrument
    from fraqat_compiler.registry import Kind

app = typer.Typer(
    name="fraqat",
    help="Compile trained PyTorch models to packed INT4/INT8 for phone NPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
        help="How activation ranges follow from the data (default: minmax; mse with a fine-tune).",
    ),
]
CalibrationSamples = Annotated[
    int | None, typer.Option(min=1, help="Samples of the data that are used (default: all).")
]
WeightRange = Annotated[
    RangeMethod | None, typer.Option(help="The same for weights (default: mse; minmax with a fine-tune).")
]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_TUNE)]
CheckpointEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_TUNE)]
VerifyEach = Annotated[
    bool,
    typer.Option("--verify-each/--no-verify-each", help="Verify the graph after every pass.", rich_help_panel=_IR),
]


@app.command("compile")
@answering
def compile_job(
    job: JobText,
    output: Output = None,
    weights: Weights = "4",
    activations: Activations = "8",
    schedule: Schedule = AUTO,
    steps: Steps = None,
    epochs: Epochs = None,
    loss: Loss = AUTO,
    train: Train = "all",
    recipe: RecipeText = AUTO,
    target: TargetText = "onnxruntime",
    seed: Seed = 0,
    resume: Resume = False,
    strict: Strict = False,
    skip: Skip = "",
    range_method: CalibrationRange = None,
    calibration_samples: CalibrationSamples = None,
    weight_range: WeightRange = None,
    lr: LearningRate = None,
    checkpoint_every: CheckpointEvery = None,
    tracer: Annotated[Literal["export", "symbolic_trace"], typer.Option(help="How the model is captured.")] = "export",
    print_ir_before: PrintBefore = None,
    print_ir_after: PrintAfter = None,
    print_ir_after_all: PrintAll = False,
    print_ir_after_change: PrintChange = False,
    dump_ir: DumpIr = None,
    time_passes: TimePasses = False,
    verify_each: VerifyEach = True,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Compile a model: capture, quantize, fine-tune, lower, compile for a target, verify and report."""
    from fraqat_compiler import terminal
    from fraqat_compiler.compiler import compile as compile_for_target
    from fraqat_compiler.job import job_name
    from fraqat_compiler.progress import RichProgress

    folder = output or Path("out") / job_name(job)
    watch = _Watch(
        print_ir_before, print_ir_after, print_ir_after_all, print_ir_after_change, dump_ir, time_passes, verify_each
    )
    with watch.instruments() as instruments, _kept_on_interrupt(folder):
        result = compile_for_target(
            job,
            output=folder,
            resume=resume,
            progress=RichProgress(),
            instruments=instruments,
            weights=weights,
            activations=activations,
            schedule=schedule,
            steps=steps,
            epochs=epochs,
            loss=loss,
            train=train,
            recipe=recipe,
            target=target,
            seed=seed,
            strict=strict,
            skip=skip,
            range_method=range_method,
            calibration_samples=calibration_samples,
            weight_range=weight_range,
            lr=lr,
            tracer=tracer,
            checkpoint_every=checkpoint_every,
        )
    return Answer(result.report, lambda console: terminal.show_report(console, result.report, folder))


@app.command("simulate")
@answering
def simulate_job(
    job: JobText,
    output: Output = None,
    weights: Weights = "4",
    activations: Activations = "8",
    schedule: Schedule = AUTO,
    steps: Steps = None,
    epochs: Epochs = None,
    loss: Loss = AUTO,
    train: Train = "all",
    recipe: RecipeText = AUTO,
    target: TargetText = "onnxruntime",
    seed: Seed = 0,
    resume: Resume = False,
    strict: Strict = False,
    skip: Skip = "",
    range_method: CalibrationRange = None,
    calibration_samples: CalibrationSamples = None,
    weight_range: WeightRange = None,
    lr: LearningRate = None,
    checkpoint_every: CheckpointEvery = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Activation ranges from every token anew, as no file can hold them.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Quantize and fine-tune a model and measure it in torch: also at widths that no file can hold (4.5 bits)."""
    from fraqat_compiler import terminal
    from fraqat_compiler.job import job_name
    from fraqat_compiler.progress import RichProgress
    from fraqat_compiler.simulation import simulate

    folder = output or Path("out") / job_name(job)
    with _kept_on_interrupt(folder):
        result = simulate(
            job,
            output=folder,
            resume=resume,
            progress=RichProgress(),
            weights=weights,
            activations=activations,
            schedule=schedule,
            steps=steps,
            epochs=epochs,
            loss=loss,
            train=train,
            recipe=recipe,
            target=target,
            seed=seed,
            strict=strict,
            skip=skip,
            range_method=range_method,
            calibration_samples=calibration_samples,
            weight_range=weight_range,
            lr=lr,
            checkpoint_every=checkpoint_every,
            dynamic=dynamic,
        )
    return Answer(result.report, lambda console: terminal.show_simulation(console, result.report, folder))


@contextmanager
def _kept_on_interrupt(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C what is kept."""
    from fraqat_compiler.output_folder import CHECKPOINTS, REMOTE_JOBS

    try:
        yield
    except KeyboardInterrupt as error:
        found = {
            "checkpoints": (folder / CHECKPOINTS).glob("step-*"),
            "remote jobs": (folder / REMOTE_JOBS).glob("*.json"),
        }
        kept = " and ".join(name for name, files in found.items() if any(files))
        error.add_note(f"{kept} are kept in {folder}; --resume goes on from there" if kept else "nothing was kept")
        raise


@dataclasses.dataclass(frozen=True)
class _Watch:
    """The flags that look inside a pipeline."""

    before: list[str] | None
    after: list[str] | None
    after_all: bool
    after_change: bool
    folder: Path | None
    time_passes: bool
    verify_each: bool

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

        before, after = self.before or (), self.after or ()
        if not (before or after or self.after_all or self.after_change or self.folder):
            return []
        _refuse_unknown([*before, *after])
        return [IRDump(before, after, after_all=self.after_all, after_change=self.after_change, folder=self.folder)]


def _refuse_unknown(names: list[str]) -> None:
    from fraqat_compiler.registry import find_pass

    for name in names:
        find_pass(name)


@app.command("check")
@answering
def check_job(
    job: Annotated[str, typer.Argument(metavar="JOB", help="As for compile.")],
    weights: Weights = "4",
    activations: Activations = "8",
    target: Annotated[str, typer.Option(metavar="TEXT", help="Target, as in htp{soc=sm8750}.")] = "onnxruntime",
    skip: Annotated[str, typer.Option(metavar="NAMES", help="Modules left in float, with commas; * matches.")] = "",
    tracer: Annotated[Literal["export", "symbolic_trace"], typer.Option(help="How the model is captured.")] = "export",
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Ask a target about a model before any calibration or training; status 1 when it refuses an op."""
    from fraqat_compiler import terminal
    from fraqat_compiler.precheck import check
    from fraqat_compiler.progress import RichProgress

    options = {"weights": weights, "activations": activations, "target": target, "skip": skip, "tracer": tracer}
    ops = [op.to_json() for op in check(job, progress=RichProgress(), **options)]
    holds = not any(op["verdict"] == "refused" for op in ops)
    return Answer({"holds": holds, "ops": ops}, lambda console: terminal.show_checked(console, ops), holds)


@app.command("passes")
@answering
def list_passes(
    name: Annotated[str | None, typer.Argument(metavar="[PASS]", help="Show this pass's documentation.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """List the passes, or show what one does and its options."""
    return _registered("passes", name)


@app.command("targets")
@answering
def list_targets(
    name: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="Show this target's documentation.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """List the targets, or show what one is and its options."""
    return _registered("targets", name)


def _registered(kind: Kind, name: str | None) -> Answer:
    from fraqat_compiler import registry, terminal

    if name is not None:
        facts = _documentation(kind, name)
        return Answer(facts, lambda console: terminal.show_documentation(console, facts))
    rows = [dataclasses.asdict(row) for row in registry.available(kind)]
    return Answer(rows, lambda console: terminal.show_registered(console, kind, rows))


def _documentation(kind: Kind, name: str) -> dict[str, Any]:
    import inspect

    from fraqat_compiler import registry
    from fraqat_compiler.pipeline_text import options_of

    found = registry.find_pass(name) if kind == "passes" else registry.find_target(name)
    facts = {"name": name, "doc": inspect.cleandoc(found.__doc__ or ""), "options": options_of(found)}
    return facts if kind == "passes" else facts | {"missing": registry.find_target(name).missing()}


@app.command("opt")
@answering
def run_pipeline(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, or a folder with a stored graph.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", metavar="TEXT", help="Passes, with commas.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the graph goes: FILE.onnx, or a folder for FX.")
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="TEXT", help="Target that the passes ask.")] = None,
    print_ir_before: PrintBefore = None,
    print_ir_after: PrintAfter = None,
    print_ir_after_all: PrintAll = False,
    print_ir_after_change: PrintChange = False,
    dump_ir: DumpIr = None,
    time_passes: TimePasses = False,
    verify_each: VerifyEach = True,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Run passes on a graph: an ONNX file, or what a failed compile left in its reproducer. Prints the graph."""
    from fraqat_compiler import terminal
    from fraqat_compiler.fx_io import load_inputs
    from fraqat_compiler.ir_text import listing
    from fraqat_compiler.pass_base import PassContext
    from fraqat_compiler.pass_manager import PassManager
    from fraqat_compiler.registry import parse_target
    from fraqat_compiler.reproducer import load_model

    manager = PassManager.from_text(pipeline)
    context = PassContext(parse_target(target) if target else None, load_inputs(model))
    watch = _Watch(
        print_ir_before, print_ir_after, print_ir_after_all, print_ir_after_change, dump_ir, time_passes, verify_each
    )
    with watch.instruments() as instruments:
        result = manager.run(load_model(model), context, instruments)
    records = [record.to_json() for record in result.records]
    data = {"pipeline": str(manager), "passes": records}
    if output is None:
        return Answer(data, lambda console: console.print(listing(result.model), markup=False, soft_wrap=True, end=""))
    _save(result.model, output)
    return Answer(data, lambda console: console.print(terminal.pass_table(records)))


def _save(model: Any, path: Path) -> None:
    from torch.fx import GraphModule

    from fraqat_compiler import fx_io, onnx_io
    from fraqat_compiler.errors import UsageError

    is_fx = isinstance(model, GraphModule)
    if is_fx == (path.suffix == ".onnx"):
        wanted = "a folder for an FX graph" if is_fx else "FILE.onnx for an ONNX graph"
        raise UsageError(f"the graph cannot be written to {path}.", f"Name {wanted} with -o.")
    if is_fx:
        fx_io.save_graph(model, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_io.save(model, path)


@app.command("inspect")
@answering
def inspect_path(
    path: Annotated[str, typer.Argument(metavar="DIR|MODEL|JOB", help="A compile's folder, a graph or a job.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Show the report of a compile, what a graph consists of, or the modules of a job's model."""
    from fraqat_compiler import inspection, terminal
    from fraqat_compiler.report import REPORT_FILE

    if (Path(path) / REPORT_FILE).is_file():
        return _report_of(Path(path))
    if path.endswith(".py") or ":" in path:
        from fraqat_compiler.job import load_job

        facts = inspection.inspect_module(load_job(path).model())
    else:
        facts = inspection.inspect_graph(Path(path))
    return Answer(facts, lambda console: terminal.show_graph(console, facts))


def _report_of(folder: Path) -> Answer:
    from fraqat_compiler import terminal
    from fraqat_compiler.report import read_report

    report = read_report(folder)

    def show(console: Any) -> None:
        console.print(terminal.layer_table(report["layers"]))
        console.print(terminal.pass_table(report["passes"]))
        terminal.show_report(console, report, folder)

    return Answer(report, show)


@app.command("explain")
@answering
def explain_layer(
    folder: Folder,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A layer of the report, or a module that holds some.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Show what became of a layer: its bits, the passes that touched it, its part of the file, its cost."""
    from fraqat_compiler import terminal
    from fraqat_compiler.queries import explain

    facts = explain(folder, node)
    return Answer(facts, lambda console: terminal.show_explanation(console, facts))


@app.command("verify")
@answering
def verify_output(
    folder: Folder,
    on_target: Annotated[bool, typer.Option("--target/--no-target", help="Run on the target too.")] = True,
    layers: Annotated[bool, typer.Option("--layers", help="Compare each op on the target with the file's.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Verify a compile's files, and that they still compute what its report says; status 1 when they do not."""
    from fraqat_compiler import terminal
    from fraqat_compiler.progress import RichProgress
    from fraqat_compiler.replay import layers_of_target, verify_folder

    progress = RichProgress()
    found = verify_folder(folder, on_target=on_target, progress=progress)
    checks = [dataclasses.asdict(check) for check in found]
    ops = [layer.to_json() for layer in layers_of_target(folder, progress)] if layers else []

    def show(console: Any) -> None:
        terminal.show_checks(console, checks)
        if layers:
            terminal.show_layers(console, ops)

    holds = all(check["holds"] for check in checks) and not any(op["is_wrong"] for op in ops)
    return Answer({"holds": holds, "checks": checks} | ({"layers": ops} if layers else {}), show, holds)


@app.command("profile")
@answering
def profile_output(
    folder: Folder,
    ops: Annotated[int, typer.Option(min=0, help="How many ops to show.")] = 20,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Profile a compiled artifact on its target, or on the nearest thing to it here; estimate the hardware's time."""
    from fraqat_compiler import terminal
    from fraqat_compiler.progress import RichProgress
    from fraqat_compiler.replay import estimate_folder, profile_folder

    profile, estimate = dataclasses.asdict(profile_folder(folder, RichProgress())), estimate_folder(folder)
    profile["estimate"] = dataclasses.asdict(estimate) if estimate else None
    return Answer(profile, lambda console: terminal.show_profile(console, profile, ops))


@app.command("bundle")
@answering
def bundle_output(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to make.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Make a folder that runs on the hardware: artifact, one sample with its outputs, manifest, commands."""
    from fraqat_compiler import terminal
    from fraqat_compiler.bundling import bundle
    from fraqat_compiler.progress import RichProgress

    files = bundle(folder, output, RichProgress())
    return Answer({"files": files}, lambda console: console.print(terminal.lines(files), soft_wrap=True))


@app.command("diff")
@answering
def diff_outputs(
    first: Folder,
    second: Annotated[Path, typer.Argument(metavar="DIR", help="Another one.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Show how two compiles differ, measured times aside; status 1 when they do."""
    from fraqat_compiler import terminal
    from fraqat_compiler.queries import differences

    rows = differences(first, second)
    return Answer(rows, lambda console: terminal.show_differences(console, rows), holds=not rows)


@app.command("doctor")
@answering
def examine(as_json: Json = False, debug: Debug = False) -> Answer:
    """Show what works here, what is missing, and what to install."""
    from fraqat_compiler import terminal
    from fraqat_compiler.doctor import diagnose

    rows = [dataclasses.asdict(diagnosis) for diagnosis in diagnose()]
    return Answer(rows, lambda console: terminal.show_diagnoses(console, rows))


def main() -> None:
    """Entry point of `fraqat`."""
    app()
