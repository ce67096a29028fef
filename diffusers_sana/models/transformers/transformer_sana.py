"""Sana's denoiser: a diffusion transformer with ReLU linear attention and a convolutional feed-forward.

Legend: B batch, C latent channels, H W latent height and width, p patch size, h w token grid (H/p, W/p), N = h*w image
tokens, L text tokens, D inner width, F feed-forward width.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_1d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.models.layers import (
    Conv2d,
    Linear,
    PointwiseConv2d,
    gated_bottleneck,
    hooks_of,
    is_patched,
    scaled_adapters,
    split_scale,
)
from diffusers_sana.models.loading import SingleFileMixin, StrictModelMixin
from diffusers_sana.models.transformers.attention_sana import (
    SanaAttention,
    SanaAttnProcessor,
    SanaImageState,
    SanaLinearAttnProcessor,
    SanaRMSNorm,
    SanaTextState,
)
from diffusers_sana.models.transformers.cache_sana import SanaCacheMixin
from diffusers_sana.models.transformers.config_sana import check_transformer_config
from diffusers_sana.models.transformers.modulated_norm import SanaModulatedNorm, modulated_norm, residual_norm
from diffusers_sana.models.transformers.sequence_parallel import SequenceParallelMixin, split_plan
from diffusers_sana.models.transformers.tensor_parallel import tensor_plan
from diffusers_sana.models.transformers.text_sana import SanaTextContext, SanaTextMixin


class SanaMixFeedForward(nn.Module):
    """Mix-FFN: pointwise expansion, depthwise 3x3, gate, pointwise projection (Sana, arXiv 2410.10629, section 2.2).

    The zero padding of the 3x3 convolution is the only source of position in models without a positional table.

    Args:
        dim: channels in and out.
        mlp_ratio: hidden channels over `dim`; rounded down.
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden_dim = int(mlp_ratio * dim)
        self.conv_inverted = PointwiseConv2d(dim, 2 * hidden_dim, 1)
        self.conv_depth = Conv2d(2 * hidden_dim, 2 * hidden_dim, 3, padding=1, groups=2 * hidden_dim)
        self.conv_point = PointwiseConv2d(hidden_dim, dim, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[B, D, h, w]` to the same shape; fastest if channels-last in memory; the output then is too."""
        return gated_bottleneck(hidden_states, self.conv_inverted, self.conv_depth, self.conv_point)


class SanaTransformerBlock(nn.Module):
    """Modulated linear self-attention, cross-attention to the text, modulated Mix-FFN; each is residual.

    Args: see `SanaTransformer2DModel`; `dim` is D.
    """

    feed_forward_class: type[SanaMixFeedForward] = SanaMixFeedForward

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        num_cross_attention_heads: int,
        cross_attention_head_dim: int,
        cross_attention_dim: int,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn1 = SanaAttention(
            dim,
            num_attention_heads,
            attention_head_dim,
            SanaLinearAttnProcessor(),
            bias=attention_bias,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        # No norm before the cross-attention: `norm2` belongs to the feed-forward.
        self.attn2 = SanaAttention(
            dim,
            num_cross_attention_heads,
            cross_attention_head_dim,
            SanaAttnProcessor(),
            cross_attention_dim=cross_attention_dim,
            bias=True,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = self.feed_forward_class(dim, mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def can_encode_text(self) -> bool:
        """Whether keys and values of the text can be computed outside of `forward`.

        Not with a custom processor, and not while group offloading loads the weights only for `forward`.
        """
        return isinstance(self.attn2.processor, SanaAttnProcessor) and "group_offloading" not in hooks_of(self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | SanaTextState,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        height: int,
        width: int,
        image_states: tuple[SanaImageState, ...] = (),
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: `[B, N, D]`, `N = height * width`, rows first.
            encoder_hidden_states: projected text `[B, L, D]`, or the state that this block's `attn2` computed from it.
            encoder_attention_mask: broadcastable to `[B, heads, N, L]`; boolean (True: attend) or additive.
            timestep: modulation `[B or 1, 6 * D]`.
            height, width: token grid.
            image_states: of image prompts, one for each IP-Adapter.

        Returns:
            `[B, N, D]`.
        """
        modulation = self.scale_shift_table + timestep.unflatten(-1, (6, -1))
        text = encoder_hidden_states, encoder_attention_mask, image_states
        return gated_residual(*self.residual_branch(hidden_states, None, None, text, modulation, width))

    def residual_branch(
        self,
        hidden_states: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        text: tuple[Tensor | SanaTextState, Tensor | None, tuple[SanaImageState, ...]],
        modulation: Tensor,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block without its last addition, which one kernel does together with the norm that follows.

        Args:
            hidden_states: `[B, N, D]`.
            branch, gate: what is still to be added to them, as returned by the block before; None for nothing.
            text: `encoder_hidden_states`, `encoder_attention_mask` and `image_states` of `forward`.
            modulation: shift, scale and gate of self-attention and Mix-FFN, `[B or 1, 6, D]`.
            width: of the token grid.

        Returns:
            Hidden states `[B, N, D]`, the output of the Mix-FFN `[B, N, D]` and its gate `[B or 1, 1, D]`:
            `gated_residual` of these is the output of the block.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # [B, 1, D]

        if branch is None:
            norm_hidden_states = modulated_norm(self.norm1, hidden_states, shift_msa, scale_msa)
        else:
            hidden_states, norm_hidden_states = residual_norm(
                self.norm1, hidden_states, branch, gate, shift_msa, scale_msa
            )
        hidden_states = gated_residual(hidden_states, self.attn1(norm_hidden_states), gate_msa)

        encoder_hidden_states, encoder_attention_mask, image_states = text
        prompts: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
        }
        if image_states:  # which other processors do not know
            prompts["image_states"] = image_states
        attn_output = self.attn2(hidden_states, **prompts)
        hidden_states, norm_hidden_states = residual_norm(
            self.norm2, hidden_states, attn_output, None, shift_mlp, scale_mlp
        )
        # As an image the tokens are channels-last, so this is a view. With sequence parallelism, each process has some
        # of the rows.
        ff_output = self.ff(norm_hidden_states.unflatten(1, (-1, width)).movedim(-1, 1))  # [B, D, h, w]
        return hidden_states, ff_output.movedim(1, -1).flatten(1, 2), gate_mlp


def are_chained(blocks: Sequence[nn.Module]) -> bool:
    """Whether nothing looks at or changes what passes between the blocks, so that kernels may span two of them.

    Not with hooks on a block, a replaced or separately compiled `forward`, or where gradients may be wanted.
    """
    return not torch.is_grad_enabled() and all(
        type(block) is SanaTransformerBlock
        and not is_patched(block)
        and not block._forward_pre_hooks
        and not block._forward_hooks
        and not hooks_of(block)
        and block._compiled_call_impl is None
        for block in blocks
    )


def make_sana_blocks(
    config: Mapping[str, Any], block_class: type[SanaTransformerBlock] = SanaTransformerBlock
) -> nn.ModuleList:
    """The blocks of a model, from its config: of a `SanaTransformer2DModel` or `SanaControlNetModel` by default."""
    of_block = inspect.signature(SanaTransformerBlock).parameters.keys() & config.keys()
    fields = {name: config[name] for name in of_block}
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return nn.ModuleList(block_class(dim, **fields) for _ in range(config["num_layers"]))


def check_conditions(batch_size: int, attention_mask: Tensor | None, **per_image: Tensor | None) -> None:
    """Raises a ValueError for an attention mask, and for a tensor of `per_image` that is not `[B]` or `[1]`."""
    if attention_mask is not None:
        raise ValueError(
            "`attention_mask` must be None: linear self-attention has no mask, got a tensor. "
            "For the text, use `encoder_attention_mask`."
        )
    for name, value in per_image.items():
        if value is not None and (value.ndim != 1 or value.shape[0] not in (1, batch_size)):
            raise ValueError(
                f"`{name}` must have shape ({batch_size},) or (1,), got {tuple(value.shape)}. "
                f"Use `{name}.expand({batch_size})`."
            )


def check_guidance(has_guidance: bool, guidance: Tensor | None) -> None:
    """Raises a ValueError where `guidance` is not given to a model with `guidance_embeds`, or given to another."""
    if has_guidance != (guidance is not None):
        raise ValueError(
            f"`guidance` must {'be given' if has_guidance else 'be None'} for a model with "
            f"`guidance_embeds={has_guidance}`, got {guidance if guidance is None else 'a tensor'}. "
            + ("Pass the guidance scale." if has_guidance else "Use classifier-free guidance in the pipeline.")
        )


def sincos_position_axes(
    height: int, width: int, dim: int, base_size: int, interpolation_scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The two halves of the sine-cosine position table of a token grid.

    In the table of DiT (arXiv 2212.09748) half of the channels depend on the column and half on the row, so one small
    table per axis suffices: a 4K image needs less than 1 MB instead of 147 MB. They are not cached between calls:
    cached tensors would outlive the model on the device, and inference tensors could not be used in training.

    Args:
        height, width: token grid.
        dim: D, a multiple of 4.
        base_size: grid side in training; positions are scaled to it.
        interpolation_scale: positions are divided by it.
        device: where they are computed, in fp64 if the device supports it.

    Returns:
        Columns `[w, D/2]` and rows `[h, D/2]`, fp32.
    """
    grid = (torch.arange(size, dtype=torch.float32, device=device) / (size / base_size) for size in (width, height))
    columns, rows = (get_1d_sincos_pos_embed_from_grid(dim // 2, axis / interpolation_scale).float() for axis in grid)
    return columns, rows


class SanaPatchEmbed(nn.Module):
    """Latent patches to tokens, with a position table if `interpolation_scale` is given.

    Args:
        sample_size: latent side in training.
        patch_size: p.
        in_channels: C.
        dim: D.
        interpolation_scale: None for models without a position table (all but 2K and 4K).
    """

    def __init__(
        self, sample_size: int, patch_size: int, in_channels: int, dim: int, interpolation_scale: float | None
    ) -> None:
        super().__init__()
        self.base_size = sample_size // patch_size
        self.interpolation_scale = interpolation_scale
        self.proj = Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.flatten = nn.Flatten(1, 2)  # a layer, because `_cp_plan` splits the rows at its input

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, N, D]`, contiguous, rows first."""
        hidden_states = self.proj(hidden_states.contiguous(memory_format=torch.channels_last)).movedim(1, -1)
        if self.interpolation_scale is not None:
            _, height, width, dim = hidden_states.shape
            columns, rows = sincos_position_axes(
                height, width, dim, self.base_size, self.interpolation_scale, hidden_states.device
            )
            table = torch.cat([columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
            hidden_states = (hidden_states + table).to(hidden_states.dtype)  # summed in fp32 for any dtype
        return self.flatten(hidden_states).contiguous()


class SanaCombinedTimestepGuidanceEmbeddings(nn.Module):
    """Timestep and guidance scale to the modulation of all blocks (SANA-Sprint, arXiv 2503.09641).

    Args:
        embedding_dim: D.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=embedding_dim)
        self.guidance_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=embedding_dim)
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim)

    def forward(self, timestep: Tensor, guidance: Tensor, hidden_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timestep `[B]` and guidance `[B]` to the modulation `[B, 6 * D]` and the embedding `[B, D]`."""
        time, scale = (
            get_timestep_embedding(value, 256, flip_sin_to_cos=True, downscale_freq_shift=0).to(hidden_dtype)
            for value in (timestep, guidance)
        )
        embedding = self.timestep_embedder(time) + self.guidance_embedder(scale)
        return self.linear(F.silu(embedding)), embedding


class SanaTransformer2DModel(
    SanaTextMixin,
    SequenceParallelMixin,
    StrictModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    SanaCacheMixin,
    SingleFileMixin,
):
    """The denoiser of Sana (arXiv 2410.10629), SANA-1.5 (arXiv 2501.18427) and SANA-Sprint (arXiv 2503.09641).

    Configuration, state-dict keys, `forward` and outputs are those of the diffusers class of the same name. In
    addition, `encode_text` does the text-dependent work once per prompt instead of once per step.

    Args:
        in_channels, out_channels: latent channels; `out_channels` None means as many as in.
        num_attention_heads, attention_head_dim: of the linear self-attention; their product is the inner width D.
        num_layers: transformer blocks.
        num_cross_attention_heads, cross_attention_head_dim: of the attention to the text; their product is D.
        cross_attention_dim: width of the projected text, D.
        caption_channels: width of the text encoder's output.
        mlp_ratio: hidden channels of the Mix-FFN over D.
        dropout: probability, on the attention outputs.
        attention_bias: bias in the query, key and value projections of the self-attention.
        sample_size: latent side the model was trained for.
        patch_size: latent pixels per token along one side.
        norm_elementwise_affine: weight and bias in the norm before the Mix-FFN.
        norm_eps: of the norms inside the blocks.
        interpolation_scale: None for no position table; else positions are divided by it (2K: 1, 4K: 2).
        guidance_embeds: whether the guidance scale is an input (SANA-Sprint).
        guidance_embeds_scale, timestep_scale: applied by the pipelines.
        qk_norm: None, or "rms_norm_across_heads" (SANA-1.5, SANA-Sprint).

    Raises:
        TypeError, ValueError: an invalid field, inconsistent widths, or an unknown `qk_norm`.
    """

    _supports_gradient_checkpointing = True
    _takes_image_prompts = True
    _no_split_modules = ["SanaTransformerBlock", "SanaPatchEmbed", "SanaModulatedNorm"]  # type: ignore[assignment]
    _repeated_blocks = ["SanaTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]  # type: ignore[assignment]
    # `encode_text` calls these outside of `forward`, so each must load its own weights onto the device.
    _group_offload_block_modules = ["caption_projection", "caption_norm"]
    # Rows of tokens are split between processes; the outputs are gathered at the end.
    _cp_plan = split_plan({"patch_embed.flatten": (1, 4)})  # type: ignore[assignment]
    _tp_plan = tensor_plan()  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 20,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 32,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = None,
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_transformer_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.patch_embed = SanaPatchEmbed(sample_size, patch_size, in_channels, dim, interpolation_scale)
        self.time_embed = SanaCombinedTimestepGuidanceEmbeddings(dim) if guidance_embeds else AdaLayerNormSingle(dim)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=dim)
        self.caption_norm = SanaRMSNorm(dim)
        self.transformer_blocks = make_sana_blocks(self.config)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.norm_out = SanaModulatedNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = Linear(dim, patch_size * patch_size * (out_channels or in_channels))
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
        controlnet_block_samples: Sequence[Tensor] | Callable[[Tensor], Sequence[Tensor]] | None = None,
        return_dict: bool = True,
        text_context: SanaTextContext | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the model output (flow velocity, unless the scheduler says otherwise) for noisy latents.

        Args:
            hidden_states: latents `[B, C, H, W]`.
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`; None with `text_context`.
            timestep: `[B]`, or `[1]` for the whole batch.
            guidance: guidance scale `[B]` or `[1]`, times `config.guidance_embeds_scale`; for models with
                `config.guidance_embeds`, and only for them.
            encoder_attention_mask: `[B, L]`, 1 for tokens to attend to and 0 for others, or additive `[B, 1 or N, L]`.
            attention_mask: must be None: linear self-attention has no mask.
            attention_kwargs: may contain `scale`, the weight of the loaded LoRAs.
            controlnet_block_samples: `[B, N, D]` each; sample i is added to the output of block i + 1. Or a function
                that computes them from the first block's output `[B, N, D]`; then sample i is added to the output of
                block i (`SanaControlNetModel` with `wiring="nvlabs"`).
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            text_context: from `encode_text`, instead of `encoder_hidden_states` and `encoder_attention_mask`.

        Returns:
            `sample`, `[B, out_channels, H, W]`.

        Raises:
            ValueError: shapes that do not match the config, or arguments that this model does not use.
        """
        scale, attention_kwargs = split_scale(attention_kwargs)
        if scale is not None:
            inputs = hidden_states, encoder_hidden_states, timestep, guidance
            options = encoder_attention_mask, attention_mask, attention_kwargs, controlnet_block_samples
            with scaled_adapters(self, scale):
                return SanaTransformer2DModel.forward(self, *inputs, *options, return_dict, text_context)
        self._check_inputs(hidden_states, timestep, guidance, attention_mask)
        if controlnet_block_samples is not None:
            self._check_controlled_cache()
        text_context = self._resolve_text(
            hidden_states.shape[0], encoder_hidden_states, encoder_attention_mask, attention_kwargs, text_context
        )

        p = self.config["patch_size"]
        height, width = hidden_states.shape[-2] // p, hidden_states.shape[-1] // p
        hidden_states = self.patch_embed(hidden_states)  # [B, N, D]
        conditions = {"guidance": guidance} if self.config["guidance_embeds"] else {}
        modulation, embedded_timestep = self.time_embed(timestep, hidden_dtype=hidden_states.dtype, **conditions)

        if controlnet_block_samples is None and are_chained(self.transformer_blocks):
            hidden_states = self._chain(hidden_states, text_context, modulation, width)
        else:
            context = text_context, modulation, height, width
            hidden_states = self._run_blocks(hidden_states, *context, controlnet_block_samples)
        # The last modulation uses the timestep embedding itself; the blocks use its projection.
        hidden_states = self.norm_out(hidden_states, embedded_timestep, self.scale_shift_table)
        hidden_states = self.proj_out(hidden_states)  # [B, N, p * p * C]
        hidden_states = hidden_states.unflatten(1, (height, width)).unflatten(-1, (p, p, -1))  # [B, h, w, p, p, C]
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, C, H, W]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _chain(self, hidden_states: Tensor, text_context: SanaTextContext, modulation: Tensor, width: int) -> Tensor:
        """All blocks, `[B, N, D]` to the same shape; the norm of each is one kernel with the addition before it."""
        blocks: Any = self.transformer_blocks
        tables = torch.stack([block.scale_shift_table for block in blocks])
        modulations = (tables + modulation.unflatten(-1, (1, 6, -1))).unbind(1)  # [B, 6, D] each
        branch: Any = None
        gate: Any = None
        images = text_context.image_states or ((),) * len(blocks)
        for block, text, image, own in zip(blocks, text_context.states, images, modulations, strict=True):
            conditions = (text, text_context.attention_mask, image), own, width
            hidden_states, branch, gate = block.residual_branch(hidden_states, branch, gate, *conditions)
        return gated_residual(hidden_states, branch, gate)

    def _run_blocks(
        self,
        hidden_states: Tensor,
        text_context: SanaTextContext,
        modulation: Tensor,
        height: int,
        width: int,
        controlnet_block_samples: Any,
    ) -> Tensor:
        """All blocks one by one, `[B, N, D]` to the same shape; the samples of a ControlNet are added, if given."""
        first_controlled = 1
        images = text_context.image_states or ((),) * len(self.transformer_blocks)
        blocks = zip(self.transformer_blocks, text_context.states, images, strict=True)
        for index, (block, text, image) in enumerate(blocks):
            block_arguments = (hidden_states, text, text_context.attention_mask, modulation, height, width, image)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, *block_arguments)
            else:
                hidden_states = block(*block_arguments)
            if callable(controlnet_block_samples):
                controlnet_block_samples, first_controlled = controlnet_block_samples(hidden_states), 0
            if controlnet_block_samples is not None:
                number = index - first_controlled
                if 0 <= number < len(controlnet_block_samples):
                    hidden_states = hidden_states + controlnet_block_samples[number]
        return hidden_states

    def _check_inputs(
        self, hidden_states: Tensor, timestep: Tensor, guidance: Tensor | None, attention_mask: Tensor | None
    ) -> None:
        channels, p = self.config["in_channels"], self.config["patch_size"]
        shape = tuple(hidden_states.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % p or shape[3] % p:
            raise ValueError(
                f"`hidden_states` must be latents [batch, {channels}, height, width] with sides divisible by "
                f"`patch_size` {p}, got {shape}. Check the VAE and the image size."
            )
        check_guidance(self.config["guidance_embeds"], guidance)
        check_conditions(shape[0], attention_mask, timestep=timestep, guidance=guidance)
