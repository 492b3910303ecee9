"""GPTQ: a matrix is rounded column by column, and the columns still to come make up for the error of each.

Frantar et al. 2022 (arXiv 2210.17323), which is optimal brain surgeon's step (Hassibi and Stork 1992) as optimal brain
quantization takes it (arXiv 2208.11580), with one order of columns for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fraqat_compiler.fake_quant import WeightFakeQuantize

BLOCK = 128  # columns whose errors reach the columns behind them in one product
MOST_DAMP = 1.0  # of the mean diagonal; a Hessian that needs more says nothing about its columns


@dataclass(frozen=True)
class Grid:
    """Where a matrix may go so that its quantizer's range stays where it is.

    A weight's range is taken from the weight itself at every forward. So the elements that make the range keep their
    values, and the others stay between them: then codes taken from the new matrix are the codes chosen here.

    Attributes:
        scale, zero_point: of each element, views (rows, columns).
        low, high: least and greatest value of each element.
        fixed: elements that keep their value.
        lowest, highest: codes.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    fixed: Tensor
    lowest: int
    highest: int

    @classmethod
    def of(cls, quantizer: WeightFakeQuantize, weight: Tensor) -> Grid:
        """That of a calibrated quantizer for its weight (rows, columns)."""
        blocks = weight.reshape(quantizer.scale.numel(), -1)  # each with a scale of its own: a row, a group, or all
        low, high = blocks.amin(1), blocks.amax(1)
        ends = (blocks.abs().argmax(1),) if quantizer.spec.symmetric else (blocks.argmin(1), blocks.argmax(1))
        fixed = torch.zeros_like(blocks, dtype=torch.bool)
        for end in ends:
            fixed.scatter_(1, end[:, None], True)
        if quantizer.spec.symmetric:
            high = torch.maximum(-low, high)
            low = -high

        def spread(compact: Tensor) -> Tensor:
            return compact.reshape(-1, 1).expand_as(blocks).reshape(weight.shape)

        return cls(
            spread(quantizer.scale),
            spread(quantizer.zero_point),
            spread(low),
            spread(high),
            fixed.view(weight.shape),
            quantizer.spec.quant_min,
            quantizer.spec.quant_max,
        )

    def columns(self, index: Tensor | int) -> Grid:
        """Of some columns, or of one."""
        return Grid(
            self.scale[:, index],
            self.zero_point[:, index],
            self.low[:, index],
            self.high[:, index],
            self.fixed[:, index],
            self.lowest,
            self.highest,
        )

    def allowed(self, wanted: Tensor, original: Tensor) -> Tensor:
        """The nearest values that leave the range alone, in the precision of the original."""
        return torch.where(self.fixed, original, wanted.clamp(self.low, self.high).to(original.dtype))

    def rounded(self, values: Tensor) -> Tensor:
        """What the quantizer makes of values."""
        codes = values.div(self.scale).round_().add_(self.zero_point).clamp_(self.lowest, self.highest)
        return codes.sub_(self.zero_point).mul_(self.scale)


class Factor(NamedTuple):
    """A Hessian, ready for all matrices that read the same input.

    Attributes:
        order: of the columns.
        upper: float32 (columns, columns) U with U^T U the inverse of the damped Hessian, its columns in that order.
        damp: that it took, in mean diagonals.
    """

    order: Tensor
    upper: Tensor
    damp: float


def factorized(hessian: Tensor, damp: float) -> Factor | None:
    """The factor of a Hessian.

    Columns with the largest inputs come first, while the most others are left to make up for them. One that was never
    active gets a Hessian of its own, so it is rounded to nearest; the paper's code zeroes it instead, but other data
    may use it.

    Args:
        hessian: (columns, columns), symmetric, finite; of any scale.
        damp: added to the diagonal, in means of it; ten times as much wherever a factorization fails.

    Returns:
        None where MOST_DAMP was not enough.
    """
    exact = hessian.to(torch.float64, copy=True)
    diagonal = exact.diagonal()
    active = diagonal > 0
    mean = float(diagonal[active].mean()) if active.any() else 1.0
    exact.diagonal()[~active] = mean
    order = torch.argsort(exact.diagonal(), descending=True, stable=True)
    exact = exact[order][:, order]
    while damp <= MOST_DAMP:
        damped = exact.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            return Factor(order, inverse.flip(0, 1).float(), damp)
        damp *= 10
    return None


def compensated(weight: Tensor, grid: Grid, factor: Factor) -> Tensor:
    """A matrix whose rounding errors make up for each other in what it computes.

    Column j, as the errors of those before it have left it, is rounded; its error e, over U_jj, goes off the columns
    behind it by row j of U (the paper's Algorithm 1). What is returned are the values before they are rounded: the
    grid's values would lose what a fine-tune can start from.

    Args:
        weight: (rows, columns).
        grid: its grid.
        factor: of the Hessian of its inputs.

    Returns:
        As `weight`; its quantizer gives it the same scale, and the codes that were chosen.
    """
    original = weight[:, factor.order]
    grid, upper = grid.columns(factor.order), factor.upper
    wanted, chosen = original.to(torch.float32, copy=True), torch.empty_like(original)
    for start in range(0, wanted.shape[1], BLOCK):
        end = min(start + BLOCK, wanted.shape[1])
        errors = _round_block(wanted, original, chosen, grid, upper, range(start, end))
        wanted[:, end:] -= errors @ upper[start:end, end:]
    return torch.empty_like(weight).index_copy_(1, factor.order, chosen)


def _round_block(wanted: Tensor, original: Tensor, chosen: Tensor, grid: Grid, upper: Tensor, columns: range) -> Tensor:
    """Round these columns of `wanted` into `chosen`; returns their errors, over the diagonal."""
    errors = torch.empty_like(wanted[:, columns.start : columns.stop])
    for place, column in enumerate(columns):
        cell = grid.columns(column)
        chosen[:, column] = cell.allowed(wanted[:, column], original[:, column])
        rounded = cell.rounded(chosen[:, column].float())
        errors[:, place] = (wanted[:, column] - rounded) / upper[column, column]
        behind = slice(column + 1, columns.stop)
        wanted[:, behind] -= errors[:, place, None] * upper[column, behind]
    return errors


def energy(matrix: Tensor, hessian: Tensor) -> float:
    """||M X||^2 of a matrix (rows, columns) and the Hessian X X^T."""
    return float(((matrix.float() @ hessian) * matrix).sum())
