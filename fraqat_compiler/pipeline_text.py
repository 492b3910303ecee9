r"""Pipeline text, the one grammar that passes and targets share.

    pipeline = item ("," item)*          insert-fake-quant{weights=4 skip="a b"},export-onnx
    item     = name ("{" option* "}")?   htp{soc=sm8750 vtcm-mb=8}
    option   = name "=" value
    value    = characters other than blanks, braces and quotes, or "quoted" with the escapes \" and \\

Options are the fields of a frozen dataclass: `vtcm-mb` is the field `vtcm_mb`, and its type converts the value.
Printing leaves defaults out, and what it prints parses back to an equal object.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fraqat_compiler.errors import PipelineSyntaxError, UsageError

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_BARE = re.compile(r'[^\s{}"]+')
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_BLANKS = re.compile(r"\s*")
_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class Position:
    """A place in a text, for error messages."""

    text: str
    offset: int

    def pointing(self, problem: str) -> str:
        """The problem, and below it the line with a caret under the place."""
        start = self.text.rfind("\n", 0, self.offset) + 1
        line = self.text[start:].partition("\n")[0].replace("\t", " ")
        return f"{problem}\n  {line}\n  {' ' * (self.offset - start)}^"


@dataclass(frozen=True)
class Option:
    """One `name=value`; `quoted` tells the text "none" from the value none."""

    name: str
    value: str
    quoted: bool
    position: Position


@dataclass(frozen=True)
class Item:
    """One pass or target as written: a name and its options, not yet looked up."""

    name: str
    options: tuple[Option, ...]
    position: Position


class _Scanner:
    """Reads a text from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.offset = 0
        self.skip_blanks()

    @property
    def position(self) -> Position:
        return Position(self.text, self.offset)

    def at_end(self) -> bool:
        return self.offset == len(self.text)

    def skip_blanks(self) -> None:
        self.take(_BLANKS)

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.offset)
        if match is not None:
            self.offset = match.end()
        return match

    def accept(self, symbol: str) -> bool:
        if not self.text.startswith(symbol, self.offset):
            return False
        self.offset += len(symbol)
        return True

    def expect_name(self, what: str) -> str:
        match = self.take(_NAME)
        if match is None:
            raise self.error(f"expected {what}")
        return match.group()

    def error(self, problem: str) -> PipelineSyntaxError:
        found = "the end of the text" if self.at_end() else f"{self.text[self.offset]!r}"
        return PipelineSyntaxError(self.position.pointing(f"{problem}, found {found}:"))


def parse(text: str) -> tuple[Item, ...]:
    """The items of a pipeline; blank text is an empty pipeline.

    Raises:
        PipelineSyntaxError: the text does not follow the grammar; the message points at the place.
    """
    scanner = _Scanner(text)
    if scanner.at_end():
        return ()
    items = [_item(scanner)]
    while scanner.accept(","):
        scanner.skip_blanks()
        items.append(_item(scanner))
    if not scanner.at_end():
        raise scanner.error('expected "," or the end of the text')
    return tuple(items)


def parse_one(text: str, what: str) -> Item:
    """The only item of a text; `what` names its kind in messages ("a target").

    Raises:
        PipelineSyntaxError: there is none, or more than one.
    """
    items = parse(text)
    if not items:
        raise _Scanner(text).error(f"expected the name of {what}")
    if len(items) > 1:
        raise PipelineSyntaxError(items[1].position.pointing(f"expected one item, {what}, found another:"))
    return items[0]


def _item(scanner: _Scanner) -> Item:
    position = scanner.position
    name = scanner.expect_name("a name")
    scanner.skip_blanks()
    options = _options(scanner) if scanner.accept("{") else ()
    scanner.skip_blanks()
    return Item(name, options, position)


def _options(scanner: _Scanner) -> tuple[Option, ...]:
    options: list[Option] = []
    scanner.skip_blanks()
    while not scanner.accept("}"):
        options.append(_option(scanner))
    return tuple(options)


def _option(scanner: _Scanner) -> Option:
    position = scanner.position
    name = scanner.expect_name('an option or "}"')
    if not scanner.accept("="):
        raise scanner.error(f'expected "=" after the option "{name}"')
    value, quoted = _value(scanner, name)
    end = scanner.offset
    scanner.skip_blanks()
    if scanner.offset == end and not scanner.text.startswith("}", end):
        raise scanner.error(f'expected a blank or "}}" after the value of "{name}"')
    return Option(name, value, quoted, position)


def _value(scanner: _Scanner, name: str) -> tuple[str, bool]:
    quoted = scanner.take(_QUOTED)
    if quoted is not None:
        return re.sub(r"\\(.)", r"\1", quoted.group(1)), True
    bare = scanner.take(_BARE)
    if bare is not None:
        return bare.group(), False
    problem = "expected a closing quote for" if scanner.text.startswith('"', scanner.offset) else "expected"
    raise scanner.error(f'{problem} the value of "{name}"')


def build(cls: type[T], options: Iterable[Option] = ()) -> T:
    """An object of the dataclass `cls` with these options.

    Raises:
        UsageError: an option is unknown, given twice, missing, or not of its field's type.
    """
    types_by_field = option_types(cls)
    values: dict[str, Any] = {}
    for option in options:
        field = option.name.replace("-", "_")
        if field not in types_by_field or "_" in option.name:
            raise UsageError(option.position.pointing(_unknown_option(cls, option.name, types_by_field)))
        if field in values:
            raise UsageError(option.position.pointing(f'the option "{option.name}" is given twice:'))
        values[field] = _convert(option, types_by_field[field])
    _refuse_missing(cls, values)
    return cls(**values)


def option_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass that is an option."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _unknown_option(cls: type, name: str, known: Iterable[str]) -> str:
    names = [option_name(field) for field in known]
    owner = name_of(cls)
    if not names:
        return f'"{owner}" takes no options, found "{name}":'
    return f'"{owner}" has no option "{name}".{did_you_mean(name, names)} Known options: {", ".join(names)}.'


def _refuse_missing(cls: type, given: Iterable[str]) -> None:
    required = [field.name for field in dataclasses.fields(cls) if field.init and not _has_default(field)]
    missing = [option_name(name) for name in required if name not in given]
    if missing:
        owner = name_of(cls)
        raise UsageError(f'"{owner}" needs the option "{missing[0]}".', f"Write {owner}{{{missing[0]}=...}}.")


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def option_name(field: str) -> str:
    """The name in text of a dataclass field."""
    return field.replace("_", "-")


def name_of(cls: type) -> str:
    """The name in text of a pass or target class."""
    return str(getattr(cls, "name", cls.__name__))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` to end a message with; empty when no known name is near."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def _convert(option: Option, wanted: Any) -> Any:
    try:
        return _converted(option.value, option.quoted, wanted)
    except ValueError as error:
        problem = f'the option "{option.name}" takes {describe_type(wanted)}, not "{option.value}"'
        raise UsageError(option.position.pointing(f"{problem}.{error}")) from None


def _converted(text: str, quoted: bool, wanted: Any) -> Any:
    """Raises ValueError, whose text ends the message to the user, when `text` is not of the type."""
    optional, inner = _without_none(wanted)
    if optional and text == "none" and not quoted:
        return None
    if get_origin(inner) is Literal:
        return _one_of(text, get_args(inner))
    if get_origin(inner) is tuple:
        return _sequence(text, _element_type(inner))
    return _scalar(text, inner)


def _without_none(wanted: Any) -> tuple[bool, Any]:
    """(whether None is allowed, the type besides None)."""
    if get_origin(wanted) not in (Union, types.UnionType):
        return False, wanted
    others = [member for member in get_args(wanted) if member is not type(None)]
    if len(others) != 1:
        raise _unfit_type(wanted)
    return len(others) < len(get_args(wanted)), others[0]


def _element_type(wanted: Any) -> Any:
    arguments = get_args(wanted)
    if len(arguments) != 2 or arguments[1] is not Ellipsis:
        raise _unfit_type(wanted)
    return arguments[0]


def _unfit_type(wanted: Any) -> TypeError:
    """A mistake of the author of a pass, not of its user."""
    return TypeError(f"pipeline text has no form for the field type {wanted}; use int, float, bool, str or a tuple.")


def _one_of(text: str, choices: Sequence[Any]) -> Any:
    by_text = {_scalar_text(choice): choice for choice in choices}
    if text not in by_text:
        raise ValueError(did_you_mean(text, by_text))
    return by_text[text]


def _sequence(text: str, element: Any) -> tuple[Any, ...]:
    if not text:
        return ()
    parts = text.split(",")
    if "" in parts:
        raise ValueError(" An element is empty.")
    return tuple(_converted(part, True, element) for part in parts)


def _scalar(text: str, wanted: Any) -> Any:
    if wanted is str:
        return text
    if wanted is bool:
        if text not in _BOOLS:
            raise ValueError
        return _BOOLS[text]
    if wanted not in (int, float):
        raise _unfit_type(wanted)
    return _number(text, wanted)


def _number(text: str, wanted: type[int] | type[float]) -> int | float:
    try:
        number = wanted(text)
    except ValueError:
        raise ValueError from None
    if math.isnan(number):
        raise ValueError
    return number


def describe_type(wanted: Any) -> str:
    """A field type in a user's words: `a number or none`."""
    optional, inner = _without_none(wanted)
    if get_origin(inner) is Literal:
        words = "one of " + ", ".join(_scalar_text(choice) for choice in get_args(inner))
    elif get_origin(inner) is tuple:
        words = "a list with commas"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[inner]
    return f"{words} or none" if optional else words


def options_of(cls: type) -> list[dict[str, str | None]]:
    """Name, type in words, and default as text (None: it must be given) of each option of a pass or target class."""
    types_by_field = option_types(cls)
    return [
        {
            "name": option_name(field.name),
            "type": describe_type(types_by_field[field.name]),
            "default": _printed(_default(field)) if _has_default(field) else None,
        }
        for field in dataclasses.fields(cls)
        if field.init
    ]


def to_text(obj: Any) -> str:
    """Canonical text of a pass or target: options that differ from their default, in the order of the fields.

    Raises:
        UsageError: a list holds an element that the text cannot (empty, or with a comma).
    """
    shown = [field for field in dataclasses.fields(obj) if field.init and getattr(obj, field.name) != _default(field)]
    options = " ".join(f"{option_name(field.name)}={_printed(getattr(obj, field.name))}" for field in shown)
    return f"{name_of(type(obj))}{{{options}}}" if options else name_of(type(obj))


def join(objects: Iterable[Any]) -> str:
    """Canonical text of a pipeline."""
    return ",".join(to_text(obj) for obj in objects)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _printed(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return _quoted_if_needed(",".join(_element_text(element) for element in value))
    text = _scalar_text(value)
    return f'"{text}"' if text == "none" else _quoted_if_needed(text)


def _element_text(element: Any) -> str:
    text = _scalar_text(element)
    if not text or "," in text:
        raise UsageError(f'"{text}" cannot be an element of a list in pipeline text.', "Leave out commas and blanks.")
    return text


def _scalar_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)


def _quoted_if_needed(text: str) -> str:
    if _BARE.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
