"""SigLIP (arXiv 2303.15343), the encoders of VILA-U's vision tower: image blocks, attention pooling, text tower.

Weights are named as in SigLIP's checkpoints. There are no masks: SigLIP pads texts to full length and attends to the
padding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffusers_sana.kernels.precision import without_autocast
from diffusers_sana.models.layers import eager_attention
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig


LOGIT_SCALE, LOGIT_BIAS = math.log(10.0), -10.0  # SigLIP's initial values: of N^2 pairs only N match


class VilaUVisionAttention(nn.Module):
    """Attention between all tokens, through the attention interface of transformers."""

    is_causal = False

    def __init__(self, config: VilaUVisionConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`[B, T, C]` to the same shape, and the attention weights if the implementation has them."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=self.is_causal,
            **kwargs,
        )
        return self.out_proj(out.flatten(2)), weights


class VilaUVisionMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: VilaUVisionConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., C]` to the same."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class VilaUVisionBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: VilaUVisionConfig, hidden_size: int, intermediate_size: int, num_heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VilaUVisionAttention(config, hidden_size, num_heads)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = VilaUVisionMLP(config, hidden_size, intermediate_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, C]` to the same."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


def vision_block(config: VilaUVisionConfig) -> VilaUVisionBlock:
    """One block of the image encoder."""
    return VilaUVisionBlock(config, config.hidden_size, config.intermediate_size, config.num_attention_heads)


class VilaUVisionEmbeddings(nn.Module):
    """Patches to tokens, with learned positions. Pixels beyond the last complete patch are dropped."""

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.num_image_tokens, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, T, C]`, in raster order."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).mT.contiguous()
        return patches + self.position_embedding(torch.arange(patches.shape[1], device=patches.device))


class VilaUAttentionPooling(nn.Module):
    """Attention pooling: one learned query attends to all tokens, followed by an MLP."""

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VilaUVisionMLP(config, config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, C]`."""
        probe = self.probe.expand(len(hidden_states), -1, -1)
        pooled = self.attention(probe, hidden_states, hidden_states, need_weights=False)[0].squeeze(1)
        return pooled + self.mlp(self.layernorm(pooled))


class VilaUSemanticHead(nn.Module):
    """The rest of SigLIP's image encoder: last block, norm, pooling."""

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        self.layer = vision_block(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = VilaUAttentionPooling(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, C]`."""
        return self.head(self.post_layernorm(self.layer(hidden_states)))


class VilaUTextEmbeddings(nn.Module):
    """Token ids to vectors, with learned positions."""

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.text_vocab_size, config.text_hidden_size)
        self.position_embedding = nn.Embedding(config.text_max_position_embeddings, config.text_hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, S]` to `[B, S, C]`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class VilaUTextTower(nn.Module):
    """SigLIP's text encoder. The text embedding comes from the last token."""

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        width = config.text_hidden_size
        self.max_length = config.text_max_position_embeddings
        self.embeddings = VilaUTextEmbeddings(config)
        self.layers = nn.ModuleList(
            VilaUVisionBlock(config, width, config.text_intermediate_size, config.text_num_attention_heads)
            for _ in range(config.text_num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, S]`, padded to full length with the tokenizer's padding token, to `[B, C]`."""
        if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= self.max_length:
            raise ValueError(
                f"`input_ids` must be [batch, 1 to {self.max_length} tokens], got {list(input_ids.shape)}; "
                "truncate the texts"
            )
        hidden_states = self.embeddings(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.head(self.final_layer_norm(hidden_states)[:, -1])


def sigmoid_contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss: each of the N x N image-text pairs is classified independently; pairs of equal index match.

        -1/N sum_ij log sigmoid(s_ij (exp(scale) x_i.y_j + bias)),   s_ii = 1, else -1,   x, y of unit length

    Args:
        image_embeds, text_embeds: `[N, C]`, of any norm.
        scale, bias: `[1]`.

    Returns:
        A scalar in fp32.
    """
    if image_embeds.shape != text_embeds.shape or image_embeds.ndim != 2:
        raise ValueError(
            f"`image_embeds` and `text_embeds` must both be [N, C], got {list(image_embeds.shape)} and "
            f"{list(text_embeds.shape)}; pass one text per image"
        )
    with without_autocast(image_embeds.device.type):
        images, texts = (nn.functional.normalize(embeds.float(), dim=-1) for embeds in (image_embeds, text_embeds))
        logits = images @ texts.mT * scale.float().exp() + bias.float()
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -nn.functional.logsigmoid(signs * logits).sum() / len(logits)
