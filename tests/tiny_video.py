"""Tiny pipelines of SANA-Video with random weights, equal for an equal seed in both packages."""

from types import ModuleType
from typing import Any

import diffusers
import torch

from tests import tiny


TRANSFORMER = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": tiny.TEXT_WIDTH,
    "sample_size": 2,
    "rope_max_seq_len": 64,
}
FLOW_SHIFT = 8.0


def vae() -> diffusers.AutoencoderKLWan:
    """Four frames and 8 x 8 pixels to a latent."""
    torch.manual_seed(0)
    sizes = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLWan(**sizes, temperal_downsample=[False, True, True]).eval()


def ltx_vae() -> diffusers.AutoencoderKLLTX2Video:
    """Two frames and 2 x 2 pixels to a latent, with statistics of its latents."""
    torch.manual_seed(0)
    encoder = {"block_out_channels": (8,), "layers_per_block": (1,), "spatio_temporal_scaling": (True,)}
    decoder = {
        "decoder_block_out_channels": (8,),
        "decoder_layers_per_block": (1, 1),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
    }
    patches = {"patch_size": 1, "patch_size_t": 1, "decoder_causal": False}
    ratios = {"temporal_compression_ratio": 2, "spatial_compression_ratio": 2}
    config = {"latent_channels": 16, "downsample_type": ("spatiotemporal",)} | encoder | decoder | patches | ratios
    model = diffusers.AutoencoderKLLTX2Video(**config).eval()
    model.latents_mean.normal_()
    model.latents_std.uniform_(0.5, 2)
    return model


def transformer(library: ModuleType, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    weights = diffusers.SanaVideoTransformer3DModel(**TRANSFORMER | changes).state_dict()
    model = library.SanaVideoTransformer3DModel(**TRANSFORMER | changes)
    model.load_state_dict(weights)
    return model.eval()


def scheduler(library: ModuleType) -> diffusers.SchedulerMixin:
    if library is diffusers:
        return diffusers.DPMSolverMultistepScheduler(**tiny.OFFICIAL_SCHEDULER | {"flow_shift": FLOW_SHIFT})
    return library.FlowDPMSolverScheduler(flow_shift=FLOW_SHIFT)


def pipeline(
    library: ModuleType, name: str = "SanaVideoPipeline", parts: dict[str, Any] | None = None, **changes: Any
) -> diffusers.DiffusionPipeline:
    """`library.NAME`, with other components in `parts` and `changes` of the transformer's config."""
    components = {
        "tokenizer": tiny.tokenizer(),
        "text_encoder": tiny.text_encoder(),
        "vae": vae(),
        "transformer": transformer(library, **changes),
        "scheduler": scheduler(library),
    }
    pipe = getattr(library, name)(**components | (parts or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: diffusers.DiffusionPipeline, prompt: Any = "a cat", seed: int = 3, **kwargs: Any) -> Any:
    """Latents of two latent frames of 32 x 32 pixels after two steps, or what `kwargs` ask for."""
    kwargs = {
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "frames": 5,
        "output_type": "latent",
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "generator": torch.Generator().manual_seed(seed),
    } | kwargs
    return pipe(prompt=prompt, **kwargs).frames
