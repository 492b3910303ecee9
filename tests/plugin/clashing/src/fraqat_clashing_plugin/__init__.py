"""A pass under the name of a built-in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fraqat_compiler.pass_base import OnnxPass, PassContext, PassResult


@dataclass(frozen=True)
class PackInt4(OnnxPass):
    """Do nothing, under a name that is taken."""

    name: ClassVar[str] = "pack-int4"

    def run(self, model: Any, ctx: PassContext) -> PassResult:
        return PassResult(model, False)
