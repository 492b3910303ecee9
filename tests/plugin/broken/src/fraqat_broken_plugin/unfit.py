"""Classes that are not what their entry points promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fraqat_compiler.pass_base import FxPass, PassContext, PassResult


class NotAPass:
    """It has the name of a pass, and nothing else."""

    name = "not-a-pass"


@dataclass(frozen=True)
class Unfinished(FxPass):
    """It has no `run`."""

    name: ClassVar[str] = "unfinished"


@dataclass(frozen=True)
class Misnamed(FxPass):
    """It calls itself otherwise than its entry point does."""

    name: ClassVar[str] = "another-name"

    def run(self, model: Any, ctx: PassContext) -> PassResult:
        return PassResult(model, False)
