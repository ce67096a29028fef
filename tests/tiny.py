"""Tiny real components, with random weights: what the tests of pipelines, registration and examples run on.

`components(diffusers)` and `components(diffusers_sana)` have equal weights for an equal seed.
"""

import json
import string
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast


TEXT_WIDTH = 16
LATENT_CHANNELS = 4

# What the scheduler_config.json of the official checkpoints says where it differs from diffusers' defaults.
OFFICIAL_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

TRANSFORMER = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": TEXT_WIDTH,
    "sample_size": 16,
}

OFFICIAL_INDEX = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def tokenizer() -> GemmaTokenizerFast:
    """One token a character, except that a space joins the letter behind it, as words do in the real vocabulary."""
    characters = [*sorted(set(string.printable) - set(string.whitespace)), "\n", "▁"]
    joined = ["▁" + letter for letter in string.ascii_letters]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters, *joined]
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizerFast(
        vocab=vocab, merges=[("▁", letter) for letter in string.ascii_letters], add_bos_token=True
    )


def text_config(**changes: Any) -> Gemma2Config:
    sizes = {"vocab_size": 160, "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma2Config(**sizes | heads | {"initializer_range": 0.5} | changes)


def text_encoder(seed: int = 0) -> Gemma2Model:
    torch.manual_seed(seed)
    return Gemma2Model(text_config()).eval()


def transformer(library: ModuleType = diffusers, seed: int = 0, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = TRANSFORMER | changes
    weights = diffusers.SanaTransformer2DModel(**config).state_dict()
    model = library.SanaTransformer2DModel(**config)
    model.load_state_dict(weights)
    return model.eval()


def vae(library: ModuleType = diffusers, seed: int = 0, num_stages: int = 2) -> torch.nn.Module:
    """Compresses `2 ** (num_stages - 1)` times a side; the deepest stage is an attention stage."""
    torch.manual_seed(seed)
    multiscales = (*[()] * (num_stages - 1), (5,))
    blocks = (*["ResBlock"] * (num_stages - 1), "EfficientViTBlock")
    config = {
        "latent_channels": LATENT_CHANNELS,
        "attention_head_dim": 2,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": (8,) * num_stages,
        "decoder_block_out_channels": (8,) * num_stages,
        "encoder_layers_per_block": (1,) * num_stages,
        "decoder_layers_per_block": (1,) * num_stages,
        "encoder_qkv_multiscales": multiscales,
        "decoder_qkv_multiscales": multiscales,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "decoder_conv_act_fn": "silu",
        "scaling_factor": 0.41407,
    }
    weights = diffusers.AutoencoderDC(**config).state_dict()
    model = library.AutoencoderDC(**config)
    model.load_state_dict(weights)
    return model.eval()


def scheduler(library: ModuleType = diffusers) -> diffusers.SchedulerMixin:
    if library is diffusers:
        return diffusers.DPMSolverMultistepScheduler(**OFFICIAL_SCHEDULER)
    return library.FlowDPMSolverScheduler(flow_shift=OFFICIAL_SCHEDULER["flow_shift"])


def components(library: ModuleType = diffusers, seed: int = 0, num_stages: int = 2, **changes: Any) -> dict[str, Any]:
    """Arguments of `library.SanaPipeline`. 32 pixels native size, without `changes` of the transformer's config."""
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(seed),
        "vae": vae(library, seed, num_stages),
        "transformer": transformer(library, seed, **changes),
        "scheduler": scheduler(library),
    }


def pipeline(library: ModuleType, seed: int = 0, **kwargs: Any) -> diffusers.DiffusionPipeline:
    pipe = library.SanaPipeline(**components(library, seed, **kwargs))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: diffusers.DiffusionPipeline, prompt: Any = "a cat", seed: int = 3, **kwargs: Any) -> Any:
    """Latents of `pipe` for the prompt as it is, or what `kwargs` ask for."""
    defaults = {"complex_human_instruction": None, "output_type": "latent"}
    return pipe(prompt=prompt, **defaults | {"generator": torch.Generator().manual_seed(seed)} | kwargs).images


def write_official_folder(folder: Path, seed: int = 0, **kwargs: Any) -> Path:
    """A checkpoint in the layout of the official ones: written by diffusers' classes, named by diffusers' names."""
    pipe = pipeline(diffusers, seed, **kwargs)
    pipe.save_pretrained(folder)
    index = {"_class_name": "SanaPipeline", "_diffusers_version": "0.32.0.dev0", **OFFICIAL_INDEX}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
