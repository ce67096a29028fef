"""Activation quantization and low-rank down projection of SVDQuant, in one pass over the input.

    low = x @ proj_down.T                      (the 16-bit branch: raw x)
    codes, scales = quantize(x / smooth)       (the low-bit branch)

(SVDQuant, arXiv 2411.05007, section 4.2 and equation 6.) Three formats of the quantized values (codes):

    int4    integers -7..7 in int8, one scale per 64 neighbours: amax / 7
    nvfp4   packed e2m1, one e4m3 scale per 16 neighbours: amax / 6
    int8    integers -127..127, one scale per token: amax / 127

In rotated layers `quantize` takes `rotate(x / smooth)`, see `rotation.py`. Triton kernels do not rotate: the rotation
is an operation before them.

All implementations divide by smoothing factors and scales in the same way: they multiply by `reciprocal`. The scales
themselves are quotients.

Legend: M tokens, K input features, Kp = K padded to a multiple of 64 with zeros, r rank.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import operator, use_triton
from diffusers_sana.kernels.kept import Kept
from diffusers_sana.kernels.low_bit import (
    E4M3_MAX,
    GROUP_SIZES,
    MAX_CODES,
    encode_e2m1,
    pack_nibbles,
    pad_features,
    padded,
    reciprocal,
)
from diffusers_sana.kernels.rotation import rotate


FORMATS = ("int4", "nvfp4", "int8")

_RECIPROCALS = Kept()


def quantize_lowrank(
    hidden_states: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    activation_format: str,
    rotation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes `hidden_states / smooth_factor` and projects `hidden_states` down.

    Args:
        hidden_states: `[M, K]`.
        smooth_factor: `[K]`, positive.
        proj_down: `[r, K]`; r may be 0.
        activation_format: "int4", "nvfp4" or "int8".
        rotation: that of the layer, None if it is not rotated.

    Returns:
        codes: int8 `[M, Kp]`, for nvfp4 uint8 `[M, Kp/2]` packed as in `low_bit.py`.
        scales: fp32 `[M, Kp/64]` (int4), e4m3 `[M, Kp/16]` (nvfp4) or fp32 `[M, 1]` (int8).
        low: fp32 `[M, r]`.

    Raises:
        ValueError: another format.
    """
    if activation_format not in FORMATS:
        raise ValueError(f"`activation_format` must be one of {FORMATS}, got {activation_format!r}.")
    reason = "there are no tokens" if hidden_states.numel() == 0 else None
    if use_triton("quantize_lowrank", hidden_states, smooth_factor, proj_down, unsupported=reason):
        if rotation is None:
            return _quantize_lowrank_triton(hidden_states, smooth_factor, proj_down, activation_format)
        rotated = rotate(hidden_states.float() * reciprocal(smooth_factor), rotation)
        no_branch = rotated.new_empty(0, rotated.shape[1])
        codes, scales, _ = _quantize_lowrank_triton(rotated, None, no_branch, activation_format)
        return codes, scales, hidden_states.float() @ proj_down.float().t()
    return quantize_lowrank_reference(hidden_states, smooth_factor, proj_down, activation_format, rotation)


def quantize_lowrank_reference(
    hidden_states: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    activation_format: str,
    rotation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas in PyTorch; defines which code each number gets."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    low = hidden_states.to(dtype) @ proj_down.to(dtype).t()
    smoothed = pad_features(hidden_states.float() * reciprocal(smooth_factor))
    if rotation is not None:
        smoothed = rotate(smoothed, rotation)
    if activation_format == "int8":
        scales = smoothed.abs().amax(-1, keepdim=True) / 127
        return (smoothed * reciprocal(scales)).round().to(torch.int8), scales, low
    group_size = GROUP_SIZES[activation_format]
    groups = smoothed.unflatten(-1, (-1, group_size))
    scales = groups.abs().amax(-1) / MAX_CODES[activation_format]
    if activation_format == "int4":
        return (groups * reciprocal(scales)[..., None]).round().flatten(-2).to(torch.int8), scales, low
    scales = scales.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    nibbles = encode_e2m1((groups * reciprocal(scales)[..., None]).flatten(-2))
    return pack_nibbles(nibbles, group_size), scales, low


def empty_outputs(hidden_states: Tensor, rank: int, activation_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized codes, scales and low."""
    tokens, features = hidden_states.shape[0], padded(hidden_states.shape[1])
    shapes = {
        "int8": ((tokens, features), torch.int8, (tokens, 1), torch.float32),
        "int4": ((tokens, features), torch.int8, (tokens, features // 64), torch.float32),
        "nvfp4": ((tokens, features // 2), torch.uint8, (tokens, features // 16), torch.float8_e4m3fn),
    }
    codes_shape, codes_dtype, scales_shape, scales_dtype = shapes[activation_format]
    return (
        hidden_states.new_empty(codes_shape, dtype=codes_dtype),
        hidden_states.new_empty(scales_shape, dtype=scales_dtype),
        hidden_states.new_empty((tokens, rank), dtype=torch.float32),
    )


def _empty_outputs(
    hidden_states: Tensor, smooth_factor: Tensor | None, proj_down: Tensor, activation_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(hidden_states, proj_down.shape[0], activation_format)


@operator(
    "quantize_lowrank_forward(Tensor hidden_states, Tensor? smooth_factor, Tensor proj_down, str activation_format)"
    " -> (Tensor, Tensor, Tensor)",
    _empty_outputs,
    "CompositeExplicitAutograd",
)
def _quantize_lowrank_triton(
    hidden_states: Tensor, smooth_factor: Tensor | None, proj_down: Tensor, activation_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel, with the reciprocals of an earlier call with these factors."""
    from diffusers_sana.kernels.triton.quantize_lowrank import quantize_lowrank_forward

    reciprocals = None if smooth_factor is None else _RECIPROCALS.get(reciprocal, smooth_factor)
    return quantize_lowrank_forward(hidden_states, reciprocals, proj_down, activation_format)
