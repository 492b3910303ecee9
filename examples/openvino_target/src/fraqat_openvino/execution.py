"""What the plugin made of a model: in which precision it computes, and where the time goes."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import openvino as ov

PROFILED_RUNS = 10
_MATRIX_OPS = frozenset(
    {
        "Convolution",
        "Deconvolution",
        "FullyConnected",
        "GRUCell",
        "LSTMCell",
        "MatMul",
        "RNNSeq",
        "ScaledDotProductAttention",
    }
)


def matrix_precisions(compiled: ov.CompiledModel) -> dict[str, int]:
    """Convolutions and matrix products by the precision of their kernel: {"i8": 32, "f32": 4}.

    Taken from the kernel's name (`brgemm_avx512_i8`), since what the plugin calls its precision is that of the weights.
    Products inside a fused `Subgraph` are not counted.
    """
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kernels = [_text(fact, "primitiveType") for fact in facts if _text(fact, "layerType") in _MATRIX_OPS]
    return dict(sorted(Counter(kernel.rpartition("_")[2].lower() for kernel in kernels).items()))


def _text(facts: Mapping[str, Any], key: str) -> str:
    return str(facts[key].astype(str)) if key in facts else "unknown"


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
