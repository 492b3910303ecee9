"""The command line, `fraqat`.

Exit status: 0 done; 1 the compile failed or something did not hold; 2 wrong usage; 130 interrupted. Progress goes to
stderr, results to stdout. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fraqat_compiler.answers import Answer, answering
from fraqat_compiler.cli_options import (
    CheckFlags,
    CompileFlags,
    Debug,
    Folder,
    JobText,
    Json,
    Output,
    Resume,
    SimulateFlags,
    WatchFlags,
    grouped,
)

if TYPE_CHECKING:
    from fraqat_compiler.registry import Kind

app = typer.Typer(
    name="fraqat",
    help="Compile trained PyTorch models to packed INT4/INT8 for phone NPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("compile")
@answering
@grouped
def compile_job(
    job: JobText,
    *,
    output: Output = None,
    flags: CompileFlags,
    resume: Resume = False,
    watch: WatchFlags,
    as_json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Compile a model: capture, quantize, fine-tune, lower, compile for a target, verify and report."""
    from fraqat_compiler import terminal
    from fraqat_compiler.compiler import compile as compile_for_target
    from fraqat_compiler.job import job_name
    from fraqat_compiler.progress import RichProgress

    folder = output or Path("out") / job_name(job)
    with watch.instruments() as instruments, _kept_on_interrupt(folder):
        result = compile_for_target(
            job, output=folder, resume=resume, progress=RichProgress(), instruments=instruments, **vars(flags)
        )
    return Answer(result.report, lambda console: terminal.show_report(console, result.report, folder))


@app.command("simulate")
@answering
@grouped
def simulate_job(
    job: JobText,
    *,
    output: Output = None,
    flags: SimulateFlags,
    resume: Resume = False,
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
        result = simulate(job, output=folder, resume=resume, progress=RichProgress(), **vars(flags))
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


@app.command("check")
@answering
@grouped
def check_job(job: JobText, flags: CheckFlags, as_json: Json = False, debug: Debug = False) -> Answer:
    """Ask a target about a model before any calibration or training; status 1 when it refuses an op."""
    from fraqat_compiler import terminal
    from fraqat_compiler.precheck import check
    from fraqat_compiler.progress import RichProgress

    ops = [op.to_json() for op in check(job, progress=RichProgress(), **vars(flags))]
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
@grouped
def run_pipeline(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, or a folder with a stored graph.")],
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", metavar="TEXT", help="Passes, with commas.")],
    watch: WatchFlags,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the graph goes: FILE.onnx, or a folder for FX.")
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="TEXT", help="Target that the passes ask.")] = None,
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
    from fraqat_compiler.replay import layers_of_target, taken_together, verify_folder

    progress = RichProgress()
    found = verify_folder(folder, on_target=on_target, progress=progress)
    compared = layers_of_target(folder, progress) if layers else []
    found += taken_together(folder, compared) if layers else []
    checks = [dataclasses.asdict(check) for check in found]
    ops = [layer.to_json() for layer in compared]

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
