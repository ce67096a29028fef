"""Guidance and solver step: each program computes a tile of channels and pixels of one image.

Per element of the sample, with guidance, a model in bf16 and a solver of order 2: 12 bytes read, 8 written; 10 FLOPs.
Memory-bound, and for small images bound by the launch. The output of a transformer is channels-last in memory, the
sample channels-first; each is loaded along its contiguous axis.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def _launch_config(channels: int) -> tuple[int, int]:
    """Channels and pixels of a tile of 1024 elements."""
    block_c = min(triton.next_power_of_2(channels), 32)
    return block_c, 1024 // block_c


@triton.jit
def _guided_solver_step_kernel(
    output_ptr, sample_ptr, previous_ptr, earlier_ptr, prev_sample_ptr, prediction_ptr,
    batch, channels, pixels, parts_c, parts_p, stride_output_b, stride_output_c, stride_output_p,
    guidance_scale, sigma, weight_sample, weight_0, weight_1, weight_2,
    IS_GUIDED: tl.constexpr, IS_VELOCITY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) // parts_p
    i_b = i_row // parts_c
    o_c = ((i_row % parts_c) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    o_p = ((tl.program_id(0).to(tl.int64) % parts_p) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    mask = (o_c < channels) & (o_p < pixels)
    offsets = (i_b * channels + o_c) * pixels + o_p

    p_output = output_ptr + i_b * stride_output_b + o_c * stride_output_c + o_p * stride_output_p
    b_velocity = tl.load(p_output, mask=mask, other=0.0).to(tl.float32)
    if IS_GUIDED:
        half = tl.cast(batch, tl.int64) * stride_output_b
        b_conditional = tl.load(p_output + half, mask=mask, other=0.0).to(tl.float32)
        b_velocity += guidance_scale * (b_conditional - b_velocity)
    b_sample = tl.load(sample_ptr + offsets, mask=mask, other=0.0)
    b_prediction = b_velocity if IS_VELOCITY else b_sample - sigma * b_velocity
    b_prev_sample = weight_sample * b_sample + weight_0 * b_prediction
    if previous_ptr is not None:
        b_prev_sample += weight_1 * tl.load(previous_ptr + offsets, mask=mask, other=0.0)
    if earlier_ptr is not None:
        b_prev_sample += weight_2 * tl.load(earlier_ptr + offsets, mask=mask, other=0.0)
    tl.store(prediction_ptr + offsets, b_prediction, mask=mask)
    tl.store(prev_sample_ptr + offsets, b_prev_sample, mask=mask)


def guided_solver_step_forward(
    model_output: Tensor,
    sample: Tensor,
    history: list[Tensor],
    guidance_scale: float | None,
    sigma: float | None,
    sample_weight: float,
    prediction_weights: list[float],
) -> tuple[Tensor, Tensor]:
    """The next sample and the new prediction, both as `sample` but contiguous; see the reference."""
    prev_sample, prediction = (torch.empty(sample.shape, dtype=sample.dtype, device=sample.device) for _ in range(2))
    batch = sample.shape[0]
    channels = sample.shape[1] if sample.ndim > 2 else 1
    pixels = sample.numel() // (batch * channels)
    model_output = model_output.reshape(-1, channels, pixels)
    sample = sample.contiguous()
    previous, earlier = [*(tensor.contiguous() for tensor in history), None, None][:2]
    block_c, block_p = _launch_config(channels)
    parts_c, parts_p = triton.cdiv(channels, block_c), triton.cdiv(pixels, block_p)
    # Floats throughout: an integer scalar would be compiled for its value.
    weights = [float(weight) for weight in (*prediction_weights, 0.0, 0.0)][:3]
    _guided_solver_step_kernel[(batch * parts_c * parts_p,)](
        model_output, sample, previous, earlier, prev_sample, prediction,
        batch, channels, pixels, parts_c, parts_p, *model_output.stride(),
        float(guidance_scale or 0.0), float(sigma or 0.0), float(sample_weight), *weights,
        IS_GUIDED=guidance_scale is not None, IS_VELOCITY=sigma is None, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return prev_sample, prediction
