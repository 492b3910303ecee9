"""Values of an FX graph as JSON and back, without pickle and without running anything.

What JSON has no form for is an object with one key: `{"node": "add_1"}`, `{"tuple": [...]}`,
`{"dict": [[key, value], ...]}`, `{"slice": [...]}`, `{"float": "inf"}`, `{"dtype": "float32"}`,
`{"device": "cpu"}`, `{"memory_format": ...}`, `{"layout": ...}`. Functions are named and looked up, never imported:
registered torch operators, and the few Python functions listed here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fraqat_compiler.errors import VerificationError

_OPERATOR = re.compile(r"(?!aten\.from_file\.)[A-Za-z]\w*\.\w+\.\w+")  # from_file opens any file, even to write
_PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "eq", "ne", "lt", "le")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")},
}
_FUNCTION_NAMES = {function: name for name, function in _PYTHON_FUNCTIONS.items()}


def _named(kind: type) -> dict[str, Any]:
    """The constants of torch that are of a type, by their name without `torch.`."""
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


_CONSTANTS = {
    "dtype": _named(torch.dtype),
    "memory_format": _named(torch.memory_format),
    "layout": _named(torch.layout),
}
_CONSTANT_KINDS = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


def encode(value: object) -> Any:
    """JSON form of an argument.

    Raises:
        VerificationError: the value has none.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple | Mapping | slice):
        return _encode_container(value)
    return _encode_constant(value)


def _encode_container(value: list[Any] | tuple[Any, ...] | Mapping[Any, Any] | slice) -> Any:
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(element)] for key, element in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    elements = [encode(element) for element in value]
    return elements if isinstance(value, list) else {"tuple": elements}


def _encode_constant(value: object) -> Any:
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, word in _CONSTANT_KINDS.items():
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    raise VerificationError(f"a graph file cannot hold the value {value!r} of type {type(value).__name__}.")


def decode(form: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value of a JSON form; `nodes` are those that it may refer to.

    Raises:
        VerificationError, KeyError, TypeError, ValueError: the form is not one that `encode` gives.
    """
    if isinstance(form, list):
        return [decode(element, nodes) for element in form]
    if not isinstance(form, dict):
        return form
    ((word, content),) = form.items()
    if word == "node":
        return nodes[content]
    if word == "dict":
        return {decode(key, nodes): decode(element, nodes) for key, element in content}
    if word in ("tuple", "slice"):
        elements = (decode(element, nodes) for element in content)
        return tuple(elements) if word == "tuple" else slice(*elements)
    return _decode_constant(word, content)


def _decode_constant(word: str, content: Any) -> Any:
    if word == "float":
        return float(content)
    if word == "device":
        return torch.device(content)
    return _CONSTANTS[word][content]


def encode_dtype(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def decode_dtype(name: str) -> torch.dtype:
    """The dtype of a name; raises KeyError for a name that is no dtype."""
    dtype: torch.dtype = _CONSTANTS["dtype"][name]
    return dtype


def function_name(function: object) -> str:
    """The name of what a `call_function` node calls.

    Raises:
        VerificationError: it is neither a torch operator nor one of the listed Python functions.
    """
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    name = _FUNCTION_NAMES.get(function) if callable(function) else None
    if name is None:
        raise VerificationError(
            f"a graph file cannot hold a call of {function}.", "Only torch operators (such as aten) can be stored."
        )
    return name


def find_function(name: str) -> Callable[..., Any]:
    """The function that `function_name` named.

    Raises:
        VerificationError: no such operator is registered in this process.
    """
    if name in _PYTHON_FUNCTIONS:
        return _PYTHON_FUNCTIONS[name]
    overload = _registered_overload(name) if _OPERATOR.fullmatch(name) else None
    if overload is None:
        raise VerificationError(
            f"the graph calls {name!r}, which is not a registered torch operator.",
            "Import the package that registers it first.",
        )
    return overload


def _registered_overload(name: str) -> torch._ops.OpOverload | None:
    found: object = torch.ops
    for part, kind in zip(name.split("."), _OPERATOR_LEVELS, strict=True):
        found = getattr(found, part, None)
        if not isinstance(found, kind):
            return None
    return found if isinstance(found, torch._ops.OpOverload) else None


_OPERATOR_LEVELS = (torch._ops._OpNamespace, torch._ops.OpOverloadPacket, torch._ops.OpOverload)
