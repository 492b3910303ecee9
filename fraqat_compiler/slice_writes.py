"""Writes into a part of a tensor (`x[:, 0] = 0`, `x[:, 2:4] += y`) as slices and concatenations.

ONNX has scatters for them, with index tensors made from shapes, and the HTP library computes ScatterElements on integer
codes wrongly. A concatenation of what is kept and what is new says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """x with `source` in place of `x[start:end]` along `dim`; a step stays a scatter."""
    if step != 1:
        return NotImplemented  # type: ignore[no-any-return]  # torch keeps the op
    size = x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    last = max(first, last)
    parts = [x.narrow(dim, 0, first), source, x.narrow(dim, last, size - last)]
    filled = [part for part in parts if part.shape[dim]]
    return torch.cat(filled, dim) if len(filled) > 1 else filled[0]


def _select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """x with `source` in place of `x[index]` along `dim`."""
    first = index % x.shape[dim]
    return _slice_scatter(x, source.unsqueeze(dim), dim, first, first + 1)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`source` in the shape and type of x."""
    same = source if source.dtype == x.dtype else source.to(x.dtype)
    return same if same.shape == x.shape else same.expand(x.shape)


def _fill(x: Tensor, value: float) -> Tensor:
    return torch.full(x.shape, value, dtype=x.dtype, device=x.device)


DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.slice_scatter.default: _slice_scatter,
    torch.ops.aten.select_scatter.default: _select_scatter,
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.fill.Tensor: _copy,
    torch.ops.aten.fill.Scalar: _fill,
}
