"""An IR on its device: its inputs and outputs by name, and what the plugin made of it."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from fraqat_compiler.errors import TargetError
from fraqat_compiler.target import Arrays
from fraqat_openvino.model_ir import core

PROFILED_RUNS = 10
_MATRIX_OPS = frozenset({"Convolution", "ConvolutionBackpropData", "GroupConvolution", "MatMul"})
_MATRIX_KERNELS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})


@dataclass(frozen=True)
class LoadedModel:
    """A compiled model beside the IR that it was made from.

    The plugin may merge names (a dropped quantizer's output is then another name of its input), the IR's are those of
    the ONNX file, in the same order.
    """

    ir: ov.Model
    compiled: ov.CompiledModel

    @classmethod
    def open(cls, path: Path, device: str, options: Mapping[str, Any]) -> LoadedModel:
        ir = core().read_model(path)
        return cls(ir, core().compile_model(ir, device, dict(options)))

    def run(self, inputs: Arrays) -> Arrays:
        """One inference.

        Raises:
            TargetError: the inputs do not fit.
        """
        results = self.compiled(self.fitting(inputs), share_outputs=False)
        return {port.any_name: results[index] for index, port in enumerate(self.ir.outputs)}

    def request(self, inputs: Arrays) -> ov.InferRequest:
        """A request that has run once with these inputs, and runs with them again.

        Raises:
            TargetError: the inputs do not fit.
        """
        request = self.compiled.create_infer_request()
        request.infer(self.fitting(inputs))
        return request

    def fitting(self, inputs: Arrays) -> dict[int, NDArray[Any]]:
        """The inputs by place, in the model's types; one that is missing OpenVINO would take from any memory.

        Raises:
            TargetError: other names, a type that does not convert, or another shape.
        """
        names = [port.any_name for port in self.ir.inputs]
        if set(inputs) != set(names):
            raise TargetError(f"the inputs are {sorted(inputs)}, not {sorted(names)}.", "Give every input by its name.")
        return {index: _cast(inputs[port.any_name], port) for index, port in enumerate(self.ir.inputs)}

    def matrix_precisions(self) -> dict[str, int]:
        """Convolutions and matrix products of the IR by the precision they are computed in: {"i8": 33, "fused": 8}.

        Taken from the kernel's name (`brgemm_avx512_I8`), since what the plugin calls its precision is that of the
        weights. A product inside a larger kernel is `fused`: its precision is not told.
        """
        names = {_plain(op.get_friendly_name()) for op in self.ir.get_ops() if op.get_type_name() in _MATRIX_OPS}
        counts: Counter[str] = Counter()
        for op in self.compiled.get_runtime_model().get_ops():
            facts = op.get_rt_info()
            if _text(facts, "layerType") in _MATRIX_KERNELS:
                origins = {_plain(name) for name in _text(facts, "originalLayersNames").split(",")}
                counts[_text(facts, "primitiveType").rpartition("_")[2].lower()] += len(names & origins)
        counts["fused"] = len(names) - counts.total()
        return {precision: count for precision, count in sorted(counts.items()) if count}


def _cast(array: NDArray[Any], port: ov.Output) -> NDArray[Any]:
    name, dtype, shape = port.any_name, np.dtype(port.get_element_type().to_dtype()), port.get_partial_shape()
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TargetError(f"input {name!r} has type {array.dtype} instead of {dtype}.", "Convert it.")
    if not shape.compatible(ov.PartialShape(list(array.shape))):
        raise TargetError(
            f"input {name!r} has shape {list(array.shape)} instead of {shape.to_string()}.", "Reshape it."
        )
    return array.astype(dtype, copy=False)


def _plain(name: str) -> str:
    """An op's name without what the conversion and the low-precision transformations add: a kernel has either form."""
    return re.sub(r"(/WithoutBiases|/Dequantization\w+)+$", "", name)


def _text(facts: Mapping[str, Any], key: str) -> str:
    return str(facts[key].astype(str)) if key in facts else ""


def op_times(request: ov.InferRequest) -> tuple[dict[str, Any], ...]:
    """Median milliseconds of each op over several runs, the costliest first: {"name", "op", "kernel", "ms"}.

    Args:
        request: of a model compiled with profiling, its inputs set.
    """
    times: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(PROFILED_RUNS):
        request.infer()
        for op in request.get_profiling_info():
            if op.status == ov.ProfilingInfo.Status.EXECUTED:
                times[op.node_name, op.node_type, op.exec_type].append(op.real_time / timedelta(milliseconds=1))
    ops = [
        {"name": name, "op": kind, "kernel": kernel, "ms": statistics.median(taken)}
        for (name, kind, kernel), taken in times.items()
    ]
    return tuple(sorted(ops, key=lambda op: -op["ms"]))
