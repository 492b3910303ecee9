"""Jobs: what to compile, and the data for it.

A job file is a Python file (or module) that defines

- `model()`: the torch.nn.Module,
- `example_inputs()`: a tuple of positional or a dict of keyword inputs,

and, where it can,

- `calibration_data()`: batches for activation ranges,
- `train_data()`: batches for the fine-tune,
- `loss(outputs, batch)`: a scalar tensor, for the loss `task`; then batches of `train_data()` may hold more than the
  model's inputs (positional entries after them, or further names), which only this function sees,
- `evaluate(run) -> dict[str, float]`: metrics of anything that is called like the model,
- `samples(run)`: an image array, uint8 (height, width) or (height, width, 3), for the report,
- `outputs = "logits"`: the outputs are logits of a distribution, so what they are tuned by unless `--loss` says
  otherwise is a divergence (`kl`), not a squared error.

A batch is a tuple of positional or a dict of keyword inputs. `file.py:function` names a function that returns a `Job`,
or an object or dict with the functions above. Modules beside a job file are importable while its code runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fraqat_compiler.errors import DataError, FraqatError, JobError, cause_of
from fraqat_compiler.siblings import siblings

Batch = Any
Run = Callable[..., Any]
Outputs = Literal["values", "logits"]
_REQUIRED = ("model", "example_inputs")
_OPTIONAL = ("calibration_data", "train_data", "loss", "evaluate", "samples")
_WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")
_FORMS = "A job is FILE.py, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION."


@dataclass(frozen=True)
class Job:
    """What to compile, and the data for it; see the module's docstring for the functions.

    Attributes:
        name: for the report.
        outputs: what the model's outputs are; a loss of the fine-tune follows from it.
    """

    name: str
    model: Callable[[], nn.Module]
    example_inputs: Callable[[], Any]
    calibration_data: Callable[[], Iterable[Batch]] | None = None
    train_data: Callable[[], Iterable[Batch]] | None = None
    loss: Callable[[Any, Batch], torch.Tensor] | None = None
    evaluate: Callable[[Run], dict[str, float]] | None = None
    samples: Callable[[Run], Any] | None = None
    outputs: Outputs = "values"

    def __post_init__(self) -> None:
        if self.outputs not in get_args(Outputs):
            raise JobError(
                f"the job's outputs are {self.outputs!r}.", f"Write {' or '.join(map(repr, get_args(Outputs)))}."
            )

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        example_inputs: Any,
        name: str | None = None,
        *,
        outputs: Outputs = "values",
        **functions: Any,
    ) -> Job:
        """A job for a module in memory; `functions` are the optional ones by name.

        Raises:
            JobError: no example inputs.
        """
        if example_inputs is None:
            raise JobError("a module is compiled on example inputs, and none were given.", "Pass example_inputs=(...).")
        given = {"model": lambda: model, "example_inputs": lambda: example_inputs, **functions}
        return _checked_job(name or type(model).__name__, given, outputs)

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

    def metrics(self, run: Run) -> dict[str, float]:
        """What `evaluate` measures of a model; tensors of one element become numbers.

        Raises:
            JobError: no function `evaluate`, or it returns something else than numbers by name.
        """
        assert self.evaluate is not None
        found = self.evaluate(run)
        try:
            return {str(name): float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise JobError(
                f"evaluate(run) returned {_brief(found)}, not numbers by name.",
                'Return a dict, as {"accuracy": 0.93}.',
            ) from error


def refuse_unfit(batch: Batch, example: Mapping[str, Any], index: int) -> None:
    """Raise DataError when a batch does not have the structure, shapes and types of the example inputs."""
    got = _structure(batch)
    if got.keys() != example.keys():
        raise DataError(
            f"calibration batch {index} has inputs ({', '.join(got) or 'none'}), expected ({', '.join(example)}).",
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
    if isinstance(batch, list | tuple):
        batch = tuple(batch)  # a named tuple is one of positional inputs too
    leaves = pytree.tree_flatten_with_path((batch,) if isinstance(batch, torch.Tensor) else batch)[0]
    return {_input_name(path): _kind(leaf) for path, leaf in leaves}


def _input_name(path: tuple[Any, ...]) -> str:
    """`0` or `mask`, then where in it: `cache[1]`."""
    first = path[0].key if isinstance(path[0], pytree.MappingKey) else path[0].idx
    return f"{first}{pytree.keystr(path[1:])}"


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
    if Path(source).suffix in _WEIGHT_FILES:
        raise JobError(
            f"{source} holds weights; compile needs the code around them too.",
            "Write a job file whose model() builds the module and loads them; see the README.",
        )
    if source.endswith(".onnx"):
        raise JobError(
            f"{source} is an ONNX file; compile starts from a PyTorch model.",
            "`fraqat opt` runs ONNX passes on such a file and `fraqat inspect` shows what it holds.",
        )
    origin = _Origin(text, Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    with origin.running():
        holder: Any = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
        if function:
            holder = _call(holder, function, text)
    return holder if isinstance(holder, Job) else _job_of(holder, function or job_name(source), origin)


def job_name(source: str) -> str:
    """What a job is called: its file, or the folder of a `job.py`; the last part of a module."""
    path = Path(source.partition(":")[0])
    if path.suffix != ".py":
        return str(path).rpartition(".")[2]
    return path.resolve().parent.name if path.stem == "job" else path.stem


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise JobError(f"there is no file {path}.", _FORMS)
    spec = importlib.util.spec_from_file_location(f"fraqat_job_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the job's classes look their module up
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise JobError(f"there is no module {name!r}.", _FORMS) from error
        raise


def _call(module: ModuleType, function: str, text: str) -> Any:
    if not callable(getattr(module, function, None)):
        raise JobError(f"{text}: the module defines no function {function}().")
    return getattr(module, function)()


def _job_of(holder: Any, name: str, origin: _Origin) -> Job:
    names = (*_REQUIRED, *_OPTIONAL, "weights")
    parts = holder if isinstance(holder, Mapping) else {key: getattr(holder, key, None) for key in (*names, "outputs")}
    functions = {key: part for key in names if callable(part := parts.get(key))}
    for required in _REQUIRED:
        if required not in functions:
            raise JobError(
                f"{origin.text} defines no {required}().", "A job defines model() and example_inputs(); see the README."
            )
    if "weights" in functions:
        raise JobError(
            f"{origin.text} defines weights(), and weights cannot be streamed from shards yet.",
            "Load them in model() and remove weights().",
        )
    guarded = {key: origin.guarded(function) for key, function in functions.items()}
    outputs = parts.get("outputs")
    return _checked_job(name, guarded, outputs if isinstance(outputs, str) else "values")


def _checked_job(name: str, functions: Mapping[str, Callable[..., Any]], outputs: Any) -> Job:
    checks = {"model": _module, "example_inputs": _inputs, "calibration_data": _batches, "train_data": _batches}
    checked = {key: _checked(key, function, checks.get(key)) for key, function in functions.items()}
    return Job(name=name, outputs=outputs, **checked)


def _checked(name: str, function: Callable[..., Any], refusal: Callable[[Any], str] | None) -> Callable[..., Any]:
    """The same function, which raises JobError where it returns something else than it should."""
    if refusal is None:
        return function

    def call() -> Any:
        result = function()
        wanted = refusal(result)
        if wanted:
            raise JobError(f"{name}() returned {_brief(result)}.", wanted)
        return result

    return call


def _module(result: Any) -> str:
    return "" if isinstance(result, nn.Module) else "Return a torch.nn.Module with its weights loaded into it."


def _inputs(result: Any) -> str:
    fits = isinstance(result, torch.Tensor | list | tuple | Mapping)
    plain = [leaf for leaf in pytree.tree_leaves(result) if hasattr(leaf, "__array__") and not torch.is_tensor(leaf)]
    if fits and not plain and all(leaf.numel() for leaf in pytree.tree_leaves(result) if torch.is_tensor(leaf)):
        return ""
    return "Return a tuple of positional or a dict of keyword inputs, as torch tensors that hold something."


def _batches(result: Any) -> str:
    return "" if isinstance(result, Iterable) else "Return or yield batches, tuples or dicts as example_inputs() gives."


def _brief(value: Any) -> str:
    """What a value is, short enough for a message."""
    leaves = pytree.tree_leaves(value)
    if not leaves or leaves[0] is value:
        return type(value).__name__
    inside = ", ".join(_kind(leaf) if torch.is_tensor(leaf) else type(leaf).__name__ for leaf in leaves[:3])
    return f"{type(value).__name__} of {inside}"


@dataclass(frozen=True)
class _Origin:
    """Where a job comes from.

    Attributes:
        text: as the user named it.
        folder: what its code imports from first.
    """

    text: str
    folder: Path

    @contextmanager
    def running(self) -> Iterator[None]:
        """The user's code runs: its folder is importable, and its errors become JobErrors that name its line."""
        try:
            with siblings(self.folder):
                yield
        except FraqatError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything, or leave
            kind, cause = type(error).__name__, cause_of(error)
            named = kind if cause == kind else f"{kind}: {cause}"
            raise JobError(f"{self.text}: {named}{_user_line(error)}.") from error

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, run as the user's code; an iterator that it returns stays lazy."""

        def call(*args: Any) -> Any:
            with self.running():
                result = function(*args)
            return self._guarded_iterator(result) if isinstance(result, Iterator) else result

        return call

    def _guarded_iterator(self, batches: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while True:
            with self.running():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch


def _user_line(error: BaseException) -> str:
    """` (file.py:12: code)` of the deepest frame that is neither ours nor a library's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _is_users(filename: str) -> bool:
    libraries = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    installed = {"site-packages", "dist-packages"} & set(Path(filename).parts)
    return not installed and not filename.startswith((*libraries, str(Path(__file__).parent), "<"))
