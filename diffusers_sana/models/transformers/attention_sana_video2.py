"""The attention layers of SANA-Video 2.0: gated linear, gated softmax, and softmax to the text.

Parameters have the names of the authors' checkpoints.

Legend: B batch, N tokens of the video, L text tokens, D inner width, S prompts of a single token, H heads, d head
width.
"""

from functools import partial
from typing import Any, cast

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from diffusers_sana.kernels.gated_linear_attention import gated_linear_attention
from diffusers_sana.kernels.relu_linear_attention import rotate_pairs
from diffusers_sana.models.layers import Linear
from diffusers_sana.models.transformers.attention_sana import SanaAttnProcessor, SanaRMSNorm, SanaTextState
from diffusers_sana.models.transformers.sequence_parallel import all_reduced


TEXT_NORM_EPS = 1e-6  # of queries and keys of the cross-attention; all other norms have 1e-5


class SanaVideo2LinearAttnProcessor:
    """Gated linear self-attention, in fp32 inside. There is no softmax and hence no attention backend to choose."""

    _parallel_config = None  # set by `enable_parallelism`

    def __call__(self, attn: Any, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = attn.qkv(hidden_states).chunk(3, dim=-1)
        query, key = attn.q_norm(query), attn.k_norm(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        beta = attn.beta_proj(hidden_states).sigmoid()
        config = self._parallel_config
        reduce_state = None if config is None else partial(all_reduced, config=config)
        out = gated_linear_attention(
            query, key, value, beta, rotary_emb, divisor=attn.relu_divisor, reduce_state=reduce_state
        )
        out = attn.o_norm(out).to(hidden_states.dtype).flatten(-2)  # [B, N, H, d] -> [B, N, D]
        return attn.proj(out * attn.output_gate(hidden_states).sigmoid())


class SanaVideo2SoftmaxAttnProcessor:
    """Gated softmax self-attention through the attention backends of diffusers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Any, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = attn.qkv(hidden_states).chunk(3, dim=-1)
        query, key = attn.q_norm(query), attn.k_norm(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        cos, sin = (table[:, None] for table in rotary_emb)  # [N, 1, d/2]
        query, key = (rotate_pairs(x, cos, sin).to(value.dtype) for x in (query, key))
        options: dict[str, Any] = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        out = dispatch_attention_fn(query, key, value, **options).flatten(-2)
        return attn.proj(out * attn.output_gate(hidden_states).sigmoid())


class SanaVideo2Attention(nn.Module, AttentionModuleMixin):
    """Projections of a self-attention layer; the processor defines how they are used.

    Args:
        dim: D.
        head_dim: d.
        is_linear: gated linear attention; else gated softmax attention.
        relu_divisor: see `gated_linear_attention`.
    """

    processor: Any
    _supports_qkv_fusion = False  # the checkpoints have one matrix already

    def __init__(self, dim: int, head_dim: int, is_linear: bool, relu_divisor: bool = False) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.is_linear = is_linear
        self.relu_divisor = relu_divisor
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_norm = SanaRMSNorm(dim)
        self.k_norm = SanaRMSNorm(dim)
        if is_linear:
            self.beta_proj = Linear(dim, self.heads)
            self.o_norm = SanaRMSNorm(head_dim)
        self.output_gate = Linear(dim, dim)
        self.proj = Linear(dim, dim)
        self.processor = SanaVideo2LinearAttnProcessor() if is_linear else SanaVideo2SoftmaxAttnProcessor()

    def forward(self, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, N, D]` to the same shape; `rotary_emb` from `rotary_tables` for the head width."""
        return self.processor(self, hidden_states, rotary_emb=rotary_emb)


class SanaVideo2TextAttnProcessor(SanaAttnProcessor):
    """`SanaAttnProcessor` for one matrix of keys and values."""

    def encode_text(self, attn: Any, encoder_hidden_states: Tensor, num_single: int = 0) -> SanaTextState:
        """As there."""
        key, value = attn.kv_linear(encoder_hidden_states).chunk(2, dim=-1)
        constant = attn.proj(value[:num_single, :1]) if num_single else None
        key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.k_norm(key[num_single:]), value[num_single:]))
        return SanaTextState(key, value, constant)


class SanaVideo2TextAttention(nn.Module, AttentionModuleMixin):
    """Projections of the attention to the text.

    Args:
        dim: D, also of the projected text.
        heads: their number.
    """

    processor: Any
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.is_cross_attention = True
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.q_norm = SanaRMSNorm(dim, TEXT_NORM_EPS)
        self.k_norm = SanaRMSNorm(dim, TEXT_NORM_EPS)
        self.processor = SanaVideo2TextAttnProcessor()

    @property
    def to_q(self) -> nn.Module:
        """The name of the layer that `SanaAttnProcessor` knows, like the following."""
        return self.q_linear

    @property
    def norm_q(self) -> nn.Module:
        """See `to_q`."""
        return self.q_norm

    @property
    def to_out(self) -> tuple[nn.Module, nn.Module]:
        """See `to_q`; there is no dropout."""
        return self.proj, nn.Identity()

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | SanaTextState, attention_mask: Tensor | None
    ) -> Tensor:
        """`[B, N, D]` to the same shape; see `SanaAttnProcessor`."""
        arguments = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        return cast(Tensor, self.processor(self, hidden_states, **arguments))
