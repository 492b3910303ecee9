"""reduce-rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult
from fraqat_compiler.passes.simplify_shapes import permutation

_aten = torch.ops.aten


@dataclass(frozen=True)
class ReduceRank(FxPass):
    """Permute and expand tensors of more than `rank` dimensions as tensors of fewer.

    Before: `permute(x [1, 4, 4, 2, 2, 8], (0, 5, 1, 3, 2, 4))`, which puts patches together to an image; `expand` of
    [1, 2, 1, 16, 8] to [1, 2, 4, 16, 8], which repeats the keys of grouped-query attention. After: the same without
    dimensions of 1 and with those in one that stay side by side; where that is not enough, a chain of permutes that
    each swap two neighbouring blocks. The HTP library refuses rank 6, and computes rank 5 behind a linear layer
    wrongly. Does nothing at lower ranks.
    """

    name: ClassVar[str] = "reduce-rank"
    rank: int = 4

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            rewrite = _REWRITES.get(op_name(node))
            if rewrite is None or value_of(node).ndim <= self.rank:
                continue
            result = rewrite(node, self.rank)
            fx_graph.replace(node, fx_graph.call(node, _aten.reshape.default, (result, list(value_of(node).shape))))
            changes.append(f"rewrote {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def _permute(node: Node, rank: int) -> Node:
    x = node.args[0]
    assert isinstance(x, Node)
    sizes, order = _merged(list(value_of(x).shape), permutation(node))
    if len(sizes) <= rank:
        return _permuted(node, x, sizes, order)
    for step in _block_swaps(sizes, order):
        x = _permuted(node, x, step, [0, 2, 1, 3])
    return x


def _expand(node: Node, rank: int) -> Node:
    """Dimensions side by side become one where all of them, or none, are repeated."""
    x, result = node.args[0], list(value_of(node).shape)
    assert isinstance(x, Node)
    shape = [1] * (len(result) - value_of(x).ndim) + list(value_of(x).shape)
    pairs = [(before, after) for before, after in zip(shape, result, strict=True) if after != 1]
    runs = [list(run) for _, run in groupby(pairs, lambda pair: pair[0] != pair[1])]
    before, after = ([prod(pair[side] for pair in run) for run in runs] for side in (0, 1))
    return fx_graph.call(node, _aten.expand.default, (fx_graph.call(node, _aten.reshape.default, (x, before)), after))


def _permuted(node: Node, x: Node, sizes: Sequence[int], order: Sequence[int]) -> Node:
    shaped = fx_graph.call(node, _aten.reshape.default, (x, list(sizes)))
    return fx_graph.call(node, _aten.permute.default, (shaped, list(order)))


def _merged(shape: Sequence[int], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes and order without dimensions of 1, those that stay neighbours in one."""
    runs: list[list[int]] = []
    long = [dimension for dimension in range(len(shape)) if shape[dimension] != 1]
    after = dict(pairwise(long))
    for dimension in (dimension for dimension in order if shape[dimension] != 1):
        if runs and after.get(runs[-1][-1]) == dimension:
            runs[-1].append(dimension)
        else:
            runs.append([dimension])
    places = sorted(runs)
    return [prod(shape[dimension] for dimension in run) for run in places], [places.index(run) for run in runs]


def _block_swaps(sizes: Sequence[int], order: Sequence[int]) -> list[list[int]]:
    """Shapes of rank 4 whose middle dimensions, swapped one shape after the other, give the order."""
    current, steps = list(range(len(sizes))), []
    for place, dimension in enumerate(order):
        found = current.index(dimension)
        if found == place:
            continue
        blocks = (current[:place], current[place:found], [dimension], current[found + 1 :])
        steps.append([prod(sizes[index] for index in block) for block in blocks])
        current.insert(place, current.pop(found))
    return steps


_REWRITES: dict[str, Callable[[Node, int], Node]] = {
    "aten.permute": _permute,
    "aten.transpose": _permute,
    "aten.expand": _expand,
}
