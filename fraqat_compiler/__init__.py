"""Graph compiler: trained PyTorch models to packed INT4/INT8 for phone NPUs, with fractional-bit fine-tuning.

The front door is `compile`; `fake_quantize` is the quantizer itself. Names load on first use, so importing the package
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fraqat_compiler.compiler import CompileResult as CompileResult
    from fraqat_compiler.compiler import compile as compile  # noqa: A004 - the product's verb
    from fraqat_compiler.errors import FraqatError as FraqatError
    from fraqat_compiler.job import Job as Job
    from fraqat_compiler.pass_base import FxPass as FxPass
    from fraqat_compiler.pass_base import OnnxPass as OnnxPass
    from fraqat_compiler.pass_base import PassContext as PassContext
    from fraqat_compiler.pass_base import PassResult as PassResult
    from fraqat_compiler.pass_manager import PassManager as PassManager
    from fraqat_compiler.quant_spec import QuantSpec as QuantSpec
    from fraqat_compiler.quant_spec import Unquantized as Unquantized
    from fraqat_compiler.quantizer import fake_quantize as fake_quantize
    from fraqat_compiler.registry import parse_target as parse_target
    from fraqat_compiler.schedule import BitWidthSchedule as BitWidthSchedule
    from fraqat_compiler.simulation import SimulationResult as SimulationResult
    from fraqat_compiler.simulation import simulate as simulate
    from fraqat_compiler.target import Artifact as Artifact
    from fraqat_compiler.target import Finding as Finding
    from fraqat_compiler.target import Profile as Profile
    from fraqat_compiler.target import Target as Target

_HOME = {
    "Artifact": "target",
    "BitWidthSchedule": "schedule",
    "CompileResult": "compiler",
    "Finding": "target",
    "FraqatError": "errors",
    "FxPass": "pass_base",
    "Job": "job",
    "OnnxPass": "pass_base",
    "PassContext": "pass_base",
    "PassManager": "pass_manager",
    "PassResult": "pass_base",
    "Profile": "target",
    "QuantSpec": "quant_spec",
    "SimulationResult": "simulation",
    "Target": "target",
    "Unquantized": "quant_spec",
    "compile": "compiler",
    "fake_quantize": "quantizer",
    "parse_target": "registry",
    "simulate": "simulation",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
