"""Tiny SANA-Video transformers and their inputs, shared by the tests of the model."""

import diffusers
import torch
from torch import Tensor

from diffusers_sana.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from tests.models.sana_transformers import excite


TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "mlp_ratio": 3.0,
    "rope_max_seq_len": 32,
}


def tiny_model(**overrides) -> SanaVideoTransformer3DModel:
    """Ours, in eval mode, with weights large enough that no part of the model can be dropped unnoticed."""
    torch.manual_seed(0)
    return excite(SanaVideoTransformer3DModel(**{**TINY, **overrides})).eval()


def upstream_twin(model: SanaVideoTransformer3DModel) -> diffusers.SanaVideoTransformer3DModel:
    """The diffusers class with the same configuration and weights."""
    twin = diffusers.SanaVideoTransformer3DModel.from_config(dict(model.config))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype).train(model.training)


def tiny_inputs(
    model: SanaVideoTransformer3DModel, batch_size: int = 2, frames: int = 4, height: int = 6, width: int = 4
) -> dict[str, Tensor]:
    """Keyword arguments of `forward`; the masks differ in length from sample to sample, the first has one token."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 5, 3, 7])[:batch_size, None]
    inputs = {
        "hidden_states": torch.randn(batch_size, config["in_channels"], frames, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch_size, 7, config["caption_channels"], generator=generator),
        "encoder_attention_mask": (torch.arange(7) < lengths).long(),
        "timestep": torch.linspace(700.0, 40.0, batch_size),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.linspace(0.45, 0.2, batch_size)
    return inputs
