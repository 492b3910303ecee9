"""What a pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_graphsurgeon as gs
import torch

if TYPE_CHECKING:
    from fraqat_compiler.target import Target

IR = Literal["fx", "onnx"]


@dataclass(frozen=True)
class PassContext:
    """What a pass may look at besides the graph; a pass never changes it.

    Attributes:
        target: the hardware target compiled for; None outside a compile.
        example_inputs: positional and keyword inputs that the graph accepts; None when unknown.
        work_dir: folder for large intermediate files; None when nothing may be written.
    """

    target: Target | None = None
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    work_dir: Path | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass made.

    Attributes:
        model: the graph after the pass; the same object when it was changed in place.
        modified: whether anything changed at all.
        changes: one line for each thing changed, for the reports.
    """

    model: Any
    modified: bool
    changes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler. A subclass is a frozen dataclass whose fields are its options.

    The class docstring is the user's documentation (`fraqat passes NAME` prints it): what the pass does, before and
    after, and when it does nothing.

    Attributes:
        name: the pass's name in pipeline text: lower case words joined by `-`.
        reads, writes: the IR taken and given; neighbours in a pipeline are checked against each other.
    """

    name: ClassVar[str]
    reads: ClassVar[IR]
    writes: ClassVar[IR]

    @abstractmethod
    def run(self, model: Any, ctx: PassContext) -> PassResult:
        """Run on `model`, which the pass may change in place."""


@dataclass(frozen=True)
class FxPass(Pass):
    """A pass from `torch.fx.GraphModule` (ATen ops) to the same."""

    reads: ClassVar[IR] = "fx"
    writes: ClassVar[IR] = "fx"

    @abstractmethod
    def run(self, model: torch.fx.GraphModule, ctx: PassContext) -> PassResult: ...


@dataclass(frozen=True)
class OnnxPass(Pass):
    """A pass from `onnx_graphsurgeon.Graph` to the same."""

    reads: ClassVar[IR] = "onnx"
    writes: ClassVar[IR] = "onnx"

    @abstractmethod
    def run(self, model: gs.Graph, ctx: PassContext) -> PassResult: ...
