"""Classifier-free guidance (arXiv 2207.12598) and the update of a multistep solver, in one pass over memory.

    v = u + guidance_scale * (c - u)           u, c: model output without and with the prompt
    p_0 = sample - sigma * v                   or v, for solvers that integrate the velocity
    prev_sample = sample_weight * sample + sum_k prediction_weights[k] * p_k

with `p_1, p_2, ...` the predictions of earlier steps. Computed in the dtype of the sample, fp32 or float64.

Legend: B images, `...` any further axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import triton_operator, use_triton


MAX_HISTORY = 2


def guided_solver_step(
    model_output: Tensor,
    sample: Tensor,
    history: Sequence[Tensor],
    *,
    guidance_scale: float | None,
    sigma: float | None,
    sample_weight: float,
    prediction_weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """One step of a solver, from what the model returned.

    The kernel has no backward pass; inputs that require gradients run the reference.

    Args:
        model_output: `[2 * B, ...]`, the half without the prompt first; `[B, ...]` where `guidance_scale` is None.
            Any dtype.
        sample: `[B, ...]`, fp32 or float64.
        history: predictions of earlier steps, newest first, each `[B, ...]`.
        guidance_scale: None: no guidance.
        sigma: noise level of the sample; None: the prediction is the velocity itself.
        sample_weight: weight of the sample.
        prediction_weights: of the new prediction and of those in `history`.

    Returns:
        The next sample and the new prediction, both `[B, ...]` in the dtype of `sample`, as new tensors.
    """
    tensors = (model_output, sample, *history)
    reason = _unsupported_reason(model_output, sample, history, has_guidance=guidance_scale is not None)
    if use_triton("guided_solver_step", *tensors, unsupported=reason):
        return _guided_solver_step_triton(
            model_output, sample, list(history), guidance_scale, sigma, sample_weight, list(prediction_weights)
        )
    return guided_solver_step_reference(
        model_output,
        sample,
        history,
        guidance_scale=guidance_scale,
        sigma=sigma,
        sample_weight=sample_weight,
        prediction_weights=prediction_weights,
    )


def guided_solver_step_reference(
    model_output: Tensor, sample: Tensor, history: Sequence[Tensor],
    *, guidance_scale: float | None, sigma: float | None, sample_weight: float, prediction_weights: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in PyTorch; float64 inputs give the reference result."""
    velocity = model_output
    if guidance_scale is not None:
        unconditional, conditional = model_output.to(sample.dtype).chunk(2)
        velocity = (conditional - unconditional).mul_(guidance_scale).add_(unconditional)
    if sigma is not None:
        prediction = torch.add(sample, velocity, alpha=-sigma)
    else:
        # A copy, because compiled models write their next output into the same memory.
        prediction = velocity.to(sample.dtype, copy=velocity is model_output)
    prev_sample = sample * sample_weight
    for weight, summand in zip(prediction_weights, (prediction, *history), strict=True):
        prev_sample.add_(summand, alpha=weight)
    return prev_sample, prediction


def _unsupported_reason(
    model_output: Tensor, sample: Tensor, history: Sequence[Tensor], has_guidance: bool
) -> str | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (model_output, sample, *history)):
        return "an input requires a gradient"
    if any(tensor.dtype != torch.float32 for tensor in (sample, *history)):
        return f"the sample and earlier predictions must be fp32, got {[t.dtype for t in (sample, *history)]}"
    if len(history) > MAX_HISTORY:
        return f"more than {MAX_HISTORY} earlier predictions, {len(history)}"
    expected = (sample.shape[0] * (2 if has_guidance else 1), *sample.shape[1:]) if sample.ndim else ()
    if sample.numel() == 0 or model_output.shape != expected or any(t.shape != sample.shape for t in history):
        shapes = [list(tensor.shape) for tensor in (model_output, *history)]
        return f"model output and earlier predictions do not fit the sample {list(sample.shape)}: {shapes}"
    return None


@triton_operator(
    "guided_solver_step_forward(Tensor model_output, Tensor sample, Tensor[] history, float? guidance_scale, "
    "float? sigma, float sample_weight, float[] prediction_weights) -> (Tensor, Tensor)"
)
def _guided_solver_step_triton(model_output: Tensor, sample: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return sample.new_empty(sample.shape), sample.new_empty(sample.shape)
