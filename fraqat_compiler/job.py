"""Jobs: what to compile, and the data for it.

A job file is a Python file (or module) that defines

- `model()`: the torch.nn.Module,
- `example_inputs()`: a tuple of positional or a dict of keyword inputs,

and, where it can,

- `calibration_data()`: batches for activation ranges,
- `train_data()`: batches for the fine-tune,
- `evaluate(run) -> dict[str, float]`: metrics of anything that is called like the model,
- `samples(run)`: an image array, uint8 (height, width) or (height, width, 3), for the report.

A batch is a tuple of positional or a dict of keyword inputs. `file.py:function` names a function that returns such an
object, or a `Job`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import DataError, JobError

Batch = Any
Run = Callable[..., Any]
_OPTIONAL = ("calibration_data", "train_data", "evaluate", "samples", "weights")


@dataclass(frozen=True)
class Job:
    """What to compile, and the data for it; see the module's docstring for the functions.

    Attributes:
        name: for the report.
        folder: of the job file, where sibling modules are found while its functions run; None for a Job made in code.
    """

    name: str
    model: Callable[[], nn.Module]
    example_inputs: Callable[[], Any]
    calibration_data: Callable[[], Iterable[Batch]] | None = None
    train_data: Callable[[], Iterable[Batch]] | None = None
    evaluate: Callable[[Run], dict[str, float]] | None = None
    samples: Callable[[Run], Any] | None = None
    weights: Callable[[], str | Path] | None = None
    folder: Path | None = None

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any, name: str | None = None, **functions: Any) -> Job:
        """A job for a module in memory; `functions` are the optional ones by name.

        Raises:
            JobError: no example inputs.
        """
        if example_inputs is None:
            raise JobError("a module is compiled on example inputs, and none were given.", "Pass example_inputs=(...).")
        return cls(name or type(model).__name__, lambda: model, lambda: example_inputs, **functions)

    def calibration_batches(self) -> Iterator[Batch]:
        """Calibration batches, each held against the example inputs.

        Raises:
            DataError: a batch of another structure, shape or type, naming batch and input.
        """
        if self.calibration_data is None:
            return
        example = _structure(self.example_inputs())
        for index, batch in enumerate(self.calibration_data()):
            refuse_unfit(batch, example, index)
            yield batch


def refuse_unfit(batch: Batch, example: Mapping[str, Any], index: int) -> None:
    """Raise DataError when a batch does not have the structure, shapes and types of the example inputs."""
    got = _structure(batch)
    if got.keys() != example.keys():
        raise DataError(
            f"calibration batch {index} has inputs {', '.join(got) or 'none'}; expected {', '.join(example)}.",
            "Yield tuples of positional or dicts of keyword inputs, as example_inputs() returns.",
        )
    for name, leaf in got.items():
        if leaf != example[name]:
            raise DataError(
                f"calibration batch {index}: input {name} is {leaf}, expected {example[name]}.",
                "Every batch needs the shapes and types of example_inputs().",
            )


def _structure(batch: Batch) -> dict[str, Any]:
    """What each leaf of a batch is, by its path; tensors as dtype and shape."""
    if isinstance(batch, list):
        batch = tuple(batch)
    leaves = pytree.tree_flatten_with_path((batch,) if isinstance(batch, torch.Tensor) else batch)[0]
    return {pytree.keystr(path): _kind(leaf) for path, leaf in leaves}


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)


def load_job(text: str) -> Job:
    """Load `file.py`, `file.py:function`, or `package.module:function`.

    Raises:
        JobError: no such file or function, an error inside it (with the user's line), or a part that is missing.
    """
    source, _, function = text.partition(":")
    if source.endswith(".onnx"):
        raise JobError(
            f"{source} is an ONNX file; compile starts from a PyTorch model.",
            "`fraqat opt` runs ONNX passes on such a file and `fraqat inspect` shows what it holds.",
        )
    if source.endswith(".py"):
        module, folder = _load_file(Path(source)), Path(source).resolve().parent
    else:
        module, folder = _load_module(source, text), None
    holder: Any = module
    name = Path(source).parent.name if Path(source).stem == "job" else Path(source).stem
    if function:
        holder, name = _call(module, function, text, folder), function
    return holder if isinstance(holder, Job) else _job_of(holder, name or Path(source).stem, text, folder)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise JobError(f"there is no file {path}.", "A job is FILE.py, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.")
    spec = importlib.util.spec_from_file_location(f"fraqat_job_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the job's classes look their module up
    with _siblings(path.resolve().parent), _user_errors(str(path)):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str, text: str) -> ModuleType:
    with _siblings(Path.cwd()), _user_errors(text):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise JobError(
                    f"there is no module {name!r}.", "A job is FILE.py, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION."
                ) from error
            raise


def _call(module: ModuleType, function: str, text: str, folder: Path | None) -> Any:
    if not callable(getattr(module, function, None)):
        raise JobError(f"{text}: the module defines no function {function}().")
    with _siblings(folder), _user_errors(text):
        return getattr(module, function)()


def _job_of(holder: Any, name: str, text: str, folder: Path | None) -> Job:
    get = holder.get if isinstance(holder, Mapping) else lambda key: getattr(holder, key, None)
    for required in ("model", "example_inputs"):
        if not callable(get(required)):
            raise JobError(
                f"{text} defines no {required}().", "A job defines model() and example_inputs(); see the README."
            )
    functions = {key: get(key) for key in ("model", "example_inputs", *_OPTIONAL)}
    guarded = {key: _guarded(value, text, folder) for key, value in functions.items() if callable(value)}
    return Job(name=name, folder=folder, **guarded)


def _guarded(function: Callable[..., Any], text: str, folder: Path | None) -> Callable[..., Any]:
    """The function with its folder importable and its errors told with the user's line; iterators stay lazy."""

    def call(*args: Any) -> Any:
        with _siblings(folder), _user_errors(text):
            result = function(*args)
        return _guarded_iterator(result, text, folder) if isinstance(result, Iterator) else result

    return call


def _guarded_iterator(batches: Iterator[Any], text: str, folder: Path | None) -> Iterator[Any]:
    end = object()
    while True:
        with _siblings(folder), _user_errors(text):
            batch = next(batches, end)
        if batch is end:
            return
        yield batch


@contextmanager
def _siblings(folder: Path | None) -> Iterator[None]:
    """Let the job's own folder be imported from, first of all places."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _user_errors(text: str) -> Iterator[None]:
    """Turn an error of the user's code into a JobError that names its line; our own errors pass."""
    from fraqat_compiler.errors import FraqatError

    try:
        yield
    except FraqatError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise JobError(f"{text}: {type(error).__name__}: {error}{_user_line(error)}.") from error


def _user_line(error: Exception) -> str:
    """` (file.py:12: code)` of the deepest frame outside this package and the standard library's importer."""
    own = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(own) and "importlib" not in frame.filename and frame.filename[0] != "<"
    ]
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}:{error.lineno})"
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
