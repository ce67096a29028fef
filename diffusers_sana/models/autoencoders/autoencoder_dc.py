"""Deep compression autoencoder (DC-AE, arXiv 2410.10733; the autoencoder of Sana, arXiv 2410.10629).

Read from top to bottom: norm, residual convolution block, linear attention block, change of resolution, the two
halves, the model. Stage `i` works at `1 / 2**i` of the image's size; the convolution-only stages next to the pixels
are the "shallow" ones, the others, in which attention sees the whole image, the "deep" ones.

All feature maps are channels-last in memory, so norms and matrix products over channels need no copies.

Legend: B batch, C channels, H height, W width, N = H * W tokens, D head dim, S attention scales,
ratio = image size / latent size.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_sana.kernels.linear import conv2d
from diffusers_sana.kernels.multiscale_projection import multiscale_projection
from diffusers_sana.kernels.relu_linear_attention import relu_linear_attention
from diffusers_sana.kernels.rms_norm import rms_norm
from diffusers_sana.models.autoencoders.exact_tiling import (
    ShallowEnd,
    decoder_shallow_end,
    encoder_shallow_end,
    map_tiles,
)
from diffusers_sana.models.autoencoders.resample import (
    average_channels,
    down_shortcut,
    interleave,
    interpolated_conv2d,
    repeat_channels,
)
from diffusers_sana.models.autoencoders.stage_config import StageConfig, check_autoencoder_config, stage_configs
from diffusers_sana.models.layers import Conv2d, Linear, PointwiseConv2d, gated_bottleneck, is_plain
from diffusers_sana.models.loading import SingleFileMixin, StrictModelMixin


DEFAULT_TILE_SIZE = 1024


class RMSNorm(nn.Module):
    """RMS norm over the channels of each pixel with weight and bias, added to `residual` if given."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to the same shape and dtype."""
        if residual is not None:
            residual = residual.movedim(1, -1)
        out = rms_norm(hidden_states.movedim(1, -1), self.weight, self.bias, eps=self.eps, residual=residual)
        return out.movedim(-1, 1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm, added to `residual`."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape and dtype."""
        return super().forward(hidden_states) + residual

    def folded_into(self, conv: Conv2d) -> tuple[Tensor, Tensor]:
        """Weight and bias of `conv` with this norm and its running statistics folded in."""
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        scale = self.weight.float() * torch.rsqrt(variance.float() + self.eps)
        bias = self.bias.float() - mean.float() * scale
        return (conv.weight.float() * scale[:, None, None, None]).to(conv.weight.dtype), bias.to(conv.weight.dtype)


NORMS: dict[str, type[RMSNorm] | type[BatchNorm]] = {"rms_norm": RMSNorm, "batch_norm": BatchNorm}


class ResBlock(nn.Module):
    """Residual block: 3x3 convolution, activation, 3x3 convolution, norm."""

    def __init__(self, channels: int, norm_type: str, act_fn: str) -> None:
        super().__init__()
        self.nonlinearity = get_activation(act_fn)
        if hasattr(self.nonlinearity, "inplace"):
            self.nonlinearity.inplace = True  # type: ignore[assignment]  # on the output of `conv1`, which is not used elsewhere
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm_type](channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        out = self.nonlinearity(self.conv1(hidden_states))
        if isinstance(self.norm, BatchNorm) and not self.training and is_plain(self.conv2):
            weight, bias = self.norm.folded_into(self.conv2)
            return conv2d(out, weight, bias, padding=1).add_(hidden_states)
        return self.norm(self.conv2(out), residual=hidden_states)


class MultiscaleProjection(nn.Module):
    """Mixes queries, keys and values of neighboring tokens: a depthwise convolution, then one matrix per head."""

    def __init__(self, channels: int, num_groups: int, kernel_size: int) -> None:
        super().__init__()
        self.proj_in = Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.proj_out = Conv2d(channels, channels, 1, groups=num_groups, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, 3 C, H, W]` to the same shape."""
        if not is_plain(self.proj_in, self.proj_out):
            return self.proj_out(self.proj_in(hidden_states))
        out = multiscale_projection(hidden_states.movedim(1, -1), self.proj_in.weight, self.proj_out.weight)
        return out.movedim(-1, 1)


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over all pixels (EfficientViT, arXiv 2205.14756), at one or more scales of the tokens.

    The names `to_q`, `to_k` and `to_v` are misleading: the checkpoints hold one projection to 3 C channels, split into
    three blocks of rows, whose channels are read as (head, [query, key, value], D). Each block contributes to all
    three roles; only their concatenation is meaningful.
    """

    def __init__(self, channels: int, head_dim: int, norm_type: str, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(channels, channels, bias=False)
        self.to_v = Linear(channels, channels, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            MultiscaleProjection(3 * channels, 3 * channels // head_dim, kernel_size) for kernel_size in kernel_sizes
        )
        self.to_out = Linear((1 + len(kernel_sizes)) * channels, channels, bias=False)
        self.norm_out = NORMS[norm_type](channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        pixels = hidden_states.movedim(1, -1)  # [B, H, W, C]
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        # Heads are independent, so scales are processed one by one, with the fp32 copies of one scale in memory.
        out = [self._attend(qkv)] + [self._attend(project(qkv)) for project in self.to_qkv_multiscale]
        out = self.to_out(torch.cat(out, dim=-1)).movedim(-1, 1)  # [B, H, W, S C] -> [B, C, H, W]
        return self.norm_out(out, residual=hidden_states)

    def _attend(self, qkv: Tensor) -> Tensor:
        """`[B, 3 C, H, W]` to `[B, H, W, C]`."""
        height, width = qkv.shape[-2:]
        tokens = qkv.movedim(1, -1).flatten(1, 2)  # [B, N, 3 C]
        query, key, value = tokens.unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)  # 3 x [B, N, heads, D]
        return relu_linear_attention(query, key, value).flatten(-2).unflatten(1, (height, width))


class GLUMBConv(nn.Module):
    """Residual inverted bottleneck with a depthwise convolution and a SiLU gate, expansion 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_inverted = PointwiseConv2d(channels, 8 * channels, 1)
        self.conv_depth = Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.conv_point = PointwiseConv2d(4 * channels, channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        out = gated_bottleneck(hidden_states, self.conv_inverted, self.conv_depth, self.conv_point)
        return self.norm(out, residual=hidden_states)


class EfficientViTBlock(nn.Module):
    """Global linear attention followed by a local gated convolution."""

    def __init__(self, channels: int, head_dim: int, norm_type: str, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, norm_type, kernel_sizes)
        self.conv_out = GLUMBConv(channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return self.conv_out(self.attn(hidden_states))


class DownBlock(nn.Module):
    """Halves height and width.

    The shortcut moves each 2x2 patch into channels and averages groups of neighboring channels, so the convolution
    only learns the residual ("residual autoencoding").
    """

    def __init__(self, in_channels: int, out_channels: int, block_type: str, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle = block_type == "pixel_unshuffle"
        self.shortcut = shortcut
        self.group_size = 4 * in_channels // out_channels
        if self.unshuffle:
            self.conv = Conv2d(in_channels, out_channels // 4, 3, padding=1)
        else:
            self.conv = Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H / 2, W / 2]`."""
        out = self.conv(hidden_states)
        if self.unshuffle:
            out = F.pixel_unshuffle(out, 2)
        if self.shortcut:
            out = out + down_shortcut(hidden_states, self.group_size)
        return out


class UpBlock(nn.Module):
    """Doubles height and width; the shortcut mirrors that of `DownBlock`, with repeated channels."""

    def __init__(self, in_channels: int, out_channels: int, block_type: str, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate = block_type == "interpolate"
        self.shortcut = shortcut
        self.repeats = 4 * out_channels // in_channels
        self.conv = Conv2d(in_channels, out_channels * (1 if self.interpolate else 4), 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, 2 H, 2 W]`."""
        repeats = self.repeats if self.shortcut else None
        if not self.interpolate:
            out = self.conv(hidden_states)  # [B, 4 C_out, H, W]
            return interleave([out[:, k::4] for k in range(4)], hidden_states, repeats)
        if is_plain(self.conv):
            return interleave(
                interpolated_conv2d(hidden_states, self.conv.weight, self.conv.bias), hidden_states, repeats
            )
        out = self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        phases = [out[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return interleave(phases, hidden_states, repeats) if self.shortcut else out


class Stage(nn.Sequential):
    """The blocks at one resolution and the change of resolution before or after them."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to the shape of the next stage."""
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states


def make_blocks(stage: StageConfig) -> list[nn.Module]:
    """The blocks of one stage, without its change of resolution."""
    if stage.block_type == "ResBlock":
        return [ResBlock(stage.channels, stage.norm_type, stage.act_fn) for _ in range(stage.num_layers)]
    return [
        EfficientViTBlock(stage.channels, stage.head_dim, stage.norm_type, stage.kernel_sizes)
        for _ in range(stage.num_layers)
    ]


class Encoder(nn.Module):
    """Image to latent."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        stages: Sequence[StageConfig],
        downsample_block_type: str,
        out_shortcut: bool,
    ) -> None:
        super().__init__()
        self.shallow_end = encoder_shallow_end(stages)
        self.conv_in: nn.Module
        if stages[0].num_layers > 0:
            self.conv_in = Conv2d(in_channels, stages[0].channels, 3, padding=1)
        else:
            self.conv_in = DownBlock(in_channels, stages[1].channels, downsample_block_type, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for stage, deeper in zip_longest(stages, stages[1:]):
            blocks = make_blocks(stage)
            if blocks and deeper is not None:
                blocks.append(DownBlock(stage.channels, deeper.channels, downsample_block_type))
            self.down_blocks.append(Stage(*blocks))
        self.conv_out = Conv2d(stages[-1].channels, latent_channels, 3, padding=1)
        self.out_group_size = stages[-1].channels // latent_channels if out_shortcut else None

    def forward(self, hidden_states: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] to `[B, latent_channels, H / ratio, W / ratio]`.

        `tile` is the height and width, in units of `shallow_end`, of the tiles to run the shallow stages in.
        """
        return self.deep_stages(self.tiled_shallow_stages(hidden_states, tile))

    def tiled_shallow_stages(self, hidden_states: Tensor, tile: tuple[int, int] | None) -> Tensor:
        """`shallow_stages`, in tiles of that size if one is given."""
        if tile is None:
            return self.shallow_stages(hidden_states)
        end = self.shallow_end
        return map_tiles(self.shallow_stages, hidden_states, core=tile, halo=end.halo, unit_in=end.unit, unit_out=1)

    def shallow_stages(self, hidden_states: Tensor) -> Tensor:
        """Image to features; a pixel of the result depends on its neighborhood only."""
        hidden_states = self.conv_in(hidden_states)
        for stage in self.down_blocks[: self.shallow_end.num_stages]:
            hidden_states = stage(hidden_states)
        return hidden_states

    def deep_stages(self, hidden_states: Tensor) -> Tensor:
        """Features to latent."""
        for stage in self.down_blocks[self.shallow_end.num_stages :]:
            hidden_states = stage(hidden_states)
        out = self.conv_out(hidden_states)
        if self.out_group_size is not None:
            out = out + average_channels(hidden_states, self.out_group_size)
        return out


class Decoder(nn.Module):
    """Latent to image. `up_blocks` counts from the pixels, as the encoder's stages do, and runs backwards."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        stages: Sequence[StageConfig],
        upsample_block_type: str,
        in_shortcut: bool,
        conv_act_fn: str,
    ) -> None:
        super().__init__()
        self.shallow_end = decoder_shallow_end(stages, interpolate=upsample_block_type == "interpolate")
        self.conv_in = Conv2d(latent_channels, stages[-1].channels, 3, padding=1)
        self.in_repeats = stages[-1].channels // latent_channels if in_shortcut else None
        self.up_blocks = nn.ModuleList()
        for stage, deeper in zip_longest(stages, stages[1:]):
            blocks = make_blocks(stage)
            if blocks and deeper is not None:
                blocks.insert(0, UpBlock(deeper.channels, stage.channels, upsample_block_type))
            self.up_blocks.append(Stage(*blocks))
        last = stages[0] if stages[0].num_layers > 0 else stages[1]
        self.norm_out = RMSNorm(last.channels)
        self.conv_act = get_activation(conv_act_fn)
        self.conv_out: nn.Module
        if stages[0].num_layers > 0:
            self.conv_out = Conv2d(last.channels, in_channels, 3, padding=1)
        else:
            self.conv_out = UpBlock(last.channels, in_channels, upsample_block_type, shortcut=False)

    def forward(self, hidden_states: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """`[B, latent_channels, H, W]` to `[B, 3, H * ratio, W * ratio]`, not clamped.

        `tile` is the height and width, in units of `shallow_end`, of the tiles to run the shallow stages in.
        """
        return self.tiled_shallow_stages(self.deep_stages(hidden_states), tile)

    def tiled_shallow_stages(self, hidden_states: Tensor, tile: tuple[int, int] | None) -> Tensor:
        """`shallow_stages`, in tiles of that size if one is given."""
        if tile is None:
            return self.shallow_stages(hidden_states)
        end = self.shallow_end
        return map_tiles(self.shallow_stages, hidden_states, core=tile, halo=end.halo, unit_in=1, unit_out=end.unit)

    def deep_stages(self, hidden_states: Tensor) -> Tensor:
        """Latent to features."""
        out = self.conv_in(hidden_states)
        if self.in_repeats is not None:
            out = out + repeat_channels(hidden_states, self.in_repeats)
        for stage in reversed(self.up_blocks[self.shallow_end.num_stages :]):
            out = stage(out)
        return out

    def shallow_stages(self, hidden_states: Tensor) -> Tensor:
        """Features to image; a pixel of the result depends on its neighborhood only."""
        for stage in reversed(self.up_blocks[: self.shallow_end.num_stages]):
            hidden_states = stage(hidden_states)
        return self.conv_out(self.conv_act(self.norm_out(hidden_states)))


class AutoencoderDC(StrictModelMixin, AutoencoderMixin, ConfigMixin, SingleFileMixin):
    """Deep compression autoencoder (DC-AE, arXiv 2410.10733; DC-AE 1.5, arXiv 2508.00413).

    A drop-in for the diffusers class of this name: same config, state dict and calls. There is no sampling: `encode`
    gives the latent itself. Diffusion models work on `latent * config.scaling_factor`; divide by it before `decode`.

    Pipelines call `encode` and `decode`, so compile `vae.encoder` and `vae.decoder`, not the model. Batch norm, if the
    decoder has it, updates its running statistics twice per step under gradient checkpointing. Group offloading by
    blocks needs `num_blocks_per_group=1`, because the decoder's stages run from the last to the first.

    Args:
        in_channels: channels of an image.
        latent_channels: channels of a latent.
        attention_head_dim: channels of an attention head.
        encoder_block_types, decoder_block_types: `"ResBlock"` or `"EfficientViTBlock"`, for all stages or one per
            stage.
        encoder_block_out_channels, decoder_block_out_channels: width of each stage, from the pixels inwards. Each
            stage after the first halves the image's height and width.
        encoder_layers_per_block, decoder_layers_per_block: blocks in each stage. If the first is 0, the first
            convolution halves, or the last doubles, height and width.
        encoder_qkv_multiscales, decoder_qkv_multiscales: kernel sizes of the further scales at which each stage's
            attention sees its tokens.
        upsample_block_type: `"interpolate"` convolves after enlarging, any other name before (pixel shuffle).
        downsample_block_type: `"pixel_unshuffle"`; any other name convolves with stride 2.
        decoder_norm_types: `"rms_norm"` or `"batch_norm"`, for all stages or one per stage.
        decoder_act_fns: activation of the residual blocks, for all stages or one per stage.
        encoder_out_shortcut, decoder_in_shortcut: whether the latent is added to the average of the deepest stage's
            channels, and repeated to make them.
        decoder_conv_act_fn: activation before the last convolution.
        scaling_factor: 1 / root mean square of the latents of the training set.

    Raises:
        TypeError, ValueError: for names, numbers, lengths or widths that cannot build a model.
    """

    _supports_gradient_checkpointing = True
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: str | tuple[str, ...] = "ResBlock",
        decoder_block_types: str | tuple[str, ...] = "ResBlock",
        encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: str | tuple[str, ...] = "rms_norm",
        decoder_act_fns: str | tuple[str, ...] = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_autoencoder_config(self.config)
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            stage_configs("encoder", self.config),
            downsample_block_type,
            encoder_out_shortcut,
        )
        self.decoder = Decoder(
            in_channels,
            latent_channels,
            stage_configs("decoder", self.config),
            upsample_block_type,
            decoder_in_shortcut,
            decoder_conv_act_fn,
        )
        self.spatial_compression_ratio = 2 ** (len(encoder_block_out_channels) - 1)
        self.temporal_compression_ratio = 1

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_height = self.tile_sample_min_width = DEFAULT_TILE_SIZE
        self.tile_sample_stride_height = self.tile_sample_stride_width = DEFAULT_TILE_SIZE - self._tile_margin()

    @property
    def tile_latent_min_height(self) -> int:
        """Height of a tile in latent pixels."""
        return self.tile_sample_min_height // self.spatial_compression_ratio

    @property
    def tile_latent_min_width(self) -> int:
        """Width of a tile in latent pixels."""
        return self.tile_sample_min_width // self.spatial_compression_ratio

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encodes and decodes images larger than a tile piece by piece, with the same result (see `exact_tiling`).

        All sizes are pixels of the image and multiples of the compression ratio.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile with its halo; images that exceed it in
                either direction are tiled. By default the previous value, initially 1024.
            tile_sample_stride_height, tile_sample_stride_width: the most that a tile contributes to the result. By
                default the given size minus the halo, or else the previous value.

        Raises:
            ValueError: if a size is not a positive multiple of the compression ratio, a tile is too small for its
                halo, or a stride is larger than the tile.
        """
        height = self._check_tile("height", tile_sample_min_height, tile_sample_stride_height)
        width = self._check_tile("width", tile_sample_min_width, tile_sample_stride_width)
        self.tile_sample_min_height, self.tile_sample_stride_height = height
        self.tile_sample_min_width, self.tile_sample_stride_width = width
        self.use_tiling = True

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Images to latents.

        Args:
            x: `[B, in_channels, H, W]` in [-1, 1]; H and W are multiples of the compression ratio.
            return_dict: whether to return an `EncoderOutput` or a tuple.

        Returns:
            `EncoderOutput` with `latent`, `[B, latent_channels, H / ratio, W / ratio]`, or a tuple of it.

        Raises:
            ValueError: if the shape of `x` does not fit.
            TypeError: if `x` is not of a floating point dtype.
        """
        self._check_input("x", x, self.config["in_channels"], self.spatial_compression_ratio)
        latent = self._for_each_slice(self._encode, x)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents to images.

        Args:
            z: `[B, latent_channels, H, W]`, as `encode` gives them, that is already divided by the scaling factor.
            return_dict: whether to return a `DecoderOutput` or a tuple.

        Returns:
            `DecoderOutput` with `sample`, `[B, in_channels, H * ratio, W * ratio]`, not clamped, or a tuple of it.

        Raises:
            ValueError: if the shape of `z` does not fit.
            TypeError: if `z` is not of a floating point dtype.
        """
        self._check_input("z", z, self.config["latent_channels"], 1)
        sample = self._for_each_slice(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes `sample`, `[B, in_channels, H, W]`."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    def _for_each_slice(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        # The result has the layout of the input, as in diffusers: callers sample noise "like" it, which depends on
        # that.
        layout = torch.contiguous_format if batch.is_contiguous() else torch.channels_last
        batch = batch.contiguous(memory_format=torch.channels_last)
        if self.use_slicing and batch.shape[0] > 1:
            out = torch.cat([function(piece) for piece in batch.split(1)])
        else:
            out = function(batch)
        return out.contiguous(memory_format=layout)

    def _encode(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return self.encoder(x, tile=self._tile_core(self.encoder.shallow_end, height, width))

    def _decode(self, z: Tensor) -> Tensor:
        height, width = (size * self.spatial_compression_ratio for size in z.shape[-2:])
        return self.decoder(z, tile=self._tile_core(self.decoder.shallow_end, height, width))

    def _tile_core(self, end: ShallowEnd, height: int, width: int) -> tuple[int, int] | None:
        """Height and width of the tiles' cores in units, or None where the whole image is one tile."""
        if not self.use_tiling or (height <= self.tile_sample_min_height and width <= self.tile_sample_min_width):
            return None
        if self.training and any(isinstance(module, BatchNorm) for module in self.modules()):
            raise ValueError("`use_tiling` needs `vae.eval()`: while training, batch norm sees all of the image.")
        return (
            end.core(self.tile_sample_min_height, self.tile_sample_stride_height),
            end.core(self.tile_sample_min_width, self.tile_sample_stride_width),
        )

    def _tile_margin(self) -> int:
        return max(self.encoder.shallow_end.margin, self.decoder.shallow_end.margin)

    def _check_tile(self, axis: str, size: int | None, stride: int | None) -> tuple[int, int]:
        ratio, margin = self.spatial_compression_ratio, self._tile_margin()
        for name, value in ((f"tile_sample_min_{axis}", size), (f"tile_sample_stride_{axis}", stride)):
            if value is not None and (value <= 0 or value % ratio):
                raise ValueError(f"`{name}` must be a positive multiple of {ratio} pixels, got {value}.")
        if size is None:
            size = getattr(self, f"tile_sample_min_{axis}")
            stride = stride if stride is not None else getattr(self, f"tile_sample_stride_{axis}")
        if size <= margin:
            raise ValueError(
                f"`tile_sample_min_{axis}` must be more than {margin} pixels, the context this model needs around a "
                f"tile, got {size}."
            )
        stride = stride if stride is not None else size - margin
        if stride > size:
            raise ValueError(f"`tile_sample_stride_{axis}` must be at most the tile's size, {size}, got {stride}.")
        return size, stride

    def _check_input(self, name: str, tensor: Tensor, channels: int, multiple: int) -> None:
        if tensor.ndim != 4 or tensor.shape[1] != channels:
            raise ValueError(f"`{name}` must have the shape [B, {channels}, H, W], got {list(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be of a floating point dtype, got {tensor.dtype}.")
        height, width = tensor.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"`{name}` must have a height and width that are multiples of {multiple}, got {height} x {width}. "
                f"Resize or crop to {max(height // multiple, 1) * multiple} x {max(width // multiple, 1) * multiple}."
            )
