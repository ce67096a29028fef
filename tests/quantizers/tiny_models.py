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
BLOCK = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
SDXL = {
    "sample_size": 8,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 40,
    "cross_attention_dim": 24,
}
TIMES, FRACTIONS = torch.tensor([500.0, 20.0]), torch.tensor([0.5, 0.2])  # of the two samples


def make(name: str, **config: Any) -> nn.Module:
    """A model of a class of diffusers, the same each time."""
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def sana(library: ModuleType = diffusers_sana, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    inputs = {
        "hidden_states": torch.randn(2, tiny.LATENT_CHANNELS, 6, 6),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, tiny.TEXT_WIDTH),
        "timestep": TIMES,
    }
    return tiny.transformer(library, **changes), inputs


def diffusers_sana_transformer() -> tuple[nn.Module, dict[str, Any]]:
    return sana(diffusers)


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "FluxTransformer2DModel",
        **BLOCK,
        num_single_layers=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": text(16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": FRACTIONS,
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return model, inputs


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"out_channels": 8, "num_layers": 1, "cross_attention_dim": 32, "caption_channels": 16}
    model = make("PixArtTransformer2DModel", **LATENT_SIZES, **sizes, use_additional_conditions=False)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": text(16),
        "timestep": TIMES,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    widths = {"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 16}
    model = make("SD3Transformer2DModel", **LATENT_SIZES, **widths, out_channels=4, num_layers=2, pos_embed_max_size=8)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": text(16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": TIMES,
    }
    return model, inputs


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    model = make("UNet2DConditionModel", **SDXL, block_out_channels=(16, 32))
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": text(24),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)},
    }
    return model, inputs


def text(width: int) -> Tensor:
    return torch.randn(2, TEXT_TOKENS, width)


def video() -> dict[str, Any]:
    """Inputs of a model of videos."""
    return {"hidden_states": torch.randn(2, 4, 2, 8, 8), "encoder_hidden_states": text(16), "timestep": TIMES}


def positions(tokens: int, axes: int) -> Tensor:
    """Of tokens in a row, along the last axis."""
    ids = torch.zeros(tokens, axes)
    ids[:, -1] = torch.arange(tokens)
    return ids


def flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "Flux2Transformer2DModel",
        **BLOCK,
        num_single_layers=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": text(16),
        "timestep": FRACTIONS,
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": positions(16, 4).expand(2, -1, -1),
        "txt_ids": positions(TEXT_TOKENS, 4).expand(2, -1, -1),
    }
    return model, inputs


def chroma() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "ChromaTransformer2DModel",
        **BLOCK,
        num_single_layers=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": text(16),
        "timestep": FRACTIONS,
        "img_ids": positions(16, 3),
        "txt_ids": positions(TEXT_TOKENS, 3),
    }
    return model, inputs


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "QwenImageTransformer2DModel",
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
        "timestep": FRACTIONS,
        "img_shapes": [[(1, 4, 4)]] * 2,
    }
    return model, inputs


def z_image() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "ZImageTransformer2DModel",
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
        "t": FRACTIONS,
    }
    return model, inputs


def sana_video() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "SanaVideoTransformer3DModel",
        **BLOCK,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=16,
    )
    return model, video()


def sana_video2() -> tuple[nn.Module, dict[str, Any]]:
    """A layer with each kind of attention; as in the released model, beta's layer is a gate."""
    torch.manual_seed(0)
    model = diffusers_sana.SanaVideo2Transformer3DModel(
        in_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        softmax_head_dim=64,
        num_layers=2,
        softmax_layers=[1],
        attn_res_block_size=1,
        num_cross_attention_heads=2,
        caption_channels=16,
        mlp_ratio=2.0,
        rope_max_seq_len=16,
    ).eval()
    for layer in model.attn_res.children():  # which begin at zero
        nn.init.normal_(layer.weight, std=0.1)
    nn.init.ones_(model.attention_y_norm.weight)
    inputs = video() | {"hidden_states": torch.randn(2, 4, 2, 4, 4)}
    return model, inputs


def sana_wm() -> tuple[nn.Module, dict[str, Any]]:
    """With a camera; one block of each kind of attention."""
    model = make(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        linear_head_dim=32,
        softmax_every_n=2,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=16,
    )
    for parameter in model.parameters():
        if not parameter.any():  # the camera's layers begin at zero
            nn.init.normal_(parameter, std=0.1)
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])]).repeat(2, 2, 1)
    camera[:, 1, 3] = 0.5  # it moves sideways
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "encoder_hidden_states": text(16)[:, None],
        "encoder_attention_mask": torch.ones(2, TEXT_TOKENS, dtype=torch.bool),
        "timestep": TIMES[:, None, None].repeat(1, 1, 2),
        "camera_conditions": camera,
        "chunk_plucker": torch.randn(2, 6, 2, 4, 4),
    }
    return model, inputs


def wan() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "WanTransformer3DModel",
        **BLOCK,
        out_channels=4,
        text_dim=16,
        ffn_dim=64,
        rope_max_seq_len=16,
    )
    return model, video()


def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "HunyuanVideoTransformer3DModel",
        **BLOCK,
        out_channels=4,
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
        "timestep": TIMES,
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return model, inputs


def ltx2() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "LTX2VideoTransformer3DModel",
        **BLOCK,
        out_channels=4,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        caption_channels=16,
        rope_double_precision=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 2 * 4 * 4, 4),
        "audio_hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": text(16),
        "audio_encoder_hidden_states": text(16),
        "encoder_attention_mask": torch.ones(2, TEXT_TOKENS, dtype=torch.bool),
        "timestep": TIMES,
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
    }
    return model, inputs


def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    model = make(
        "Lumina2Transformer2DModel",
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
        "timestep": FRACTIONS,
    }
    return model, inputs


def hidream() -> tuple[nn.Module, dict[str, Any]]:
    """A mixture of experts."""
    model = make(
        "HiDreamImageTransformer2DModel",
        **BLOCK,
        patch_size=2,
        out_channels=4,
        num_single_layers=1,
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
        "timesteps": TIMES,
    }
    return model, inputs


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
    "sana_video2": sana_video2,
    "sana_wm": sana_wm,
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
