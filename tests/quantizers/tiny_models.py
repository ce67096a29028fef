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


def text(width: int) -> Tensor:
    return torch.randn(2, TEXT_TOKENS, width)


def positions(tokens: int, axes: int) -> Tensor:
    """Of tokens in a row, along the last axis."""
    ids = torch.zeros(tokens, axes)
    ids[:, -1] = torch.arange(tokens)
    return ids


def flux2() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": text(16),
        "timestep": torch.tensor([0.5, 0.2]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": positions(16, 4).expand(2, -1, -1),
        "txt_ids": positions(TEXT_TOKENS, 4).expand(2, -1, -1),
    }
    return model.eval(), inputs


def chroma() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": text(16),
        "timestep": torch.tensor([0.5, 0.2]),
        "img_ids": positions(16, 3),
        "txt_ids": positions(TEXT_TOKENS, 3),
    }
    return model.eval(), inputs


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": text(16),
        "encoder_hidden_states_mask": torch.ones(2, TEXT_TOKENS, dtype=torch.long),
        "timestep": torch.tensor([0.5, 0.2]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }
    return model.eval(), inputs


def z_image() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    inputs = {
        "x": [torch.randn(4, 1, 8, 8) for _ in range(2)],
        "cap_feats": [torch.randn(TEXT_TOKENS, 16) for _ in range(2)],
        "t": torch.tensor([0.5, 0.2]),
    }
    return model.eval(), inputs


def sana_video() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": text(16),
        "timestep": torch.tensor([500.0, 20.0]),
    }
    return model.eval(), inputs


def wan() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        text_dim=16,
        ffn_dim=64,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": text(16),
        "timestep": torch.tensor([500.0, 20.0]),
    }
    return model.eval(), inputs


def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 1, 8, 8),
        "encoder_hidden_states": text(16),
        "encoder_attention_mask": torch.ones(2, TEXT_TOKENS),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([500.0, 20.0]),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return model.eval(), inputs


def ltx2() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 2 * 4 * 4, 4),
        "audio_hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": text(16),
        "audio_encoder_hidden_states": text(16),
        "encoder_attention_mask": torch.ones(2, TEXT_TOKENS, dtype=torch.bool),
        "timestep": torch.tensor([500.0, 20.0]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
    }
    return model.eval(), inputs


def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": text(16),
        "encoder_attention_mask": torch.ones(2, TEXT_TOKENS, dtype=torch.bool),
        "timestep": torch.tensor([0.5, 0.2]),
    }
    return model.eval(), inputs


def hidream() -> tuple[nn.Module, dict[str, Any]]:
    """A mixture of experts."""
    torch.manual_seed(0)
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states_t5": text(8),
        "encoder_hidden_states_llama3": torch.randn(2, 2, TEXT_TOKENS, 8),
        "pooled_embeds": torch.randn(2, 8),
        "timesteps": torch.tensor([500.0, 20.0]),
    }
    return model.eval(), inputs


FAMILIES = {
    "sana": sana,
    "diffusers_sana": diffusers_sana_transformer,
    "flux": flux,
    "pixart": pixart,
    "sd3": sd3,
    "sdxl": sdxl,
    "flux2": flux2,
    "chroma": chroma,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "sana_video": sana_video,
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "ltx2": ltx2,
    "lumina2": lumina2,
    "hidream": hidream,
}


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """One forward, with floating-point inputs in `dtype`; those in dictionaries and lists included."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cast(item) for item in value]
        is_features = isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point()
        return value.to(dtype) if is_features else value

    first = model(**cast(inputs), return_dict=False)[0]
    return torch.stack(first) if isinstance(first, list) else first
