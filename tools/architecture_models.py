"""Small configurations of the architectures that ship: the real classes of diffusers and transformers, random weights.

Each function of `ARCHITECTURES` returns a module and its example inputs. Widths are tiny and depth is one or two
blocks, so that a compile takes seconds; every op of the full model is there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

Built = tuple[nn.Module, tuple[Tensor, ...]]
LATENT, TEXT, PROMPT = 8, 12, 32  # latent side; text tokens; width of the text encoder's output
VOCABULARY, LENGTH, CACHED = 128, 16, 15
EXAMPLE = Path(__file__).parents[1] / "examples" / "mobilenet_v2" / "model.py"


class Denoiser(nn.Module):
    """Calls a diffusers transformer by its keywords, in the order of `names`, and returns the tensor alone."""

    def __init__(self, model: nn.Module, *names: str, **fixed: object) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed, return_dict=False)[0]
        return result


def sana() -> Built:
    """Linear attention, RMSNorm of the caption, gated convolutions (arXiv 2410.10629)."""
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=PROMPT,
        sample_size=LATENT,
    )
    return Denoiser(model, "hidden_states", "encoder_hidden_states", "timestep"), (_latent(4), _prompt(), _time(500.0))


def pixart() -> Built:
    """PixArt (arXiv 2310.00426)."""
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=PROMPT,
        sample_size=LATENT,
    )
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    conditions = {"resolution": None, "aspect_ratio": None}
    return Denoiser(model, *names, added_cond_kwargs=conditions), (_latent(4), _prompt(), _time(500.0))


def sd3() -> Built:
    """Joint attention with RMSNorm of queries and keys (arXiv 2403.03206)."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=PROMPT,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=LATENT,
        qk_norm="rms_norm",
    )
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    return Denoiser(model, *names), (_latent(4), _prompt(), torch.randn(1, 24), _time(500.0))


def flux() -> Built:
    """Double and single stream blocks with rotary positions, whose ids are fixed with the image size."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=PROMPT,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    side = torch.arange(4)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    image_ids = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    wrapped = Denoiser(model, *names, img_ids=image_ids, txt_ids=torch.zeros(TEXT, 3))
    return wrapped, (torch.randn(1, 16, 4), _prompt(), torch.randn(1, 24), _time(0.5))


def unet() -> Built:
    """A U-Net with cross attention, as in Stable Diffusion (arXiv 2112.10752)."""
    model = diffusers.UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=PROMPT,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    names = ("sample", "encoder_hidden_states", "timestep")
    return Denoiser(model, *names), (_latent(4), _prompt(), _time(500.0))


class CausalLm(nn.Module):
    """Token ids (N, L) to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return result


class Decoder(nn.Module):
    """One step of decoding: a token (N, 1), its position (N, 1), an additive mask over cache and token, and the cache.

    The cache is a key and a value (N, heads, CACHED, head size) for each layer; with the logits those of this token
    are returned, which the caller writes into its ring.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, mask: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        past = DynamicCache()
        for layer in range(len(cache) // 2):
            past.update(cache[2 * layer], cache[2 * layer + 1], layer)
        result = self.model(
            input_ids=token, position_ids=position, attention_mask=mask, past_key_values=past, use_cache=True
        )
        layers: list[Any] = past.layers
        fresh = [tensor[:, :, -1:] for layer in layers for tensor in (layer.keys, layer.values)]
        return result.logits, *fresh


def _language_config(kind: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return kind(**common, max_position_embeddings=64, attn_implementation="eager")


def _gemma() -> nn.Module:
    model: nn.Module = transformers.Gemma2ForCausalLM(_language_config(transformers.Gemma2Config))
    return model


def _llama() -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM(_language_config(transformers.LlamaConfig))
    return model


def _tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, length))


def _decoding(model: nn.Module) -> Built:
    cache = [torch.randn(1, 1, CACHED, 16) for _ in range(4)]
    mask = torch.zeros(1, 1, 1, CACHED + 1)
    mask[..., :4] = -50.0  # a ring that is not full yet
    return Decoder(model), (_tokens(1), torch.tensor([[CACHED]]), mask, *cache)


def gemma2() -> Built:
    """Gemma-2 (arXiv 2408.00118) over a prompt: soft-capped scores and logits."""
    return CausalLm(_gemma()), (_tokens(),)


def gemma2_decode() -> Built:
    """One token of Gemma-2 with a cache."""
    return _decoding(_gemma())


def llama() -> Built:
    """Llama over a prompt."""
    return CausalLm(_llama()), (_tokens(),)


def llama_decode() -> Built:
    """One token of Llama with a cache."""
    return _decoding(_llama())


class Encoder(nn.Module):
    """Token ids (N, L) and a mask of 1 and 0 (N, L) to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return result


def bert() -> Built:
    """BERT (arXiv 1810.04805) with padding."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, -4:] = 0
    return Encoder(transformers.BertModel(config, add_pooling_layer=False)), (_tokens(), mask)


class LastHidden(nn.Module):
    """Images to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.model(pixel_values=images).last_hidden_state
        return result


def vit() -> Built:
    """ViT (arXiv 2010.11929)."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return LastHidden(transformers.ViTModel(config, add_pooling_layer=False)), (torch.randn(1, 3, 32, 32),)


def convnext() -> Built:
    """ConvNeXt (arXiv 2201.03545)."""
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5)
    return LastHidden(transformers.ConvNextModel(config)), (torch.randn(1, 3, 32, 32),)


def mobilenet_v2() -> Built:
    """The MobileNetV2 of examples/, random weights."""
    return _example_module().MobileNetV2(classes=10), (torch.rand(1, 3, 64, 64) * 2 - 1,)


def _example_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mobilenet_v2_model", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def hifigan() -> Built:
    """A HiFi-GAN generator (arXiv 2010.05646): mel spectrogram (N, frames, bins) to samples."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=32,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    return transformers.SpeechT5HifiGan(config), (torch.randn(1, 24, 16),)


def _latent(channels: int) -> Tensor:
    return torch.randn(1, channels, LATENT, LATENT)


def _prompt() -> Tensor:
    return torch.randn(1, TEXT, PROMPT)


def _time(value: float) -> Tensor:
    return torch.tensor([value])


_BUILDERS: tuple[Callable[[], Built], ...] = (
    mobilenet_v2,
    hifigan,
    convnext,
    vit,
    bert,
    llama,
    llama_decode,
    gemma2,
    gemma2_decode,
    pixart,
    sana,
    sd3,
    flux,
    unet,
)
ARCHITECTURES: dict[str, Callable[[], Built]] = {builder.__name__: builder for builder in _BUILDERS}


def build(name: str, seed: int = 0) -> Built:
    """One architecture with seeded weights and inputs, in eval mode; norms get weights other than 1 and 0."""
    torch.manual_seed(seed)
    model, inputs = ARCHITECTURES[name]()
    model.eval().requires_grad_(False)
    for module in model.modules():
        _randomize(module)
    return model, inputs


def _randomize(module: nn.Module) -> None:
    """Trained norms are no identities, and an initial adaLN table of zeros would hide its ops."""
    if "Norm" in type(module).__name__:
        for name, parameter in module.named_parameters(recurse=False):
            nn.init.normal_(parameter, 1.0 if name == "weight" and "Gemma" not in type(module).__name__ else 0.0, 0.2)
    if isinstance(module, nn.BatchNorm2d) and module.running_var is not None and module.running_mean is not None:
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.5, 1.5)
