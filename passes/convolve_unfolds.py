"""convolve-unfolds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.layers import layer_name
from fraqat_compiler.ops import argument, is_float_tensor, module_path, op_name, value_of
from fraqat_compiler.pass_base import FxPass, PassContext, PassResult

_aten = torch.ops.aten


@dataclass(frozen=True)
class ConvolveUnfolds(FxPass):
    """Take images apart into windows by a convolution, and put windows together by a transposed one.

    Before: `unfold(x, 3, padding=1)`, which becomes a Gather of rank 6, and `fold`, which becomes Col2Im; the HTP
    library refuses both. After: a convolution of each channel by 9 kernels with a single 1, which every width of
    weights holds exactly; transposed for `fold`, which sums where windows overlap. Windows that tile the image are
    permuted instead, and so is `pixel_unshuffle`, which takes such windows apart.
    """

    name: ClassVar[str] = "convolve-unfolds"

    def run(self, model: GraphModule, ctx: PassContext) -> PassResult:
        changes = []
        for node in list(model.graph.nodes):
            rewrite = _REWRITES.get(op_name(node))
            if rewrite is None or not is_float_tensor(node):
                continue
            result = rewrite(model, node)
            fx_graph.replace(node, _reshaped(node, result, value_of(node).shape))
            changes.append(f"rewrote {layer_name(node)}")
        fx_graph.finish(model)
        return PassResult(model, bool(changes), tuple(changes))


@dataclass(frozen=True)
class _Windows:
    """Windows of an image; each field but the first two has rows and columns.

    Attributes:
        batch, channels: of the image.
        size: of the image.
        kernel, dilation, padding, stride: of the windows, as `unfold` takes them.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]
    stride: Sequence[int]

    @property
    def counts(self) -> list[int]:
        """How many there are in each direction."""
        return [(free // stride) + 1 for free, stride in zip(self._free, self.stride, strict=True)]

    @property
    def rest(self) -> list[int]:
        """Rows and columns at the end of the padded image that no window reaches."""
        return [free % stride for free, stride in zip(self._free, self.stride, strict=True)]

    @property
    def _free(self) -> list[int]:
        """How far the first window can move."""
        sides = zip(self.size, self.kernel, self.dilation, self.padding, strict=True)
        return [size + 2 * padding - dilation * (kernel - 1) - 1 for size, kernel, dilation, padding in sides]

    @property
    def tile(self) -> bool:
        """Whether each element of the image lies in one window."""
        is_dense = list(self.stride) == list(self.kernel) and set(self.dilation) == {1}
        return is_dense and not any(self.padding) and not any(self.rest)

    def weight(self) -> Tensor:
        """For each channel a kernel for each place in a window, with 1 there: (channels * places, 1, rows, columns)."""
        places = prod(self.kernel)
        return torch.eye(places).reshape(places, 1, *self.kernel).repeat(self.channels, 1, 1, 1)


def _unfold(model: GraphModule, node: Node) -> Node:
    return _taken_apart(model, node, _windows(_operand(node), *(argument(node, position) for position in (1, 2, 3, 4))))


def _pixel_unshuffle(model: GraphModule, node: Node) -> Node:
    block = [argument(node, 1)] * 2
    return _taken_apart(model, node, _windows(_operand(node), block, [1, 1], [0, 0], block))


def _fold(model: GraphModule, node: Node) -> Node:
    return _put_together(model, node, _windows(node, *(argument(node, position) for position in (2, 3, 4, 5))))


def _windows(image: Node, *geometry: Sequence[int]) -> _Windows:
    *batch, channels, rows, columns = value_of(image).shape
    return _Windows(prod(batch), channels, (rows, columns), *geometry)


def _taken_apart(model: GraphModule, node: Node, windows: _Windows) -> Node:
    batch, channels, (rows, columns) = windows.batch, windows.channels, windows.counts
    if windows.tile:
        height, width = windows.kernel
        return _permuted(node, [batch, channels, rows, height, columns, width], [0, 1, 3, 5, 2, 4])
    image = _reshaped(node, _operand(node), [batch, channels, *windows.size])
    geometry = (windows.stride, windows.padding, windows.dilation, channels)
    weight = _constant(model, node, windows.weight())
    return fx_graph.call(node, _aten.conv2d.default, (image, weight, None, *geometry))


def _put_together(model: GraphModule, node: Node, windows: _Windows) -> Node:
    """A transposed convolution ends with the last window: the rest of the image is its output padding.

    Its kernels are written out with the gaps of a dilation, which the HTP library refuses there.
    """
    batch, channels, counts = windows.batch, windows.channels, windows.counts
    if windows.tile:
        return _permuted(node, [batch, channels, *windows.kernel, *counts], [0, 1, 4, 2, 5, 3])
    cells = _reshaped(node, _operand(node), [batch, channels * prod(windows.kernel), *counts])
    weight = _constant(model, node, _with_gaps(windows.weight(), windows.dilation))
    geometry = (windows.stride, windows.padding, windows.rest, channels)
    return fx_graph.call(node, _aten.conv_transpose2d.input, (cells, weight, None, *geometry))


def _with_gaps(kernels: Tensor, dilation: Sequence[int]) -> Tensor:
    rows, columns = (step * (size - 1) + 1 for step, size in zip(dilation, kernels.shape[-2:], strict=True))
    spread = kernels.new_zeros(*kernels.shape[:-2], rows, columns)
    spread[..., :: dilation[0], :: dilation[1]] = kernels
    return spread


def _operand(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def _constant(model: GraphModule, node: Node, weight: Tensor) -> Node:
    return fx_graph.add_constant(model, node, f"{module_path(node)}.{node.name}_weight".lstrip("."), weight)


def _permuted(node: Node, sizes: Sequence[int], order: Sequence[int]) -> Node:
    return fx_graph.call(node, _aten.permute.default, (_reshaped(node, _operand(node), sizes), list(order)))


def _reshaped(node: Node, x: Node, shape: Sequence[int]) -> Node:
    if list(value_of(x).shape) == list(shape):
        return x
    return fx_graph.call(node, _aten.reshape.default, (x, list(shape)))


_REWRITES: dict[str, Callable[[GraphModule, Node], Node]] = {
    "aten.im2col": _unfold,
    "aten.col2im": _fold,
    "aten.pixel_unshuffle": _pixel_unshuffle,
}
