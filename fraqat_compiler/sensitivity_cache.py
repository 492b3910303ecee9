"""A measurement of sensitivities kept in the output folder, under a digest of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import Batch
from fraqat_compiler.ir_text import listing
from fraqat_compiler.losses import Loss
from fraqat_compiler.sensitivity import MIN_PROBES, Candidates, Sensitivities, measure

VERSION = 1  # of the measurement: another one is never taken for it


def measured(
    path: Path,
    graph: GraphModule,
    batches: Sequence[Batch],
    candidates: Candidates,
    loss: Loss,
    seed: int,
    on_batch: Callable[[int], None],
) -> Sensitivities:
    """`sensitivity.measure`, or what an equal measurement left in the file `path`: then all batches are done at once.

    Raises:
        DataError: as that.
    """
    key = identity(graph, batches, candidates, loss, seed)
    known = load(path, key)
    if known is not None:
        on_batch(len(batches))
        return known
    found = measure(graph, batches, candidates, loss, seed, on_batch)
    save(path, key, found)
    return found


def identity(graph: GraphModule, batches: Sequence[Batch], candidates: Candidates, loss: Loss, seed: int) -> str:
    """Digest of all that a measurement depends on: graph, weights, data, quantizers, loss and seed."""
    digest = hashlib.sha256(f"{VERSION} {MIN_PROBES} {loss!r} {seed}\n{listing(graph)}".encode())
    configs = {
        name: {f"{width:g}": quantizer.to_config() for width, quantizer in by_width.items()}
        for name, by_width in candidates.items()
    }
    digest.update(json.dumps(configs, sort_keys=True).encode())
    names = sorted({str(node.target) for node in graph.graph.nodes if node.op == "get_attr"})
    leaves = [(name, fx_graph.get_tensor(graph, name)) for name in names]
    for batch in batches:
        known = dict(batch) if isinstance(batch, Mapping) else batch  # any mapping, not only those that pytree knows
        leaves += [(str(path), leaf) for path, leaf in pytree.tree_flatten_with_path(known)[0]]
    for name, leaf in leaves:
        digest.update(name.encode())
        _update(digest, leaf)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, leaf: Any) -> None:
    leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
    if not isinstance(leaf, Tensor):
        digest.update(repr(leaf).encode())
        return
    digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
    digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load(path: Path, key: str) -> Sensitivities | None:
    """What an equal measurement left in a file; None where there is none, or it is damaged or another's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        return {
            name: {float(width): float(value) for width, value in by_width.items()}
            for name, by_width in content["sensitivity"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(path: Path, key: str, found: Sensitivities) -> None:
    """Keep a measurement, whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps({"key": key, "sensitivity": found}, indent=1), encoding="utf-8")
    os.replace(partial, path)
