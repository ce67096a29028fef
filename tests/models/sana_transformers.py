"""Tiny Sana transformers and their inputs, shared by the tests of the model."""

import copy

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel


TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "sample_size": 8,
}
# What sets the released families apart, at tiny size.
FAMILIES = {
    "sana": {},
    "sana_2k": {"interpolation_scale": 1.0},
    "sana_4k": {"interpolation_scale": 2.0, "sample_size": 16},
    "sana_1.5": {"qk_norm": "rms_norm_across_heads"},
    "sprint": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
}


def tiny_config(family: str = "sana_1.5", **overrides) -> dict:
    return {**TINY, **FAMILIES[family], **overrides}


def tiny_model(family: str = "sana_1.5", **overrides) -> SanaTransformer2DModel:
    """Ours, in eval mode, with weights large enough that no part of the model can be dropped unnoticed."""
    return excite(SanaTransformer2DModel(**tiny_config(family, **overrides))).eval()


def upstream_twin(model: SanaTransformer2DModel) -> diffusers.SanaTransformer2DModel:
    """The diffusers class with the same configuration and weights."""
    twin = diffusers.SanaTransformer2DModel.from_config(dict(model.config))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype).train(model.training)


def tiny_inputs(
    model: SanaTransformer2DModel, batch_size: int = 2, height: int = 8, width: int = 6
) -> dict[str, Tensor]:
    """Keyword arguments of `forward`; the masks differ in length from sample to sample, the first has one token."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    text_length = 7
    lengths = torch.tensor([1, 5, 3, 7])[:batch_size, None]
    inputs = {
        "hidden_states": torch.randn(batch_size, config["in_channels"], height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch_size, text_length, config["caption_channels"], generator=generator),
        "encoder_attention_mask": (torch.arange(text_length) < lengths).long(),
        "timestep": torch.linspace(700.0, 40.0, batch_size),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.linspace(0.45, 0.2, batch_size)
    return inputs


def to_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents and text in another dtype, as the pipelines pass them; times and masks as they are."""
    inputs = copy.copy(inputs)
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name] = inputs[name].to(dtype)
    return inputs


@torch.no_grad()
def excite(model: ModelMixin) -> ModelMixin:
    """Moves every weight, also those that begin as zeros or ones."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
