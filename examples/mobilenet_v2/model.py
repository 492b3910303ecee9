"""MobileNetV2 (Sandler et al., 2018, arXiv 1801.04381) with the weights of a Keras .h5 file.

Layer names and arithmetic follow Keras, so that its weights fit: batch norm with epsilon 0.001, and padding on the
right and at the bottom alone where a convolution has stride 2.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import torch
from torch import Tensor, nn

# (expansion, channels, repetitions, stride of the first) of each group of blocks: Table 2 of the paper.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
EPSILON = 1e-3
IMAGE_SIZE = 160


class ConvBnReLU6(nn.Sequential):
    """Convolution, batch norm and, where `activates`, ReLU6."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activates: bool = True
    ) -> None:
        super().__init__()
        if stride == 2:
            self.add_module("pad", nn.ZeroPad2d((0, 1, 0, 1)))
        padding = kernel // 2 if stride == 1 else 0
        self.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
        self.add_module("norm", nn.BatchNorm2d(outputs, eps=EPSILON))
        if activates:
            self.add_module("relu", nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter depthwise, project back; (N, inputs, H, W) to (N, outputs, H/s, W/s)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvBnReLU6(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvBnReLU6(hidden, hidden, 3, stride, groups=hidden)
        self.project = ConvBnReLU6(hidden, outputs, 1, activates=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, added to its input where the shapes agree."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """Images (N, 3, 160, 160) in [-1, 1] to class scores (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = ConvBnReLU6(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for expansion, outputs, repetitions, stride in GROUPS:
            for index in range(repetitions):
                blocks.append(InvertedResidual(channels, outputs, expansion, stride if index == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBnReLU6(channels, 1280, 1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores before the softmax."""
        scores: Tensor = self.classifier(self.head(self.blocks(self.stem(images))).mean((2, 3)))
        return scores


def load_keras(path: Path) -> MobileNetV2:
    """The model that a Keras .h5 file holds: the base network as a nested model, then one dense layer."""
    with h5py.File(path) as file:
        groups = file["model_weights"]
        base = next(groups[name] for name in groups if name.startswith("mobilenetv2"))
        dense = groups["dense"]["dense"]
        model = MobileNetV2(dense["bias"].shape[0])
        for keras_conv, keras_norm, layer in _layer_names(model):
            _copy_layer(layer, base[keras_conv], base[keras_norm])
        with torch.no_grad():
            model.classifier.weight.copy_(_tensor(dense["kernel"]).T)
            model.classifier.bias.copy_(_tensor(dense["bias"]))
    return model.eval()


def _layer_names(model: MobileNetV2) -> list[tuple[str, str, ConvBnReLU6]]:
    """Keras' names of a convolution and its norm, with the layer that takes them."""
    names = [("Conv1", "bn_Conv1", model.stem), ("Conv_1", "Conv_1_bn", model.head)]
    for index, block in enumerate(model.blocks):
        prefix = "expanded_conv" if index == 0 else f"block_{index}"
        for part in ("expand", "depthwise", "project"):
            layer = getattr(block, part)
            if isinstance(layer, ConvBnReLU6):
                names.append((f"{prefix}_{part}", f"{prefix}_{part}_BN", layer))
    return names


@torch.no_grad()
def _copy_layer(layer: ConvBnReLU6, conv: h5py.Group, norm: h5py.Group) -> None:
    kernel = _tensor(conv["kernel"])  # (height, width, inputs, outputs); depthwise (height, width, channels, 1)
    depthwise = layer.conv.groups > 1
    layer.conv.weight.copy_(kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1))
    layer.norm.weight.copy_(_tensor(norm["gamma"]))
    layer.norm.bias.copy_(_tensor(norm["beta"]))
    layer.norm.get_buffer("running_mean").copy_(_tensor(norm["moving_mean"]))
    layer.norm.get_buffer("running_var").copy_(_tensor(norm["moving_variance"]))


def _tensor(dataset: h5py.Dataset) -> Tensor:
    return torch.from_numpy(dataset[()])
