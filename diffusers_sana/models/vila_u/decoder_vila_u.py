"""The pixel decoder of VILA-U: the convolutional decoder of VQGAN (arXiv 2012.09841), with its weight names.

Level `i` of `up` works at 1/2^i of the image resolution. The last and coarsest level runs first, and only this level
has attention.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class VilaUDecoderResBlock(GradientCheckpointingLayer):
    """Twice norm, SiLU and convolution, with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H, W]`."""
        shortcut = hidden_states if self.nin_shortcut is None else self.nin_shortcut(hidden_states)
        hidden_states = self.conv1(nn.functional.silu(self.norm1(hidden_states)))
        return shortcut + self.conv2(nn.functional.silu(self.norm2(hidden_states)))


class VilaUDecoderAttention(nn.Module):
    """Single-head attention between all pixels."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        normed = self.norm(hidden_states)
        query, key, value = (layer(normed).flatten(2).mT.unsqueeze(1) for layer in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return hidden_states + self.proj_out(out.squeeze(1).mT.reshape(hidden_states.shape))


class VilaUDecoderUpsample(nn.Module):
    """Doubles the resolution: nearest pixel, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2H, 2W]`."""
        return self.conv(nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class VilaUDecoderMiddle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.block_1 = VilaUDecoderResBlock(channels, channels, norm_groups)
        self.attn_1 = VilaUDecoderAttention(channels, norm_groups)
        self.block_2 = VilaUDecoderResBlock(channels, channels, norm_groups)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class VilaUDecoderLevel(nn.Module):
    """The blocks of one resolution, each optionally followed by attention, and the upsampling to the next level."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, upsample: bool, norm_groups: int
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(VilaUDecoderResBlock(*pair, norm_groups) for pair in pairwise(widths))
        self.attn = nn.ModuleList(VilaUDecoderAttention(out_channels, norm_groups) for _ in self.block if attention)
        self.upsample = VilaUDecoderUpsample(out_channels) if upsample else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H, W]`, or twice that size."""
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if self.attn:
                hidden_states = self.attn[index](hidden_states)
        return hidden_states if self.upsample is None else self.upsample(hidden_states)


class VilaUPixelDecoder(nn.Module):
    """Latents to pixels, 2^(levels - 1) times larger."""

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        channels = [config.decoder_base_channels * multiplier for multiplier in config.decoder_channel_multipliers]
        coarsest = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = VilaUDecoderMiddle(channels[-1], config.decoder_norm_groups)
        self.up = nn.ModuleList(
            VilaUDecoderLevel(
                in_channels=channels[min(level + 1, coarsest)],
                out_channels=channels[level],
                num_blocks=config.decoder_num_res_blocks + 1,
                attention=level == coarsest,
                upsample=level > 0,
                norm_groups=config.decoder_norm_groups,
            )
            for level in range(len(channels))
        )
        self.norm_out = _norm(channels[0], config.decoder_norm_groups)
        self.conv_out = nn.Conv2d(channels[0], config.num_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, latent_channels, h, w]` to pixels `[B, num_channels, H, W]`, about -1 to 1 and not clamped."""
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
        return self.conv_out(nn.functional.silu(self.norm_out(hidden_states)))


def resize_latents(latents: Tensor, size: int) -> Tensor:
    """`[B, C, h, w]` to `[B, C, size, size]`, bilinear between pixel centres, computed in fp32."""
    resized = nn.functional.interpolate(latents.to(torch.float32), (size, size), mode="bilinear", align_corners=False)
    return resized.to(latents.dtype)
