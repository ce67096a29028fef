"""Tiny diffusion transformers of several families, with random weights, each with inputs for one forward."""

from types import ModuleType
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import diffusers_sana
from tests import tiny


TEXT_TOKENS = 5
LATENT_SIZES = {"sample_size": 8, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}


def sana(library: ModuleType = diffusers_sana, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    inputs = {
        "hidden_states": torch.randn(2, tiny.LATENT_CHANNELS, 6, 6),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, tiny.TEXT_WIDTH),
        "timestep": torch.tensor([500.0, 20.0]),
    }
    return tiny.transformer(library, **changes), inputs


def diffusers_sana_transformer() -> tuple[nn.Module, dict[str, Any]]:
    return sana(diffusers)


def flux() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.5, 0.2]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return model.eval(), inputs


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    sizes = {"out_channels": 8, "num_layers": 1, "cross_attention_dim": 32, "caption_channels": 16}
    model = diffusers.PixArtTransformer2DModel(**LATENT_SIZES, **sizes, use_additional_conditions=False)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 16),
        "timestep": torch.tensor([500.0, 20.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model.eval(), inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    widths = {"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 16}
    model = diffusers.SD3Transformer2DModel(
        **LATENT_SIZES, **widths, out_channels=4, num_layers=2, pos_embed_max_size=8
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([500.0, 20.0]),
    }
    return model.eval(), inputs


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=40,
        cross_attention_dim=24,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 24),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)},
    }
    return model.eval(), inputs


FAMILIES = {
    "sana": sana,
    "diffusers_sana": diffusers_sana_transformer,
    "flux": flux,
    "pixart": pixart,
    "sd3": sd3,
    "sdxl": sdxl,
}


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """One forward, with floating-point inputs in `dtype`; adaLN inputs of `added_cond_kwargs` included."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.ndim > 1 else value

    return model(**cast(inputs), return_dict=False)[0]
