"""What trainings of SANA-Sprint share: the tangent of a student along a path, and sample grids in 1, 2 and 4 steps."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.quantizers.svdquant.layers.linear import forward_mode_products, quantized_layers
from diffusers_sana.schedulers import trigflow
from diffusers_sana.training.objectives.trigflow_distillation import consistency_tangent, directional_derivative
from diffusers_sana.training.recipes.text_to_image import Prompt, save_samples
from diffusers_sana.training.recipes.transformer_options import ConsistencyTrainingConfig


def tangent_of(
    config: ConsistencyTrainingConfig,
    accelerator: Accelerator,
    student: nn.Module,
    noisy: Tensor,
    angles: Tensor,
    guidance: Tensor,
    prompt: Prompt,
    direction: Tensor,
    warmup: float = 1.0,
) -> Tensor:
    """Where the student's prediction should move, `[B, C, h, w]`.

    Args:
        config: the settings.
        accelerator: that prepared `student`.
        student: a TrigFlowStudent; its base may be quantized.
        noisy, angles, guidance, prompt: as in its `forward`.
        direction: dx_t / dt of the path, `[B, C, h, w]`.
        warmup: as in `consistency_tangent`.
    """
    plain = accelerator.unwrap_model(student)
    is_quantized = any(True for _ in quantized_layers(plain))
    products = forward_mode_products(plain) if is_quantized else nullcontext()
    with accelerator.autocast(), kernel_mode("torch"), products:
        predicted = directional_derivative(lambda x, t: plain(x, t, guidance, prompt)[0], noisy, angles, direction)
    return consistency_tangent(noisy, angles, predicted, direction, warmup, config.sigma_data, config.tangent_constant)


def save_consistency_samples(
    path: Path,
    config: ConsistencyTrainingConfig,
    accelerator: Accelerator,
    student: nn.Module,
    vae: Any,
    prompt: Prompt,
    noise: Tensor,
) -> None:
    """Write a grid of what the student generates in 1, 2 and 4 steps, a row for each.

    Args:
        path: of the image.
        config: has the guidance scale.
        accelerator: that prepared `student`.
        student: a TrigFlowStudent; sampled from in evaluation mode.
        vae: decodes.
        prompt, noise: of the columns.
    """
    guidance = torch.full([len(noise)], config.sample_guidance, device=noise.device)
    student.eval()
    generated = [
        trigflow.sample_consistency(
            lambda x, t: student(x, t, guidance, prompt)[0], noise, angles, torch.Generator().manual_seed(0)
        )
        for angles in trigflow.STEP_ANGLES.values()
    ]
    student.train()
    save_samples(path, vae, torch.cat(generated), accelerator, columns=len(noise))


def guidance_scales(config: ConsistencyTrainingConfig, count: int, device: torch.device) -> Tensor:
    """A guidance scale for each image, `[count]`, out of those that the student learns."""
    scales = torch.tensor(config.guidance_scales, device=device)
    return scales[torch.randint(len(scales), (count,), device=device)]
