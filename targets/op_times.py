"""ONNX Runtime's profile file, read into times of ops."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fraqat_compiler.errors import TargetError

_SUFFIX = "_kernel_time"


def op_times(profile: Path) -> tuple[Mapping[str, Any], ...]:
    """Median milliseconds of each op over the runs of the profile, the costliest first: {"name", "op", "ms"}.

    Raises:
        TargetError: the file is not whole; onnxruntime does not say when a full disk cuts it off.
    """
    try:
        events = json.loads(profile.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TargetError(
            f"onnxruntime could not write its profile whole to {profile.parent}.", "Free disk space there."
        ) from error
    microseconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            microseconds[event["name"].removesuffix(_SUFFIX), event["args"]["op_name"]].append(event["dur"])
    ops = [{"name": name, "op": op, "ms": statistics.median(times) / 1e3} for (name, op), times in microseconds.items()]
    return tuple(sorted(ops, key=lambda op: -float(op["ms"])))
