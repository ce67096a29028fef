"""The depth transformer of VILA-U: from one hidden state of the language model to the D codes of one image token.

Slot 1 sees the hidden state, slot d the sum of the codebook entries of the codes before it (arXiv 2409.04429, eq. 6);
slot d predicts code d. Image tokens do not attend to each other.

Legend: N image tokens, D codes per image token (slots), K codebook entries, C width of an entry, H width of the
language model, E inner width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffusers_sana._compat import capture_outputs, merge_with_config_defaults
from diffusers_sana.models.layers import eager_attention
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUDepthConfig


class VilaUDepthCache:
    """Keys and values of the slots of N image tokens, for one pass through the slots in order.

    Memory for all D slots of a layer is allocated when slot 0 is written, so a cache can be reused for the next
    tokens.
    """

    def __init__(self, config: VilaUDepthConfig) -> None:
        self.num_slots = config.num_codebooks
        self.keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self.values: list[Tensor | None] = [None] * config.num_hidden_layers

    def write(self, layer: int, slot: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores `[N, heads, 1, width]` of one slot and returns those of all slots up to it."""
        if slot == 0:
            batch, heads, _, width = key.shape
            self.keys[layer] = key.new_empty(batch, heads, self.num_slots, width)
            self.values[layer] = value.new_empty(batch, heads, self.num_slots, width)
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            raise ValueError(f"slots must be written in order from 0, got slot {slot} first")
        keys[:, :, slot : slot + 1] = key
        values[:, :, slot : slot + 1] = value
        return keys[:, :, : slot + 1], values[:, :, : slot + 1]


class VilaUDepthAttention(nn.Module):
    """Causal self-attention over the slots of an image token."""

    def __init__(self, config: VilaUDepthConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: VilaUDepthCache | None = None,
        slot: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Maps `[N, slots, E]` to the same shape; also returns the attention weights, if the implementation has them.

        With a `cache`, the input is the one slot `slot`.
        """
        shape = (*hidden_states.shape[:-1], self.config.num_attention_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.write(self.layer_idx, slot, key, value)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.out_proj(output.flatten(2)), weights


class VilaUDepthMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: VilaUDepthConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., E]` to the same shape."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class VilaUDepthLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward with dropout, each added to the residual stream."""

    def __init__(self, config: VilaUDepthConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VilaUDepthAttention(config, layer_idx)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VilaUDepthMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **attention_kwargs: Any) -> Tensor:
        """Maps `[N, slots, E]` to the same shape; keywords as in `VilaUDepthAttention.forward`."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))


class VilaUDepthTransformer(PreTrainedModel):
    """Predicts the D codes of an image token autoregressively.

    `forward` processes all slots at once, for training with known codes; `step` processes one slot, for generation.
    Both compute the same.
    """

    config: VilaUDepthConfig
    config_class = VilaUDepthConfig
    main_input_name = "backbone_hidden_states"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VilaUDepthLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": VilaUDepthLayer, "attentions": VilaUDepthAttention}

    def __init__(self, config: VilaUDepthConfig) -> None:
        super().__init__(config)
        self.backbone_proj = nn.Linear(config.backbone_hidden_size, config.hidden_size)
        self.code_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_codebooks, config.hidden_size)
        self.layers = nn.ModuleList([VilaUDepthLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.codebook_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        backbone_hidden_states: Tensor,
        code_embeddings: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Processes all slots of each image token, given the codes.

        Args:
            backbone_hidden_states: `[N, H]`, of the language model, after its last norm, at the position before the
                token.
            code_embeddings: `[N, D, C]` or `[N, D - 1, C]`, the codebook entries of the codes. The last one is
                not used.
            output_hidden_states, output_attentions: also return those; None: as in the config.

        Returns:
            `last_hidden_state` `[N, D, E]`; `head` maps it to the logits `[N, D, K]`.
        """
        inputs = self.backbone_proj(backbone_hidden_states)[:, None]
        if self.config.num_codebooks > 1:
            sums = code_embeddings[:, : self.config.num_codebooks - 1].float().cumsum(1)
            inputs = torch.cat([inputs, self.code_proj(sums.to(code_embeddings.dtype))], 1)
        hidden_states = inputs + self.position_embedding(torch.arange(inputs.shape[1], device=inputs.device))
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def step(self, inputs: Tensor, slot: int, cache: VilaUDepthCache) -> Tensor:
        """Processes one slot of each image token; slots must come in order.

        Args:
            inputs: slot 0: hidden states of the language model `[N, H]`; later: the sum of the codebook entries of the
                codes so far `[N, C]`.
            slot: index from 0.
            cache: reused for the next image tokens.

        Returns:
            Logits `[N, K]` of code number `slot`.
        """
        project = self.backbone_proj if slot == 0 else self.code_proj
        position = torch.full((1,), slot, device=inputs.device)
        hidden_states = (project(inputs) + self.position_embedding(position))[:, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, cache=cache, slot=slot)
        return self.head(self.norm(hidden_states[:, 0]))


__all__ = ["VilaUDepthCache", "VilaUDepthTransformer"]
