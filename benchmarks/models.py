"""Models of the true sizes with random weights: ours and diffusers' over the same memory."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

import diffusers_sana
from diffusers_sana.checkpoints import SANA_EMOJI


diffusers.utils.logging.set_verbosity_error()  # casting models on the meta device warns

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sana-0.6b": {
        "num_layers": 28,
        "num_attention_heads": 36,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "sana-1.6b": {"num_layers": 20},  # the defaults are its other sizes
    "tiny": {  # for dry runs
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
    },
}
SANA_VIDEO = {"num_layers": 2, "mlp_ratio": 3.0}  # 2B at 480p, which has 20 blocks; the other defaults are its sizes
AUTOENCODER = {  # f32c32 of Sana
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
TINY_AUTOENCODER = AUTOENCODER | {
    **{f"{half}_block_out_channels": (8, 8, 8, 16, 16, 32) for half in ("encoder", "decoder")},
    **{f"{half}_layers_per_block": (1,) * 6 for half in ("encoder", "decoder")},
    "attention_head_dim": 8,
}
GEMMA_2_2B = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
TINY_GEMMA = GEMMA_2_2B | {
    "vocab_size": 2048,  # more than the bundled tokenizer has
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
PROMPT_TOKENS, MAX_TOKENS, TEXT_WIDTH = 32, 300, 2304


def random_model(make: Callable[[], nn.Module], device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with normal weights of standard deviation 1 / sqrt(inputs), made on `device` without an fp32 copy."""
    with init_empty_weights(include_buffers=False):  # buffers, such as tables of positions, are computed
        model = make()
    buffers = dict(model.to(dtype).named_buffers())
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval()


def twins(class_name: str, config: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Ours and diffusers' model of one class, with parameters in the same memory."""
    theirs = random_model(lambda: getattr(diffusers, class_name)(**config), device, dtype)
    with torch.device("meta"):
        ours = getattr(diffusers_sana, class_name)(**config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


def step_inputs(size: int, device: str, dtype: torch.dtype, batch: int = 1) -> dict[str, Any]:
    """Arguments of the transformer for one guided step: empty negative prompts, then prompts of 32 tokens."""
    torch.manual_seed(0)
    mask = torch.zeros(2 * batch, MAX_TOKENS, dtype=torch.long, device=device)
    mask[:batch, 0] = 1
    mask[batch:, :PROMPT_TOKENS] = 1
    return {
        "hidden_states": torch.randn(2 * batch, 32, size // 32, size // 32).to(device, dtype),
        "encoder_hidden_states": torch.randn(2 * batch, MAX_TOKENS, TEXT_WIDTH).to(device, dtype),
        "timestep": torch.full((2 * batch,), 500.0, device=device),
        "encoder_attention_mask": mask,
    }


def video_step_inputs(
    config: dict[str, Any], height: int, width: int, frames: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The same of a video, with latents of Wan's autoencoder: four frames and 8 x 8 pixels each."""
    text = step_inputs(32, device, dtype)
    size = config.get("in_channels", 16), 1 + (frames - 1) // 4, height // 8, width // 8
    return text | {"hidden_states": torch.randn(2, *size).to(device, dtype)}


def tokenizer() -> PreTrainedTokenizerFast:
    """The bundled one: it makes 201 tokens of the instruction, much as Gemma's does."""
    return PreTrainedTokenizerFast.from_pretrained(SANA_EMOJI, subfolder="tokenizer")


def pipelines(
    transformer: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    text_encoder: dict[str, Any] | None = None,
    autoencoder: dict[str, Any] | None = None,
) -> dict[str, diffusers.DiffusionPipeline]:
    """Both pipelines over the same weights; the text encoder is Gemma-2-2B's size."""
    ours, theirs = twins("SanaTransformer2DModel", transformer, device, dtype)
    our_vae, their_vae = twins("AutoencoderDC", autoencoder or AUTOENCODER, device, dtype)
    encoder = random_model(lambda: Gemma2Model(Gemma2Config(**(text_encoder or GEMMA_2_2B))), device, dtype)
    scheduler = diffusers_sana.FlowDPMSolverScheduler(flow_shift=3.0)
    their_scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )

    def build(library: ModuleType, transformer: Any, vae: Any, scheduler: Any) -> diffusers.DiffusionPipeline:
        pipe = library.SanaPipeline(tokenizer(), encoder, vae, transformer, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return {
        "diffusers": build(diffusers, theirs, their_vae, their_scheduler),
        "diffusers_sana": build(diffusers_sana, ours, our_vae, scheduler),
    }
