"""Count the work of architectures whose latency is known, into the table that `fit_cost_model.py` reads.

    python tools/cost_model_architectures.py tools/cost_model_ops.csv

Needs `pip install transformers diffusers`. Each architecture is built from its published configuration with weights
that are never touched, exported, and counted by the code that counts a compiled model.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, SanaTransformer2DModel, UNet2DConditionModel
from onnx import ModelProto
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from fraqat_compiler.targets.htp.op_counts import OpCount, count_ops

Built = tuple[nn.Module, tuple[Any, ...]]
COLUMNS = tuple("kind op macs tiled_macs read written weights matrices".split())
configs: Any = transformers  # which take more keywords than their types say
SMALL = 1024  # elements up to which a constant is kept: shapes of views among them


class Outputs(nn.Module):
    """A model that returns plain tensors, fed by keyword."""

    def __init__(self, model: nn.Module, names: str) -> None:
        super().__init__()
        self.model, self.names = model, names.split()

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)


def resnet(depths: list[int], layer: str, widths: list[int]) -> Built:
    """ResNet, He et al. 2015."""
    config = configs.ResNetConfig(depths=depths, layer_type=layer, hidden_sizes=widths, num_labels=1000)
    return Outputs(transformers.ResNetForImageClassification(config), "pixel_values"), (torch.zeros(1, 3, 224, 224),)


def resnext101() -> Built:
    """32 groups of 8 channels, Xie et al. 2017, 101 layers."""
    stages, channels = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for index, depth in enumerate((3, 4, 23, 3)):
        for block in range(depth):
            stages.append(Bottleneck(channels, 256 << index, 2 if index and not block else 1))
            channels = 256 << index
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    return nn.Sequential(*stages, *head), (torch.zeros(1, 3, 224, 224),)


class Bottleneck(nn.Module):
    """A residual block of ResNeXt-101 32x8d, whose 3x3 convolution is as wide as its output."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = [_conv(channels, width, 1), _conv(width, width, 3, stride, 32), _conv(width, width, 1, activate=False)]
        self.body = nn.Sequential(*inner)
        self.skip = _conv(channels, width, 1, stride, activate=False) if channels != width or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + (x if self.skip is None else self.skip(x)))


def _conv(deep: int, wide: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True) -> nn.Module:
    conv = nn.Conv2d(deep, wide, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(wide), *([nn.ReLU()] if activate else []))


def mobilenet_v2() -> Built:
    """MobileNetV2, Sandler et al. 2018."""
    model = transformers.MobileNetV2ForImageClassification(configs.MobileNetV2Config(num_labels=1000, tf_padding=False))
    return Outputs(model, "pixel_values"), (torch.zeros(1, 3, 224, 224),)


class UNet(nn.Module):
    """U-Net, Ronneberger et al. 2015, with padded convolutions and batch norm, 64 to 1024 channels, two classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        self.down = nn.ModuleList(self._pair(*pair) for pair in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, 2) for width in widths[-2::-1])
        self.merge = nn.ModuleList(self._pair(2 * width, width) for width in widths[-2::-1])
        self.head = nn.Conv2d(64, 2, 1)

    @staticmethod
    def _pair(deep: int, wide: int) -> nn.Module:
        return nn.Sequential(_conv(deep, wide, 3), _conv(wide, wide, 3))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            kept.append(x := block(nn.functional.max_pool2d(x, 2) if kept else x))
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


def unet_segmentation() -> Built:
    """The U-Net on an image of 640 x 1280."""
    return UNet(), (torch.zeros(1, 3, 640, 1280),)


def vit() -> Built:
    """ViT-B/16, Dosovitskiy et al. 2020."""
    config = configs.ViTConfig(attn_implementation="eager", num_labels=1000)
    return Outputs(transformers.ViTForImageClassification(config), "pixel_values"), (torch.zeros(1, 3, 224, 224),)


def convnext_tiny() -> Built:
    """ConvNeXt-T, Liu et al. 2022."""
    config = configs.ConvNextConfig(num_labels=1000)
    return Outputs(transformers.ConvNextForImageClassification(config), "pixel_values"), (torch.zeros(1, 3, 224, 224),)


class MaskedToken(nn.Module):
    """The likeliest token at one position of 384, as the measured models return it.

    They take the position from the logits of all. The converters of QNN and TFLite take it before a head that is a
    plain linear layer, which then has one row to do; ONNX Runtime leaves it where it is.
    """

    def __init__(self, body: nn.Module, head: nn.Module, select_first: bool) -> None:
        super().__init__()
        self.body, self.head, self.select_first = body, head, select_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position: Tensor) -> Tensor:
        hidden = self.body(input_ids, attention_mask=attention_mask, return_dict=False)[0]
        batch = torch.arange(1)
        logits = self.head(hidden[batch, position]) if self.select_first else self.head(hidden)[batch, position]
        return logits.argmax(-1)  # type: ignore[no-any-return]


def masked_token(body: nn.Module, head: nn.Module, select_first: bool = False) -> Built:
    """With the inputs of the measured models."""
    tokens = torch.zeros(1, 384, dtype=torch.int64)
    inputs = tokens, torch.ones(1, 1, 384, 384), torch.zeros(1, dtype=torch.int64)
    return MaskedToken(body, head, select_first), inputs


def bert(select_first: bool) -> Built:
    """BERT base, Devlin et al. 2018."""
    model = transformers.BertForMaskedLM(configs.BertConfig(attn_implementation="eager"))
    return masked_token(model.bert, model.cls, select_first)


def albert(select_first: bool) -> Built:
    """ALBERT base v2, Lan et al. 2019."""
    config = configs.AlbertConfig(
        attn_implementation="eager", hidden_size=768, num_attention_heads=12, intermediate_size=3072,
        hidden_act="gelu",  # converters make one op of its tanh form, as the number of layers on the device shows
    )  # fmt: skip
    model = transformers.AlbertForMaskedLM(config)
    return masked_token(model.albert, model.predictions, select_first)


def mobile_bert() -> Built:
    """MobileBERT, Sun et al. 2020."""
    model = transformers.MobileBertForMaskedLM(configs.MobileBertConfig(attn_implementation="eager"))
    return masked_token(model.mobilebert, model.cls)


def segformer() -> Built:
    """SegFormer-B0, Xie et al. 2021, on 512 x 512."""
    config = configs.SegformerConfig(num_labels=150)
    model = transformers.SegformerForSemanticSegmentation(config)
    return Outputs(model, "pixel_values"), (torch.zeros(1, 3, 512, 512),)


def whisper(width: int, layers: int, heads: int) -> Built:
    """The encoder of Whisper, Radford et al. 2022."""
    config = configs.WhisperConfig(
        d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width
    )
    encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    for layer in encoder.layers:
        layer.self_attn = HeadByHead(layer.self_attn)
    return Outputs(encoder, "input_features"), (torch.zeros(1, 80, 3000),)


def depth_anything() -> Built:
    """Depth Anything small, Yang et al. 2024, on 518 x 518."""
    backbone = configs.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14,
        out_indices=[9, 10, 11, 12], apply_layernorm=True, reshape_hidden_states=False, attn_implementation="eager",
    )  # fmt: skip
    config = configs.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.DepthAnythingForDepthEstimation(config)
    return Outputs(model, "pixel_values"), (torch.zeros(1, 3, 518, 518),)


def clip_text() -> Built:
    """The text encoder of CLIP ViT-L/14, Radford et al. 2021."""
    config = configs.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, attn_implementation="eager"
    )
    return Outputs(transformers.CLIPTextModel(config), "input_ids"), (torch.zeros(1, 77, dtype=torch.int64),)


LATENT, TEXT, TIME = (1, 4, 64, 64), (1, 77, 768), (1,)


def sd_unet() -> Built:
    """The U-Net of Stable Diffusion 1.5, on 64 x 64 latents."""
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    model.set_attn_processor(Attention(split=True))
    return Outputs(model, "sample timestep encoder_hidden_states"), tuple(map(torch.ones, (LATENT, TIME, TEXT)))


def controlnet() -> Built:
    """ControlNet of Stable Diffusion 1.5, Zhang et al. 2023."""
    model = ControlNetModel(cross_attention_dim=768)
    model.set_attn_processor(Attention(split=False))
    shapes = (LATENT, TIME, TEXT, (1, 3, 512, 512))
    names = "sample timestep encoder_hidden_states controlnet_cond"
    return Outputs(model, names), tuple(map(torch.ones, shapes))


class Decoder(nn.Module):
    """The decoding half of an autoencoder."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))  # type: ignore[no-any-return]


def sd_vae() -> Built:
    """The decoder of the autoencoder of Stable Diffusion 1.5."""
    widths = (128, 256, 512, 512)
    model = AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    )  # fmt: skip
    model.set_attn_processor(Attention(split=False))
    return Decoder(model), (torch.zeros(LATENT),)


def sana_600m() -> Built:
    """Sana 600M at 1024 x 1024 pixels: 32 x 32 latents of 32 channels, 300 text tokens."""
    model = SanaTransformer2DModel(
        num_layers=28, num_attention_heads=36, attention_head_dim=32, num_cross_attention_heads=16,
        cross_attention_head_dim=72, cross_attention_dim=1152, caption_channels=2304, sample_size=32,
    )  # fmt: skip
    return _sana(model)


def sana_1600m() -> Built:
    """Sana 1.6B at 1024 x 1024 pixels."""
    return _sana(SanaTransformer2DModel(sample_size=32))


def _sana(model: nn.Module) -> Built:
    inputs = (torch.zeros(1, 32, 32, 32), torch.zeros(1, 300, 2304), torch.ones(1))
    return Outputs(model, "hidden_states encoder_hidden_states timestep"), inputs


class Attention:
    """Attention of diffusers written out, all heads at once or, as the measured U-Net has it, head by head."""

    def __init__(self, split: bool) -> None:
        self.split = split

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        shape, skip = hidden_states.shape, hidden_states
        if len(shape) == 4:
            hidden_states = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projections = (attn.to_q, attn.to_k, attn.to_v)
        mixed = (head_by_head if self.split else heads_at_once)(hidden_states, context, projections, attn.heads)
        made: Tensor = attn.to_out[0](mixed)
        return made.transpose(1, 2).reshape(shape) + skip if len(shape) == 4 else made


Projections = tuple[nn.Linear, nn.Linear, nn.Linear]


def heads_at_once(x: Tensor, context: Tensor, projections: Projections, heads: int) -> Tensor:
    """All heads in one product."""
    made = (project(source) for project, source in zip(projections, (x, context, context), strict=True))
    query, key, value = (states.unflatten(2, (heads, -1)).transpose(1, 2) for states in made)
    return attend(query, key, value).transpose(1, 2).flatten(2)


def head_by_head(x: Tensor, context: Tensor, projections: Projections, heads: int) -> Tensor:
    """Each head has its own slice of the projections."""
    mixed = []
    width = projections[0].out_features // heads
    for start in range(0, heads * width, width):
        part = slice(start, start + width)
        query, key, value = (
            nn.functional.linear(source, project.weight[part], None if project.bias is None else project.bias[part])
            for project, source in zip(projections, (x, context, context), strict=True)
        )
        mixed.append(attend(query, key, value))
    return torch.cat(mixed, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax of the scaled products, times the values."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return torch.softmax(scores, -1) @ value


class HeadByHead(nn.Module):
    """Self-attention of Whisper, head by head."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        layer = self.attention
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        return layer.out_proj(head_by_head(hidden_states, hidden_states, projections, layer.num_heads)), None


BUILDERS: dict[str, Callable[[], Built]] = {
    "resnet18": lambda: resnet([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "resnet50": lambda: resnet([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "resnext101": resnext101,
    "mobilenet_v2": mobilenet_v2,
    "unet_segmentation": unet_segmentation,
    "vit": vit,
    "convnext_tiny": convnext_tiny,
    "bert_base_uncased_hf": lambda: bert(select_first=True),
    "bert_base_uncased_hf/onnx": lambda: bert(select_first=False),
    "albert_base_v2_hf": lambda: albert(select_first=True),
    "albert_base_v2_hf/onnx": lambda: albert(select_first=False),
    "mobile_bert_uncased_google": mobile_bert,
    "segformer_base": segformer,
    "whisper_tiny": lambda: whisper(384, 4, 6),
    "whisper_small": lambda: whisper(768, 12, 12),
    "depth_anything": depth_anything,
    "stable_diffusion_v1_5/unet": sd_unet,
    "stable_diffusion_v1_5/vae": sd_vae,
    "stable_diffusion_v1_5/text_encoder": clip_text,
    "controlnet_canny": controlnet,
    "sana_600m": sana_600m,
    "sana_1600m": sana_1600m,
}


def export(build: Callable[[], Built]) -> ModelProto:
    """The architecture as ONNX, its weights named but not there."""
    with no_init_weights():
        model, inputs = build()
    program = torch.export.export(model.eval(), inputs, strict=False)
    _drop_divisions_by_one(program)
    exported = torch.onnx.export(program, dynamo=True, opset_version=21, verbose=False, optimize=False)
    assert exported is not None
    for name, value in exported.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and (tensor.size > SMALL or name in program.state_dict):
            value.const_value = onnx_ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=name
            )
    onnxscript.optimizer.fold_constants(exported.model, onnx_shape_inference=False, input_size_limit=0)
    onnx_ir.passes.common.InlinePass()(exported.model)
    return exported.model_proto


def _drop_divisions_by_one(program: torch.export.ExportedProgram) -> None:
    """Each residual block of diffusers ends with one, which every converter removes."""
    for node in list(program.graph.nodes):
        if node.target == torch.ops.aten.div.Tensor and node.args[1] == 1:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def rows(model: str, counts: Iterable[OpCount]) -> Iterator[tuple[Any, ...]]:
    """Equal ops of one model in one row, with how many there are."""
    equal = Counter(dataclasses.astuple(dataclasses.replace(count, name="")) for count in counts)
    names = [field.name for field in dataclasses.fields(OpCount)]
    for values, times in equal.items():
        row = dict(zip(names, values, strict=True))
        yield (model, times, *(row[column] for column in COLUMNS))


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "times", *COLUMNS))
        for name in options.only:
            counts = count_ops(export(BUILDERS[name]))
            writer.writerows(rows(name, counts))
            macs, weights = sum(c.macs for c in counts) / 1e9, sum(c.weights for c in counts) / 1e6
            print(f"{name}: {len(counts)} ops, {macs:.3f} GMAC, {weights:.2f} M weights", file=sys.stderr)


if __name__ == "__main__":
    main()
