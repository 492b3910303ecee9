"""A small class-conditional diffusion transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748) for 8x8 digits.

It is a real DiT in miniature: patch embedding, multi-head attention, adaLN-zero modulation, a timestep and a class
embedding with a null class for classifier-free guidance. Two choices suit an NPU with 8-bit activations:

- No tensor has more than five dimensions. Unpatchify usually permutes six; channels that lie innermost need five.
- The timestep lies in [0, 1] and meets frequencies of at most 16 rad. A phase of the customary 1000 rad, held in 8
  bits, would move in steps of 4 rad, and its sine would be noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 8
PATCH_SIZE = 2
CLASSES = 10
NULL_CLASS = CLASSES  # the label of "no class", for classifier-free guidance


class TimestepEmbedding(nn.Module):
    """Embed a time in [0, 1] as sines and cosines of geometrically spaced frequencies, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 32, highest: float = 16.0) -> None:
        super().__init__()
        spaced = torch.logspace(math.log10(0.5), math.log10(highest), frequencies)
        self.register_buffer("frequencies", spaced)  # rad per unit of time
        self.hidden = nn.Linear(2 * frequencies, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Map times [B] to embeddings [B, width]."""
        phase = t[:, None] * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], dim=-1)
        embedding: Tensor = self.out(F.silu(self.hidden(waves)))
        return embedding


class Attention(nn.Module):
    """Multi-head self-attention over [B, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, tokens, width] to the same shape."""
        q, k, v = self._split_heads(self.q(x)), self._split_heads(self.k(x)), self._split_heads(self.v(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return merged

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class Mlp(nn.Module):
    """The feed-forward half of a block: widen, GELU, narrow."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, tokens, width] to the same shape."""
        narrowed: Tensor = self.down(F.gelu(self.up(x)))
        return narrowed


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift normalized tokens [B, tokens, width] with one vector [B, 1, width] per image (adaLN)."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block whose norms and residual gates are steered by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width)
        self.modulation = _zero_linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens [B, tokens, width] to the same shape; `condition` is [B, 1, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out


class DiT(nn.Module):
    """Predict the flow-matching velocity of noised images; see `data.py` for the direction of time.

    The defaults are for 8x8 digits.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        image_size: int = IMAGE_SIZE,
        channels: int = 1,
        patch_size: int = PATCH_SIZE,
    ) -> None:
        super().__init__()
        self.channels, self.patch_size, self.grid_size = channels, patch_size, image_size // patch_size
        self.patch = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid_size**2, width))
        self.time = TimestepEmbedding(width)
        self.label = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero_linear(width, 2 * width)
        self.proj_out = _zero_linear(width, patch_size**2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity [B, C, H, W] of noised images `x` [B, C, H, W] at times `t` [B] in [0, 1].

        `y` [B] holds int64 labels: 0 to 9, or `NULL_CLASS` for no class.
        """
        condition = F.silu(self.time(t) + self.label(y)).unsqueeze(1)
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self._unpatchify(self.proj_out(modulate(self.norm(tokens), shift, scale)))

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Lay patches [B, grid_size**2, patch_size**2 * C] out as images [B, C, H, W]."""
        grid, patch = self.grid_size, self.patch_size
        rows = patches.view(-1, grid, grid, patch, patch * self.channels).permute(0, 1, 3, 2, 4)
        if self.channels == 1:
            return rows.reshape(-1, 1, grid * patch, grid * patch)
        return rows.reshape(-1, grid * patch, grid * patch, self.channels).permute(0, 3, 1, 2)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a Linear that starts at zero, so that each block starts as the identity (adaLN-zero)."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
