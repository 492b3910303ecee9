"""Reproducers: a folder from which a failed pass can be run again."""

from __future__ import annotations

import shlex
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from torch import fx

from fraqat_compiler import onnx_io
from fraqat_compiler.errors import FraqatError, OutputError, UsageError
from fraqat_compiler.fx_io import GRAPH_FILE, Description, describe, load_graph, save_inputs, write_description
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pipeline_text import to_text

MODEL_FILE = "model.onnx"
PIPELINE_FILE = "pipeline.txt"
ERROR_FILE = "error.txt"
README_FILE = "README.md"

README = """# Reproducer

A pass failed (see error.txt). This folder holds the graph as it was before that pass, and in pipeline.txt the passes
from that one on. Run it again, from inside this folder:

    {command}

Tensors that the pass had changed in place when it failed are stored as it left them.
"""


@dataclass(frozen=True)
class Snapshot:
    """The structure of a graph at one moment, its tensors shared; cheap to take before every pass.

    Attributes:
        graph: what will be written.
        problem: why nothing can be written, when `graph` is None.
    """

    graph: Description | gs.Graph | None
    problem: str = ""

    @classmethod
    def take(cls, model: fx.GraphModule | gs.Graph) -> Snapshot:
        if isinstance(model, gs.Graph):
            return cls(model.copy())
        try:
            return cls(describe(model))
        except FraqatError as error:
            return cls(None, str(error))


def write_reproducer(folder: Path, snapshot: Snapshot, pipeline: str, ctx: PassContext, error: Exception) -> str:
    """Write a reproducer, in place of an earlier one.

    It runs while `error` is on its way to the user, so its own failures become part of the text that it returns.

    Args:
        folder: where; made with its parents.
        snapshot: the graph before the failed pass.
        pipeline: text of the passes from the failed one on.
        ctx: its example inputs and target are kept too.
        error: what the pass raised.

    Returns:
        A note for the user: where the reproducer lies, or why there is none.
    """
    if snapshot.graph is None:
        return f"no reproducer was written: {snapshot.problem}"
    try:
        _replace(folder, snapshot.graph, pipeline, ctx, error)
    except Exception as problem:  # anything from a full disk to an odd input; the first error matters more
        return f"no reproducer was written: {type(problem).__name__}: {problem}"
    return f"reproducer: {folder} (its {README_FILE} has the command)"


def _replace(folder: Path, graph: Description | gs.Graph, pipeline: str, ctx: PassContext, error: Exception) -> None:
    """Write beside the folder first, so that what stands there is always whole."""
    if folder.exists() and not (folder / ERROR_FILE).exists():
        raise OutputError(f"{folder} exists and is no reproducer.")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(partial, graph, pipeline, ctx, error)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _write(folder: Path, graph: Description | gs.Graph, pipeline: str, ctx: PassContext, error: Exception) -> None:
    if isinstance(graph, gs.Graph):
        _save_onnx(graph, folder / MODEL_FILE)
    else:
        write_description(graph, folder)
    if ctx.example_inputs is not None:
        save_inputs(ctx.example_inputs, folder)
    target = "" if ctx.target is None else f" --target {shlex.quote(to_text(ctx.target))}"
    command = f"fraqat opt . -p {shlex.quote(pipeline)}{target}"
    (folder / README_FILE).write_text(README.format(command=command), encoding="utf-8")
    (folder / PIPELINE_FILE).write_text(pipeline + "\n", encoding="utf-8")
    (folder / ERROR_FILE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def _save_onnx(graph: gs.Graph, path: Path) -> None:
    """With shapes of intermediate tensors, which a finished file leaves out but the passes look at."""
    constants = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
    large = sum(tensor._values.nbytes for tensor in constants) > onnx_io.MAX_INLINE_BYTES
    model = gs.export_onnx(graph, do_type_check=False)
    onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data")


def load_model(path: Path) -> fx.GraphModule | gs.Graph:
    """Open a graph: a folder that holds a stored FX graph or a `model.onnx` (a reproducer, a compile's output), or an
    ONNX file.

    Raises:
        UsageError: the path is none of these.
        VerificationError: the files are damaged.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist.")
    if (path / GRAPH_FILE).is_file():
        return load_graph(path)
    if (path / MODEL_FILE).is_file():
        return onnx_io.load(path / MODEL_FILE)
    if path.is_file() and path.suffix == ".onnx":
        return onnx_io.load(path)
    raise UsageError(f"{path} holds no graph.", f"Give an .onnx file, or a folder with {GRAPH_FILE} or {MODEL_FILE}.")
