"""SANA-Video 2.0's denoiser: linear and softmax attention over all tokens of a video, and attention over depth.

There is no residual stream. Each layer reads a mixture of earlier results, chosen per token by a softmax, and adds to
the result of its group of layers (attention residuals). Parameters have the names of the authors' checkpoints.

Legend: B batch, C latent channels, T H W latent frames, height and width, t h w token grid (T/p, H/q, W/r for patches
of p, q, r), N = t*h*w tokens, L text tokens, D inner width, G times per video: 1, or t, one per frame.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_sana.models.layers import Linear, PatchConv3d, hooks_of, scaled_adapters, split_scale
from diffusers_sana.models.loading import SingleFileMixin, StrictModelMixin
from diffusers_sana.models.transformers.attention_sana import SanaAttnProcessor, SanaRMSNorm, SanaTextState
from diffusers_sana.models.transformers.attention_sana_video2 import SanaVideo2Attention, SanaVideo2TextAttention
from diffusers_sana.models.transformers.cache_sana import SanaCacheMixin
from diffusers_sana.models.transformers.config_sana import check_video2_transformer_config
from diffusers_sana.models.transformers.modulated_norm import modulated_norm
from diffusers_sana.models.transformers.sequence_parallel import (
    FRAMES_OF_VIDEO,
    Rows,
    SequenceParallelMixin,
    split_plan,
)
from diffusers_sana.models.transformers.tensor_parallel import tensor_config_of
from diffusers_sana.models.transformers.text_sana import SanaTextContext, SanaTextMixin
from diffusers_sana.models.transformers.transformer_sana_video import grouped_times, rotary_tables


DEPTH_EPS = 1e-6
TIME_CHANNELS = 256
INITIAL_TEXT_SCALE = 0.01


def default_softmax_layers(num_layers: int) -> list[int]:
    """The layers with softmax attention by the authors' rule: a quarter, evenly spread, the last among them."""
    number = max(1, num_layers // 4)
    return [int((index + 1) * (num_layers / number)) - 1 for index in range(number)]


class Sources(NamedTuple):
    """What layers read.

    Attributes:
        values: results of the finished groups, `[B, N, D]` each, the embedded latents first.
        logits: of these, for the three readers of `SanaVideo2DepthAttention`, `[B, N, 3]` each, in fp32.
    """

    values: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


NO_SOURCES = Sources((), ())


class SanaVideo2DepthAttention(nn.Module):
    """Attention over depth: for each token a softmax over sources, with learned queries that all layers share.

    There are three readers: attentions, feed-forwards, and the output. The key of a source is the source over its root
    mean square. The authors keep the keys; the three logits of a finished source say the same in less memory.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name in ("attn_proj", "mlp_proj", "final_proj"):
            layer = Linear(dim, 1, bias=False)
            nn.init.zeros_(layer.weight)  # the mean of the sources
            self.add_module(name, layer)

    def _logits(self, source: Tensor, *readers: nn.Module) -> Tensor:
        """`[B, N, readers]` in fp32."""
        scale = torch.rsqrt(source.float().square().mean(dim=-1, keepdim=True) + DEPTH_EPS)
        return torch.cat([reader(source) for reader in readers], dim=-1).float() * scale

    def add(self, source: Tensor, sources: Sources = NO_SOURCES) -> Sources:
        """`sources` with another, `[B, N, D]`."""
        logits = self._logits(source, *self.children())
        return Sources((*sources.values, source), (*sources.logits, logits))

    def forward(self, reader: str, sources: Sources, unfinished: Tensor | None = None) -> Tensor:
        """What a reader sees: `[B, N, D]`.

        Args:
            reader: "attn_proj", "mlp_proj" or "final_proj".
            sources: the finished ones.
            unfinished: the sum so far of the group of layers, `[B, N, D]`; None at its beginning.
        """
        values = sources.values
        index = [name for name, _ in self.named_children()].index(reader)
        logits = [logits[..., index] for logits in sources.logits]
        if unfinished is not None:
            values = (*values, unfinished)
            logits.append(self._logits(unfinished, getattr(self, reader))[..., 0])
        if len(values) == 1:
            return values[0]
        weights = torch.stack(logits).softmax(dim=0).unsqueeze(-1)  # [sources, B, N, 1]
        mixed = weights[0] * values[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, value.to(mixed.dtype))
        return mixed.to(values[0].dtype)


class SanaVideo2FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), token by token.

    Args:
        dim: D.
        hidden_dim: its hidden channels.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim)
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SanaVideo2Block(nn.Module):
    """A layer: self-attention, attention to the text, feed-forward.

    Args:
        dim: D.
        head_dim: of the self-attention.
        is_linear: gated linear attention; else gated softmax attention.
        num_cross_attention_heads: of the attention to the text.
        mlp_ratio: hidden channels of the feed-forward over D.
        relu_divisor: see `SanaVideo2Transformer3DModel`.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        is_linear: bool,
        num_cross_attention_heads: int,
        mlp_ratio: float,
        relu_divisor: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = SanaVideo2Attention(dim, head_dim, is_linear, relu_divisor)
        self.cross_attn = SanaVideo2TextAttention(dim, num_cross_attention_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = SanaVideo2FeedForward(dim, int(mlp_ratio * dim))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    @property
    def attn2(self) -> SanaVideo2TextAttention:
        """The attention to the text, as `SanaTextMixin` names it."""
        return self.cross_attn

    def can_encode_text(self) -> bool:
        """As `SanaTransformerBlock.can_encode_text`."""
        return isinstance(self.cross_attn.processor, SanaAttnProcessor) and "group_offloading" not in hooks_of(self)

    def forward(
        self,
        unfinished: Tensor | None,
        sources: Sources,
        depth: SanaVideo2DepthAttention,
        encoder_hidden_states: Tensor | SanaTextState,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One layer.

        Args:
            unfinished: the sum of the layers before it in its group, `[B, N, D]`; None for the first one.
            sources: what earlier groups have made.
            depth: the attention over these.
            encoder_hidden_states, encoder_attention_mask: as in `SanaTransformerBlock`.
            timestep: modulation `[B or 1, G, 6 * D]`.
            rotary_emb: from `rotary_tables`, for its head width.

        Returns:
            The sum with this layer, `[B, N, D]`.
        """
        modulation = self.scale_shift_table + timestep.unflatten(-1, (6, -1))  # [B or 1, G, 6, D]
        groups = sources.values[0].shape[0] * modulation.shape[1]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.flatten(0, 1).chunk(6, dim=1)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(groups, -1, x.shape[-1])  # tokens of a time together, [B * G, N / G, D]

        hidden_states = depth("attn_proj", sources, unfinished)
        normed = modulated_norm(self.norm1, hidden_states, shift_msa, scale_msa)
        change = (gate_msa * grouped(self.attn(normed, rotary_emb))).view_as(hidden_states)
        change = change + self.cross_attn(hidden_states + change, encoder_hidden_states, encoder_attention_mask)
        unfinished = change if unfinished is None else unfinished + change

        hidden_states = depth("mlp_proj", sources, unfinished)
        normed = modulated_norm(self.norm2, hidden_states, shift_mlp, scale_mlp)
        return unfinished + (gate_mlp * grouped(self.mlp(normed))).view_as(hidden_states)


class SanaVideo2FinalLayer(nn.Module):
    """Modulated norm and projection to patches.

    Args:
        dim: D.
        patch_channels: channels of a patch.
    """

    def __init__(self, dim: int, patch_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = Linear(dim, patch_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, hidden_states: Tensor, embedded_timestep: Tensor) -> Tensor:
        """`[B, N, D]` and `[B or 1, G, D]` to `[B, N, patch_channels]`."""
        modulation = self.scale_shift_table + embedded_timestep.unsqueeze(2)  # [B or 1, G, 2, D]
        shift, scale = modulation.flatten(0, 1).chunk(2, dim=1)
        return self.linear(modulated_norm(self.norm_final, hidden_states, shift, scale))


class SanaVideo2Transformer3DModel(
    SanaTextMixin,
    SequenceParallelMixin,
    StrictModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    SanaCacheMixin,
    SingleFileMixin,
):
    """The denoiser of SANA-Video 2.0 (arXiv 2607.21553), for text and for a first image.

    State-dict keys are those of the authors' checkpoints, without two buffers that these models do not use;
    `from_single_file` reads their `.pth` files. The defaults are those of the 5B model. The config of the 14B model,
    whose weights are not public, is `num_layers=40, num_attention_heads=32, num_cross_attention_heads=32`.

    As in SANA-Video, `encode_text` does the text-dependent work once per prompt, and each frame may have its own time.

    Args:
        in_channels, out_channels: latent channels; `out_channels` None means as many as in.
        num_attention_heads, attention_head_dim: of the linear attention; their product is the inner width D.
        softmax_head_dim: of the softmax attention; D is a multiple of it.
        num_layers: their number.
        softmax_layers: numbers of the layers with softmax attention; None for the authors' rule, every fourth.
        attn_res_block_size: layers of a group, whose results later layers read (attention residuals).
        num_cross_attention_heads: of the attention to the text.
        caption_channels: width of the text encoder's output.
        mlp_ratio: hidden channels of the SwiGLU over D.
        sample_size: rows of tokens of the videos of 16:9 that it was trained on: 23 for 736 x 1280.
        patch_size: latent frames, rows and columns per token.
        rope_max_seq_len: most tokens along an axis.
        relu_divisor: divide the linear attention by a sum of ReLU weights, as the first public version of the authors'
            code does. Later versions do not. The norm that follows hides most of the difference. Which of the two the
            released weights were trained with is not public.

    Raises:
        TypeError, ValueError: an invalid field, or inconsistent widths.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SanaVideo2Block"]  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = ["x_embedder", "norm", "attn_res"]  # type: ignore[assignment]
    # `encode_text` calls these outside of `forward`, so each must load its own weights onto the device.
    _group_offload_block_modules = ["y_embedder", "attention_y_norm"]
    # Frames of tokens are split between processes; the outputs are gathered at the end.
    _cp_plan = split_plan({"frame_numbers": (0, 1), "flatten": (1, 5)}, "final_layer.linear")  # type: ignore[assignment]
    _latents_format = "BCFHW"
    _attention_layers = r"blocks\.\d+\.(cross_)?attn"
    _has_residual_stream = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_attention_heads: int = 20,
        attention_head_dim: int = 128,
        softmax_head_dim: int = 256,
        num_layers: int = 32,
        softmax_layers: Sequence[int] | None = None,
        attn_res_block_size: int = 8,
        num_cross_attention_heads: int = 20,
        caption_channels: int = 2304,
        mlp_ratio: float = 4.0,
        sample_size: int = 23,
        patch_size: tuple[int, int, int] = (1, 1, 1),
        rope_max_seq_len: int = 1024,
        relu_divisor: bool = False,
    ) -> None:
        super().__init__()
        check_video2_transformer_config(self.config)
        dim = num_attention_heads * attention_head_dim
        p, q, r = patch_size
        softmax = default_softmax_layers(num_layers) if softmax_layers is None else softmax_layers
        embedding = PatchConv3d(in_channels, dim, kernel_size=(p, q, r), stride=(p, q, r))
        time = nn.Sequential(nn.Linear(TIME_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))
        text = OrderedDict(fc1=Linear(caption_channels, dim), act=nn.GELU("tanh"), fc2=Linear(dim, dim))
        self.x_embedder = nn.ModuleDict({"proj": embedding})
        self.flatten = nn.Flatten(1, 3)  # layers, because `_cp_plan` splits the frames at their inputs
        self.frame_numbers = nn.Identity()
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.ModuleDict({"y_proj": nn.Sequential(text)})
        self.attention_y_norm = SanaRMSNorm(dim)
        nn.init.constant_(self.attention_y_norm.weight, INITIAL_TEXT_SCALE)
        self.blocks = nn.ModuleList(
            SanaVideo2Block(
                dim,
                softmax_head_dim if index in softmax else attention_head_dim,
                index not in softmax,
                num_cross_attention_heads,
                mlp_ratio,
                relu_divisor,
            )
            for index in range(num_layers)
        )
        self.attn_res = SanaVideo2DepthAttention(dim)
        self.final_layer = SanaVideo2FinalLayer(dim, p * q * r * (out_channels or in_channels))
        self.gradient_checkpointing = False

    @property
    def caption_projection(self) -> Any:
        """The projection of the text, as `SanaTextMixin` names it, like the following."""
        return self.y_embedder["y_proj"]

    @property
    def caption_norm(self) -> Any:
        """See `caption_projection`."""
        return self.attention_y_norm

    @property
    def transformer_blocks(self) -> Any:
        """See `caption_projection`."""
        return self.blocks

    def enable_parallelism(self, *, config: Any, cp_plan: dict[str, Any] | None = None) -> None:
        """Splits the frames of each video between processes, see `SequenceParallelMixin`.

        Here the degrees of Ring and Ulysses matter: that of Ulysses divides the heads of the softmax attention.

        Raises:
            ValueError: a `TensorParallelConfig`.
        """
        if tensor_config_of(config) is not None:
            raise ValueError(
                "`config` must be a ContextParallelConfig, since only the tokens of SANA-Video 2.0 can be split, not"
                " its weights, got a TensorParallelConfig."
            )
        heads = self.x_embedder["proj"].out_channels // self.config["softmax_head_dim"]
        ulysses = getattr(config, "context_parallel_config", None) or config
        if heads % (degree := ulysses.ulysses_degree or 1):
            raise ValueError(
                f"`ulysses_degree` must divide the {heads} heads of the softmax attention, got {degree}. Use"
                " `ring_degree`, or both."
            )
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def _split_parts(self) -> tuple[Rows, nn.Module, int, list[nn.Module]]:
        return FRAMES_OF_VIDEO, self.x_embedder["proj"], self.config["patch_size"][0], []

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        text_context: SanaTextContext | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the flow velocity for noisy latents.

        Args:
            hidden_states: latents `[B, C, T, H, W]`.
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`; None with `text_context`.
            timestep: from 0 to 1000, `[B]`, or `[1]` for the whole batch, or one per frame of tokens `[B, t]`. As in
                the authors' code, fractions are cut off.
            encoder_attention_mask: `[B, L]`, 1 for tokens to attend to and 0 for others, or additive `[B, 1 or N, L]`.
            attention_kwargs: may contain `scale`, the weight of the loaded LoRAs.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            text_context: from `encode_text`, instead of `encoder_hidden_states` and `encoder_attention_mask`.

        Returns:
            `sample`, `[B, out_channels, T, H, W]`.

        Raises:
            ValueError: shapes that do not match the config.
        """
        scale, attention_kwargs = split_scale(attention_kwargs)
        if scale is not None:
            inputs = hidden_states, encoder_hidden_states, timestep, encoder_attention_mask
            with scaled_adapters(self, scale):
                return SanaVideo2Transformer3DModel.forward(self, *inputs, attention_kwargs, return_dict, text_context)
        batch_size, device = hidden_states.shape[0], hidden_states.device
        grid = frames, height, width = self._check_inputs(hidden_states)
        text_context = self._resolve_text(
            batch_size, encoder_hidden_states, encoder_attention_mask, attention_kwargs, text_context
        )
        # The tables of linear and of softmax attention, whose heads have different widths.
        positions = self.frame_numbers(torch.arange(frames, device=device))  # of this process
        linear, softmax = (
            rotary_tables(positions, height, width, self.config[name])
            for name in ("attention_head_dim", "softmax_head_dim")
        )
        latents = self.flatten(self.x_embedder["proj"](hidden_states).movedim(1, -1))  # [B, N, D]
        times = grouped_times(timestep, batch_size, frames, height * width, positions)  # [B or 1, G]
        waves = get_timestep_embedding(
            times.flatten().float().trunc(), TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        embedded_timestep = self.t_embedder["mlp"](waves.to(latents.dtype)).unflatten(0, times.shape)  # [.., G, D]
        modulation = self.t_block(embedded_timestep)

        sources = self.attn_res.add(latents)
        unfinished: Tensor | None = None
        blocks: Any = zip(self.blocks, text_context.states, strict=True)
        for index, (block, text) in enumerate(blocks):
            rotary_emb = linear if block.attn.is_linear else softmax
            arguments = (
                unfinished,
                sources,
                self.attn_res,
                text,
                text_context.attention_mask,
                modulation,
                rotary_emb,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                result = self._gradient_checkpointing_func(block, *arguments)
            else:
                result = block(*arguments)
            is_last = (index + 1) % self.config["attn_res_block_size"] == 0 or index + 1 == len(self.blocks)
            unfinished = None if is_last else result
            sources = self.attn_res.add(result, sources) if is_last else sources

        hidden_states = self.attn_res("final_proj", sources)
        patches = self.final_layer(hidden_states, embedded_timestep).unflatten(1, grid)
        patches = patches.unflatten(-1, (*self.config["patch_size"], -1))  # [B, t, h, w, p, q, r, C]
        sample = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_inputs(self, hidden_states: Tensor) -> tuple[int, int, int]:
        """The token grid."""
        channels, patch_size, most = (self.config[name] for name in ("in_channels", "patch_size", "rope_max_seq_len"))
        shape = tuple(hidden_states.shape)
        is_right = len(shape) == 5 and shape[1] == channels
        if not is_right or any(size % p for size, p in zip(shape[2:], patch_size, strict=True)):
            raise ValueError(
                f"`hidden_states` must be latents [batch, {channels}, frames, height, width] with sides divisible by "
                f"`patch_size` {tuple(patch_size)}, got {shape}. Check the VAE, the size and the number of frames."
            )
        frames, height, width = (size // p for size, p in zip(shape[2:], patch_size, strict=True))
        if max(frames, height, width) > most:
            raise ValueError(
                f"`hidden_states` must have at most {most} tokens along each axis (`rope_max_seq_len`), got "
                f"{(frames, height, width)}. Generate a shorter or smaller video."
            )
        return frames, height, width
