"""convolve-average-pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, module_path, op_name
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten

Geometry = tuple[list[int], list[int], list[int], list[int]]


@dataclass(frozen=True)
class ConvolveAveragePools(FxPass):
    """Average by a depthwise convolution where windows do not overlap and the HTP library would go astray.

    Before: `avg_pool2d(x, 4, 4)`. After: `conv2d` of each channel by a kernel of 1 / 16, which every width of weights
    holds exactly. The library splits a pool over even windows into pools over 2 x 2, keeps what lies between them on
    the grid of the result, which is too narrow for it, and cuts the rest off (slope 0.76 at 4 x 4); with padding it is
    further off. Does nothing to windows that overlap, to one window over all (which is right), to odd windows and
    those of 2 x 2 without padding, and where windows at the border average fewer elements.
    """

    name: ClassVar[str] = "convolve-average-pools"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            geometry = _geometry(node)
            if geometry is not None and is_split(*geometry):
                fx_graph.replace(node, _convolution(model, node, *geometry[1:]))
                changes.append(f"made {layer_name(node)} a convolution")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


def is_split(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the HTP library computes a pool in several steps, and wrongly.

    Args:
        size: of the image that is pooled, rows and columns.
        kernel, stride, padding: of the pool, likewise.
    """
    if list(kernel) != list(stride) or (list(kernel) == list(size) and not any(padding)):
        return False
    is_even = all(length % 2 == 0 for length in kernel)
    return any(padding) or (is_even and max(kernel) > 2)


def _geometry(node: Node) -> Geometry | None:
    """Size, kernel, stride and padding of a pool whose windows have one divisor; None for other nodes."""
    if op_name(node) == "aten.adaptive_avg_pool2d":
        return _adaptive_geometry(node)
    if op_name(node) != "aten.avg_pool2d" or argument(node, 4):
        return None
    kernel, padding = _pair(argument(node, 1)), _pair(argument(node, 3) or 0)
    counts_padding = argument(node, 5) in (None, True) or argument(node, 6) is not None
    if any(padding) and not counts_padding:
        return None
    return _image_size(node), kernel, _pair(argument(node, 2) or kernel), padding


def _adaptive_geometry(node: Node) -> Geometry | None:
    size, result = _image_size(node), list(node.meta["val"].shape[-2:])
    if any(whole % part for whole, part in zip(size, result, strict=True)):
        return None
    kernel = [whole // part for whole, part in zip(size, result, strict=True)]
    return size, kernel, kernel, [0, 0]


def _image_size(node: Node) -> list[int]:
    image = node.args[0]
    assert isinstance(image, Node)
    return list(image.meta["val"].shape[-2:])


def _convolution(model: GraphModule, node: Node, kernel: list[int], stride: list[int], padding: list[int]) -> Node:
    channels = node.meta["val"].shape[-3]
    divisor = argument(node, 6) if op_name(node) == "aten.avg_pool2d" else None
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or prod(kernel)))
    name = f"{module_path(node)}.{node.name}_weight".lstrip(".")
    constant = fx_graph.add_constant(model, node, name, weight)
    return fx_graph.call(node, _aten.conv2d.default, (node.args[0], constant, None, stride, padding, [1, 1], channels))


def _pair(sizes: int | Sequence[int]) -> list[int]:
    if isinstance(sizes, int):
        return [sizes, sizes]
    return list(sizes) * 2 if len(sizes) == 1 else list(sizes)
