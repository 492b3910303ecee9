"""Bit widths by module: the text `8,proj_out=16` of the options `weights` and `activations`."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fraqat_compiler.errors import QuantizationError, UsageError
from fraqat_compiler.quant_spec import code_range

FLOAT = "float"


@dataclass(frozen=True)
class Widths:
    """A default width and overrides by patterns over the user's module names; None is float.

    A pattern (shell wildcards) covers the modules whose name, or the name of one that contains them, it matches. The
    last match wins.
    """

    default: float | None
    overrides: tuple[tuple[str, float | None], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Widths:
        """Parse `4` or `4,lm_head=8,blocks.0.*=float`.

        Raises:
            UsageError: not a width, or no default.
        """
        default, *rest = [part.strip() for part in str(text).split(",")]
        overrides = []
        for part in rest:
            pattern, equals, width = part.rpartition("=")
            if not equals or not pattern:
                raise UsageError(f"{part!r} in {text!r} is not NAME=WIDTH.", "Write for example 4,lm_head=8.")
            overrides.append((pattern, _width(width, text)))
        return cls(_width(default, text), tuple(overrides))

    @property
    def all(self) -> tuple[float | None, ...]:
        """Every width that is asked for."""
        return (self.default, *(width for _, width in self.overrides))

    def of(self, module: str) -> float | None:
        """Width for a module by its dotted name."""
        width = self.default
        for pattern, override in self.overrides:
            if matches(pattern, module):
                width = override
        return width

    def overrides_module(self, module: str) -> bool:
        """Whether a pattern, not the default, decides for a module."""
        return any(matches(pattern, module) for pattern, _ in self.overrides)

    def require_known(self, modules: Collection[str]) -> None:
        """Refuse patterns that match none of the model's modules.

        Raises:
            UsageError: naming the pattern and near names.
        """
        for pattern, _ in self.overrides:
            require_match(pattern, modules)


def _width(text: str, whole: str) -> float | None:
    if text.strip() == FLOAT:
        return None
    try:
        width = float(text)
        code_range(width, signed=True)
    except (ValueError, QuantizationError):
        raise UsageError(
            f"{text!r} in {whole!r} is not a bit width.", "Give a number from 2 to 32, or float."
        ) from None
    return width


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern covers a module: by its own name or by that of a module that contains it."""
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def require_match(pattern: str, modules: Collection[str]) -> None:
    """Raise UsageError when a pattern covers none of the modules."""
    if any(matches(pattern, module) for module in modules):
        return
    near = difflib.get_close_matches(pattern, list(modules), n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(near)}?" if near else "`fraqat inspect` lists the module names."
    raise UsageError(f"no module of the model matches {pattern!r}.", hint)
