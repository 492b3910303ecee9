"""Times of ops out of ONNX Runtime's profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fraqat_compiler.errors import TargetError
from fraqat_compiler.targets.op_times import op_times


def _event(name: str, op: str, microseconds: int) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": op}}


def test_each_op_has_its_median_the_costliest_first(tmp_path: Path) -> None:
    session = {"cat": "Session", "name": "model_run", "dur": 9000, "args": {}}
    events = [_event("a", "Relu", 5), _event("b", "Gemm", 3000), _event("b", "Gemm", 1000), _event("b", "Gemm", 2000)]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([session, *events]))
    assert op_times(path) == ({"name": "b", "op": "Gemm", "ms": 2.0}, {"name": "a", "op": "Relu", "ms": 0.005})
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TargetError, match=r"could not write its profile whole.*Free disk space"):
        op_times(path)
