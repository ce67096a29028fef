"""The 16-bit matrix that a quantized layer represents (SVDQuant, arXiv 2411.05007, equation 5).

    weight = decode(qweight) / smooth + proj_up @ proj_down
    weight = rotate(decode(qweight)) / smooth + proj_up @ proj_down      in rotated layers, see `rotation.py`

`x @ weight.T` is what the layer computes when activations stay 16 bit (w4a16).

Legend: K input features, Kp = K padded, N output features, r rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import DTYPES, triton_operator, use_triton
from diffusers_sana.kernels.low_bit import decode_weight, padded
from diffusers_sana.kernels.rotation import rotate


def dequantize_weight(
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    dtype: torch.dtype,
    rotation: Tensor | None = None,
) -> Tensor:
    """Combines the parts of a quantized weight.

    Args:
        qweight, wscales, wtscale: the residual, as in `low_bit.py`; `[N, Kp/2]`, `[N, Kp/G]`, `[N]` or None, in 8 bits
            `[N, Kp]`, `[N]`, None.
        smooth_factor: `[K]`.
        proj_down, proj_up: `[r, K]` and `[N, r]`; r may be 0.
        dtype: of the result.
        rotation: that of the layer, None if it is not rotated.

    Returns:
        `[N, K]`.
    """
    reason = None if dtype in DTYPES else f"the dtype of the result is {dtype}"
    arguments = (qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, dtype)
    if not use_triton("dequantize_weight", smooth_factor, proj_down, proj_up, unsupported=reason):
        return dequantize_weight_reference(*arguments, rotation)
    if rotation is None:
        return _dequantize_weight_triton(*arguments)
    features = padded(smooth_factor.shape[0])
    ones, no_down, no_up = proj_up.new_ones(features), proj_up.new_empty(0, features), proj_up[:, :0]
    rotated = _dequantize_weight_triton(qweight, wscales, wtscale, ones, no_down, no_up, torch.float32)
    residual = rotate(rotated, rotation)[:, : smooth_factor.shape[0]] / smooth_factor.float()
    return torch.addmm(residual, proj_up.float(), proj_down.float()).to(dtype)


def dequantize_weight_reference(
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None,
    smooth_factor: Tensor, proj_down: Tensor, proj_up: Tensor, dtype: torch.dtype, rotation: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in PyTorch, in fp32, or in fp64 where `dtype` is; rounded once.

    The padding is removed at the end. Otherwise `torch.compile` on CPUs generates a loop over K with one scale per
    group, splits it into groups of G, and skips an incomplete last group (torch 2.13).
    """
    compute = torch.promote_types(dtype, torch.float32)
    features = smooth_factor.shape[0]
    padding = (0, padded(features) - features)
    residual = decode_weight(qweight, wscales, wtscale).to(compute)
    residual = residual if rotation is None else rotate(residual, rotation)
    residual = residual / F.pad(smooth_factor.to(compute), padding, value=1)
    weight = torch.addmm(residual, proj_up.to(compute), F.pad(proj_down.to(compute), padding))
    return weight[:, :features].to(dtype, memory_format=torch.contiguous_format)


@triton_operator(
    "dequantize_weight_forward(Tensor qweight, Tensor wscales, Tensor? wtscale, Tensor smooth_factor, "
    "Tensor proj_down, Tensor proj_up, ScalarType dtype) -> Tensor"
)
def _dequantize_weight_triton(qweight: Tensor, *parts: Any) -> Tensor:
    *_, smooth_factor, _, _, dtype = parts
    return smooth_factor.new_empty((qweight.shape[0], smooth_factor.shape[0]), dtype=dtype)
