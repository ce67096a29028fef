"""SANA-Video's denoiser: Sana's blocks over the frames of a video, with rotary positions and a temporal convolution.

Legend: B batch, C latent channels, T H W latent frames, height and width, t h w token grid (T/p, H/q, W/r for patches
of p, q, r), N = t*h*w tokens, L text tokens, D inner width, d head width, G times per video: 1, or t, one per frame.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.models.layers import Conv2d, Linear, PatchConv3d, scaled_adapters, split_scale
from diffusers_sana.models.loading import SingleFileMixin, StrictModelMixin
from diffusers_sana.models.transformers.attention_sana import SanaRMSNorm, SanaTextState
from diffusers_sana.models.transformers.cache_sana import SanaCacheMixin
from diffusers_sana.models.transformers.config_sana import check_video_transformer_config
from diffusers_sana.models.transformers.modulated_norm import SanaModulatedNorm, modulated_norm, residual_norm
from diffusers_sana.models.transformers.sequence_parallel import (
    FRAMES_OF_VIDEO,
    Rows,
    SequenceParallelMixin,
    split_plan,
)
from diffusers_sana.models.transformers.stream_sana_video import (
    SanaVideoBlockState,
    SanaVideoState,
    SanaVideoTransformerOutput,
)
from diffusers_sana.models.transformers.text_sana import SanaTextContext, SanaTextMixin
from diffusers_sana.models.transformers.transformer_sana import (
    SanaCombinedTimestepGuidanceEmbeddings,
    SanaMixFeedForward,
    SanaTransformerBlock,
    check_conditions,
    check_guidance,
    make_sana_blocks,
)


ROPE_BASE = 10000.0


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How many channels of a head are turned by the frame, the row and the column (Wan, arXiv 2503.20314)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_tables(frames: Tensor, height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all tokens.

    They are not cached, and no buffers: those would be rounded by a cast of the model, to an error of 0.002 in bf16.

    Args:
        frames: `[t]`, the numbers of the frames.
        height, width: token grid.
        head_dim: d.

    Returns:
        Two tables `[N, d/2]` in fp32, computed in fp64 if the device supports it.
    """
    device = frames.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    grid = len(frames), height, width
    positions = (frames, torch.arange(height, device=device), torch.arange(width, device=device))
    parts = []
    for axis, (channels, position) in enumerate(zip(rotary_axes(head_dim), positions, strict=True)):
        frequencies = ROPE_BASE ** (-torch.arange(0, channels, 2, dtype=dtype, device=device) / max(channels, 1))
        angles = position.to(dtype)[:, None] * frequencies
        shape = [size if other == axis else 1 for other, size in enumerate(grid)]
        parts.append(angles.view(*shape, -1).expand(*grid, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)
    return angles.cos().float(), angles.sin().float()


class SanaVideoMixFeedForward(SanaMixFeedForward):
    """Mix-FFN of single frames, followed by a residual convolution over three frames (arXiv 2509.24695).

    The convolution begins as zeros: a model of images, put in here, treats the frames as images.

    Args: see `SanaMixFeedForward`.
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__(dim, mlp_ratio)
        self.conv_temp = Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)
        nn.init.zeros_(self.conv_temp.weight)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, state: SanaVideoBlockState | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps `[B, t, h, w, D]` to the same shape.

        With the state of earlier frames, the convolution also sees the last of them, and `frame` of the new state is
        returned too.
        """
        _, frames, height, width, _ = hidden_states.shape
        images = super().forward(hidden_states.flatten(0, 1).movedim(-1, 1)).movedim(1, -1)  # [B * t, h, w, D]
        video = images.unflatten(0, (-1, frames))
        before = None if state is None else state.frame
        seen = video if before is None else torch.cat([before[:, None], video], dim=1)
        # With frames as rows it is a convolution of an image, whose channels are last in memory.
        change = self.conv_temp(seen.flatten(2, 3).movedim(-1, 1))[:, :, -frames:]  # [B, D, t, h * w]
        out = video + change.movedim(1, -1).unflatten(2, (height, width))
        # A copy, because a slice would keep all frames in memory.
        return out if state is None else (out, video[:, -1].clone())


class SanaVideoTransformerBlock(SanaTransformerBlock):
    """`SanaTransformerBlock` of a video, with rotary positions in the self-attention.

    Args: see `SanaVideoTransformer3DModel`; `dim` is D.
    """

    feed_forward_class = SanaVideoMixFeedForward

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | SanaTextState,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        height: int,
        width: int,
        rotary_emb: tuple[Tensor, Tensor],
        state: SanaVideoBlockState | None = None,
    ) -> Tensor | tuple[Tensor, SanaVideoBlockState]:
        """One block.

        Args:
            hidden_states: `[B, N, D]`, frames first, then rows.
            encoder_hidden_states, encoder_attention_mask: as in `SanaTransformerBlock`.
            timestep: modulation `[B or 1, G, 6 * D]`.
            height, width: token grid of a frame.
            rotary_emb: from `rotary_tables`.
            state: of the frames before these; None for a whole video.

        Returns:
            `[B, N, D]`, and with `state` that of all frames so far.
        """
        stream: dict[str, Any] = {} if state is None else {"state": state}
        modulation = self.scale_shift_table + timestep.unflatten(-1, (6, -1))  # [B or 1, G, 6, D]
        groups = hidden_states.shape[0] * modulation.shape[1]
        # Tokens of a time together, [B * G, N / G, D], with modulations [B * G or 1, 1, D].
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.flatten(0, 1).chunk(6, dim=1)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(groups, -1, x.shape[-1])

        normed = modulated_norm(self.norm1, hidden_states, shift_msa, scale_msa)
        attn_output = self.attn1(normed, rotary_emb=rotary_emb, **stream)
        if state is not None:
            attn_output, attention = attn_output
        hidden_states = gated_residual(grouped(hidden_states), grouped(attn_output), gate_msa).view_as(hidden_states)

        attn_output = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        hidden_states, normed = residual_norm(self.norm2, hidden_states, attn_output, None, shift_mlp, scale_mlp)
        # With sequence parallelism, each process has some of the frames.
        ff_output = self.ff(normed.unflatten(1, (-1, height, width)), **stream)
        if state is not None:
            ff_output, frame = ff_output
        ff_output = grouped(ff_output.flatten(1, 3))
        hidden_states = gated_residual(grouped(hidden_states), ff_output, gate_mlp).view_as(hidden_states)
        return hidden_states if state is None else (hidden_states, SanaVideoBlockState(attention, frame))


class SanaVideoTransformer3DModel(
    SanaTextMixin,
    SequenceParallelMixin,
    StrictModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    SanaCacheMixin,
    SingleFileMixin,
):
    """The denoiser of SANA-Video (arXiv 2509.24695), for text and for a first image.

    Configuration, state-dict keys, `forward` and outputs are those of the diffusers class of the same name. In
    addition, `encode_text` does the text-dependent work once per prompt instead of once per step, each frame may have
    its own time, and `state` makes it LongSANA's block-causal model, whose checkpoints have the same keys.

    Args:
        in_channels, out_channels: latent channels; `out_channels` None means as many as in.
        num_attention_heads, attention_head_dim: of the linear self-attention; their product is the inner width D.
        num_layers: transformer blocks.
        num_cross_attention_heads, cross_attention_head_dim: of the attention to the text; their product is D.
        cross_attention_dim: width of the projected text, D.
        caption_channels: width of the text encoder's output.
        mlp_ratio: hidden channels of the Mix-FFN over D; 3 in the released models.
        dropout: probability, on the attention outputs.
        attention_bias: bias in the query, key and value projections of the self-attention.
        sample_size: the trained sizes: 30 for those of 480p, 22 for those of 720p.
        patch_size: latent frames, rows and columns per token.
        norm_elementwise_affine: weight and bias in the norm before the Mix-FFN.
        norm_eps: of the norms inside the blocks.
        interpolation_scale, guidance_embeds_scale: unused, as in diffusers.
        guidance_embeds: whether the guidance scale is an input.
        qk_norm: None, or "rms_norm_across_heads".
        rope_max_seq_len: most tokens along an axis.

    Raises:
        TypeError, ValueError: an invalid field, inconsistent widths, or an unknown `qk_norm`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SanaVideoTransformerBlock", "SanaModulatedNorm"]  # type: ignore[assignment]
    _repeated_blocks = ["SanaVideoTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "norm"]  # type: ignore[assignment]
    # `encode_text` calls these outside of `forward`, so each must load its own weights onto the device.
    _group_offload_block_modules = ["caption_projection", "caption_norm"]
    # Frames of tokens are split between processes; the outputs are gathered at the end.
    _cp_plan = split_plan({"frame_numbers": (0, 1), "flatten": (1, 5)})  # type: ignore[assignment]
    _latents_format = "BCFHW"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = 16,
        num_attention_heads: int = 20,
        attention_head_dim: int = 112,
        num_layers: int = 20,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 30,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = "rms_norm_across_heads",
        rope_max_seq_len: int = 1024,
    ) -> None:
        super().__init__()
        check_video_transformer_config(self.config)
        dim = num_attention_heads * attention_head_dim
        p, q, r = patch_size
        self.patch_embedding = PatchConv3d(in_channels, dim, kernel_size=(p, q, r), stride=(p, q, r))
        self.flatten = nn.Flatten(1, 3)  # layers, because `_cp_plan` splits the frames at their inputs
        self.frame_numbers = nn.Identity()
        self.time_embed = SanaCombinedTimestepGuidanceEmbeddings(dim) if guidance_embeds else AdaLayerNormSingle(dim)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=dim)
        self.caption_norm = SanaRMSNorm(dim)
        self.transformer_blocks = make_sana_blocks(self.config, SanaVideoTransformerBlock)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.norm_out = SanaModulatedNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = Linear(dim, p * q * r * (out_channels or in_channels))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        timestep: Tensor,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        text_context: SanaTextContext | None = None,
        state: SanaVideoState | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor] | tuple[Tensor, SanaVideoState]:
        """Predicts the model output (flow velocity, unless the scheduler says otherwise) for noisy latents.

        Args:
            hidden_states: latents `[B, C, T, H, W]`.
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`; None with `text_context`.
            timestep: `[B]`, or `[1]` for the whole batch; one per frame of tokens `[B, t]`; or one per token, with `N`
                entries per video in any shape.
            guidance: guidance scale `[B]` or `[1]`; for models with `config.guidance_embeds`, and only for them.
            encoder_attention_mask: `[B, L]`, 1 for tokens to attend to and 0 for others, or additive `[B, 1 or N, L]`.
            attention_mask: must be None: linear self-attention has no mask.
            attention_kwargs: may contain `scale`, the weight of the loaded LoRAs.
            controlnet_block_samples: `[B, N, D]` each; sample i is added to the output of block i + 1.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            text_context: from `encode_text`, instead of `encoder_hidden_states` and `encoder_attention_mask`.
            state: of the frames before these, which they attend to; `SanaVideoState()` where these are the first of a
                stream, and None for a whole video. It is not changed. Not with step caches, several devices and
                ControlNets.

        Returns:
            `sample`, `[B, out_channels, T, H, W]`. With `state`, a `SanaVideoTransformerOutput` that also has the
            state of all frames so far.

        Raises:
            ValueError: shapes that do not match the config, or arguments that this model does not use.
        """
        scale, attention_kwargs = split_scale(attention_kwargs)
        if scale is not None:
            inputs = hidden_states, encoder_hidden_states, timestep, guidance
            options = encoder_attention_mask, attention_mask, attention_kwargs, controlnet_block_samples
            with scaled_adapters(self, scale):
                return SanaVideoTransformer3DModel.forward(self, *inputs, *options, return_dict, text_context, state)
        first = 0 if state is None else state.frames
        most = None if state is None else state.most
        grid = frames, height, width = self._check_inputs(hidden_states, attention_mask, guidance, first, most)
        if controlnet_block_samples is not None:
            self._check_controlled_cache()
        batch_size = hidden_states.shape[0]
        past: Sequence[SanaVideoBlockState | None] = [None] * len(self.transformer_blocks)
        if state is not None:
            self._check_streaming(controlnet_block_samples)
            past = state.of_blocks(len(past), batch_size, (height, width))
        text_context = self._resolve_text(
            batch_size, encoder_hidden_states, encoder_attention_mask, attention_kwargs, text_context
        )

        own_frames = self.frame_numbers(torch.arange(frames, device=hidden_states.device))
        rotary_emb = rotary_tables(first + own_frames, height, width, self.config["attention_head_dim"])
        hidden_states = self.flatten(self.patch_embedding(hidden_states).movedim(1, -1))  # [B, N, D]
        times = grouped_times(timestep, batch_size, frames, height * width, own_frames)  # [B or 1, G]
        conditions = {}
        if guidance is not None:
            times = times.expand(max(len(times), len(guidance)), -1)
            conditions["guidance"] = guidance.expand(len(times)).repeat_interleave(times.shape[1])
        modulation, embedded_timestep = (
            value.unflatten(0, times.shape)
            for value in self.time_embed(times.flatten(), hidden_dtype=hidden_states.dtype, **conditions)
        )

        seen = []
        blocks = zip(self.transformer_blocks, text_context.states, past, strict=True)
        for index, (block, text, before) in enumerate(blocks):
            stream = () if before is None else (before,)
            arguments = (
                hidden_states,
                text,
                text_context.attention_mask,
                modulation,
                height,
                width,
                rotary_emb,
                *stream,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)
            if before is not None:
                hidden_states, now = hidden_states
                seen.append(now)
            if controlnet_block_samples is not None and 0 < index <= len(controlnet_block_samples):
                hidden_states = hidden_states + controlnet_block_samples[index - 1]

        # The last modulation uses the timestep embedding itself; the blocks use its projection.
        hidden_states = self.norm_out(hidden_states, embedded_timestep, self.scale_shift_table)
        hidden_states = self.proj_out(hidden_states)
        patches = hidden_states.unflatten(1, grid).unflatten(-1, (*self.config["patch_size"], -1))
        sample = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        if state is None:
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
        state = SanaVideoState(tuple(seen), first + frames, most)
        return SanaVideoTransformerOutput(sample=sample, state=state) if return_dict else (sample, state)

    def _check_inputs(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        guidance: Tensor | None,
        first: int,
        most_frames: int | None,
    ) -> tuple[int, int, int]:
        """The token grid; `first` is the number of frames before it, and `most_frames` how many there may be."""
        channels, patch_size, most = (self.config[name] for name in ("in_channels", "patch_size", "rope_max_seq_len"))
        shape = tuple(hidden_states.shape)
        is_right = len(shape) == 5 and shape[1] == channels
        if not is_right or any(size % p for size, p in zip(shape[2:], patch_size, strict=True)):
            raise ValueError(
                f"`hidden_states` must be latents [batch, {channels}, frames, height, width] with sides divisible by "
                f"`patch_size` {tuple(patch_size)}, got {shape}. Check the VAE, the size and the number of frames."
            )
        frames, height, width = (size // p for size, p in zip(shape[2:], patch_size, strict=True))
        most_frames = most if most_frames is None else most_frames
        if first + frames > most_frames or max(height, width) > most:
            longer = "" if most_frames == most else f" and {most_frames} frames (`most` of the state)"
            raise ValueError(
                f"`hidden_states` must have at most {most} tokens along each axis (`rope_max_seq_len`){longer},"
                f" earlier frames included, got {(first + frames, height, width)}. Generate a shorter or smaller"
                " video. In a stream, `SanaVideoState(most=...)` allows more frames than the model was made for."
            )
        check_guidance(self.config["guidance_embeds"], guidance)
        check_conditions(shape[0], attention_mask, guidance=guidance)
        return frames, height, width

    def _check_streaming(self, controlnet_block_samples: Sequence[Tensor] | None) -> None:
        """Raises where the model cannot run with a state."""
        reasons = {
            "a step cache, which skips blocks. Call `disable_cache()`": self._cache_config is not None,
            "`enable_parallelism`. Load the model again": self._parallel_config is not None,
            "`controlnet_block_samples`. Leave one of the two out": controlnet_block_samples is not None,
        }
        if reason := next((reason for reason, applies in reasons.items() if applies), None):
            raise ValueError(f"`state` cannot be used together with {reason}.")

    def _split_parts(self) -> tuple[Rows, nn.Module, int, list[nn.Module]]:
        convolutions: list[Any] = [block.ff.conv_temp for block in self.transformer_blocks]
        return FRAMES_OF_VIDEO, self.patch_embedding, self.config["patch_size"][0], convolutions


def grouped_times(timestep: Tensor, batch_size: int, frames: int, tokens: int, own_frames: Tensor) -> Tensor:
    """Times `[B or 1, G]` of the tokens of this process.

    Args:
        timestep: as in `SanaVideoTransformer3DModel.forward`.
        batch_size: B.
        frames: t, of the whole video.
        tokens: of a frame.
        own_frames: numbers of the frames of this process.
    """
    number = timestep.numel()
    if number == 1 or number == batch_size:  # compiled code takes sizes that vary for no members
        return timestep.reshape(-1, 1)
    if number != batch_size * frames and number != batch_size * frames * tokens:
        raise ValueError(
            f"`timestep` must have one entry, or for each of the {batch_size} videos one, or one for each of the "
            f"{frames} frames, or for each of the {frames * tokens} tokens, got {tuple(timestep.shape)}."
        )
    return timestep.reshape(batch_size, frames, -1)[:, own_frames].flatten(1)
