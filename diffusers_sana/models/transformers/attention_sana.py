"""The two attention layers of Sana: ReLU linear self-attention and softmax cross-attention to the text.

Legend: B batch, N image tokens, L text tokens, D inner width, S prompts of a single token, H heads, d head width; T
tokens of image prompts.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from diffusers_sana.kernels.relu_linear_attention import block_causal_linear_attention, relu_linear_attention
from diffusers_sana.kernels.rms_norm import rms_norm
from diffusers_sana.models.layers import Linear
from diffusers_sana.models.transformers.sequence_parallel import all_reduced
from diffusers_sana.models.transformers.stream_sana_video import SanaVideoBlockState


class SanaRMSNorm(nn.Module):
    """RMS norm over the last axis with a learned weight (arXiv 1910.07467).

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to the same shape and dtype."""
        return rms_norm(hidden_states, self.weight, eps=self.eps)


def _saturated(out: Tensor) -> Tensor:
    """Clamps fp16 to finite values: checkpoints trained in fp16 rely on it."""
    return out.clamp(-65504, 65504) if out.dtype == torch.float16 else out


class SanaLinearAttnProcessor:
    """ReLU linear self-attention, in fp32 inside (Sana, arXiv 2410.10629, section 2.2).

    There is no softmax and hence no attention backend to choose. `rotary_emb` are the rotary positions of videos. With
    the state of earlier frames, tokens attend to these as well, and `attention` of the new state is returned too.
    """

    _parallel_config = None  # set by `enable_parallelism`: other processes have other tokens

    def __call__(
        self,
        attn: "SanaAttention",
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        state: SanaVideoBlockState | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if state is not None:
            out, attention = block_causal_linear_attention(query, key, value, state.attention, rotary=rotary_emb)
        else:
            config = self._parallel_config
            reduce_state = None if config is None else partial(all_reduced, config=config)
            out = relu_linear_attention(query, key, value, reduce_state=reduce_state, rotary=rotary_emb)
        out = _saturated(attn.to_out[1](attn.to_out[0](out.flatten(-2))))  # [B, N, H, d] -> [B, N, D]
        return out if state is None else (out, attention)


def attend_to_self(attn: Any, hidden_states: Tensor) -> Tensor:
    """Self-attention `[B, N, D]` in which each token attends only to itself: `to_out(to_v(x))`."""
    return _saturated(attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states))))


@dataclass(frozen=True)
class SanaPAGAttnProcessor:
    """Perturbed attention (arXiv 2403.17377): in the last images of the batch, each token attends only to itself.

    For these, queries, keys and their norms are not computed. Objects with equal fields are equal, so captured or
    compiled code can tell whether it still applies.

    Attributes:
        processor: of a self-attention with `to_v` and `to_out`, ours or diffusers'.
        num_perturbed: the number of perturbed images at the end of the batch.
    """

    processor: Any
    num_perturbed: int

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to the same shape; `kwargs` are those of `processor`."""
        intact, perturbed = hidden_states.tensor_split([-self.num_perturbed])
        return torch.cat([self.processor(attn, intact, **kwargs), attend_to_self(attn, perturbed)])


class SanaTextState(NamedTuple):
    """State of one cross-attention layer for B prompts, the first S of which have a single token.

    Attributes:
        key, value: `[B - S, L, heads, head_dim]`.
        constant: `[S, 1, D]`, the layer's output for the first S prompts. A softmax over one key is 1, so the output
            is the same vector for every image token at every step. The empty negative prompt is such a prompt.
            None when S is 0.
    """

    key: Tensor
    value: Tensor
    constant: Tensor | None


class SanaImageState(NamedTuple):
    """What one cross-attention layer attends to in the image prompts of the last M rows of a batch.

    The attention to it is added to that to the text ("decoupled", IP-Adapter, arXiv 2308.06721). The other rows, the
    negative prompts of classifier-free guidance, have no image prompt.

    Attributes:
        key, value: `[M, T, heads, head_dim]`. The strength of the image prompt is a factor of the values, which the
            attention is linear in.
    """

    key: Tensor
    value: Tensor


class SanaAttnProcessor:
    """Softmax cross-attention to the text, and to image prompts, through the attention backends of diffusers."""

    _attention_backend = None

    def encode_text(self, attn: "SanaAttention", encoder_hidden_states: Tensor, num_single: int = 0) -> SanaTextState:
        """Computes everything that depends on the text only.

        Args:
            attn: the layer.
            encoder_hidden_states: projected text `[B, L, D]`.
            num_single: S, the number of leading prompts that consist of their first token only.
        """
        key, value = attn.to_k(encoder_hidden_states[num_single:]), attn.to_v(encoder_hidden_states)
        constant = attn.to_out[0](value[:num_single, :1]) if num_single else None
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        heads = (attn.heads, -1)
        return SanaTextState(key.unflatten(-1, heads), value[num_single:].unflatten(-1, heads), constant)

    def __call__(
        self,
        attn: "SanaAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | SanaTextState,
        attention_mask: Tensor | None = None,
        image_states: tuple[SanaImageState, ...] = (),
    ) -> Tensor:
        text = encoder_hidden_states
        if not isinstance(text, SanaTextState):
            text = self.encode_text(attn, text)
        if text.constant is not None:
            constant = text.constant.expand(-1, hidden_states.shape[1], -1)  # [S, N, D]
            if constant.shape[0] == hidden_states.shape[0]:
                return constant
            hidden_states = hidden_states[constant.shape[0] :]

        query = attn.to_q(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        query = query.unflatten(-1, (attn.heads, -1))
        backend = self._attention_backend
        out = dispatch_attention_fn(query, text.key, text.value, attn_mask=attention_mask, backend=backend)
        for image in image_states:
            start = len(out) - len(image.key)
            attended = dispatch_attention_fn(query[start:], image.key, image.value, backend=backend)
            out = torch.cat([out[:start], out[start:] + attended])
        out = attn.to_out[1](attn.to_out[0](out.flatten(-2)))  # [B - S, N, H, d] -> [B - S, N, D]
        return out if text.constant is None else torch.cat([constant, out])


class SanaAttention(nn.Module, AttentionModuleMixin):
    """Projections of one attention layer; the processor defines how they are used.

    Self-attention processors are called with `(attn, hidden_states)`, cross-attention processors also with
    `encoder_hidden_states`, the projected text `[B, L, D]` (a `SanaTextState` only for `SanaAttnProcessor`), and
    `attention_mask`; `SanaAttnProcessor` also with `image_states`, where there are image prompts.

    Args:
        dim: width of queries and output.
        heads, head_dim: their product is the inner width.
        processor: called as `processor(attn, hidden_states, ...)`.
        cross_attention_dim: width of the text, or None for self-attention.
        bias: of the query, key and value projections.
        qk_norm: None, or "rms_norm_across_heads": RMS norm of queries and keys before the heads are split.
        dropout: probability, on the output.
    """

    processor: Any
    # One matrix product instead of three saved nothing measurable at Sana's widths, and a fused weight would copy the
    # user's parameters or replace their storage. So `fuse_qkv_projections` does nothing, as in diffusers.
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        processor: SanaAttnProcessor | SanaLinearAttnProcessor,
        cross_attention_dim: int | None = None,
        bias: bool = False,
        qk_norm: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner_dim = heads * head_dim
        self.heads = heads
        self.is_cross_attention = cross_attention_dim is not None
        kv_dim = dim if cross_attention_dim is None else cross_attention_dim
        self.to_q = Linear(dim, inner_dim, bias=bias)
        self.to_k = Linear(kv_dim, inner_dim, bias=bias)
        self.to_v = Linear(kv_dim, inner_dim, bias=bias)
        self.norm_q = SanaRMSNorm(inner_dim) if qk_norm else None
        self.norm_k = SanaRMSNorm(inner_dim) if qk_norm else None
        self.to_out = nn.ModuleList([Linear(inner_dim, dim), nn.Dropout(dropout)])
        self.processor = processor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to the same shape; `kwargs` are those of the processor."""
        return self.processor(self, hidden_states, **kwargs)
