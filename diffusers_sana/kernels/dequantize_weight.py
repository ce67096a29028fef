"""The 16-bit matrix that a quantized layer stands for (SVDQuant, arXiv 2411.05007, equation 5).

    weight = decode(qweight) / smooth + proj_up @ proj_down

`x @ weight.T` is what the layer computes when activations stay 16 bit (w4a16).

Legend: K input features, Kp = K padded, N output features, r rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import DTYPES, use_triton
from diffusers_sana.kernels.low_bit import decode_weight, padded


def dequantize_weight(
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """All parts of a quantized weight put together.

    Args:
        qweight, wscales, wtscale: the residual, as in `low_bit.py`; `[N, Kp/2]`, `[N, Kp/G]`, `[N]` or None.
        smooth_factor: `[K]`.
        proj_down, proj_up: `[r, K]` and `[N, r]`; r may be 0.
        dtype: of the result.

    Returns:
        `[N, K]`.
    """
    unless = None if dtype in DTYPES else f"the result is to be {dtype}"
    if use_triton("dequantize_weight", smooth_factor, proj_down, proj_up, unless=unless):
        arguments = (qweight, wscales, wtscale, smooth_factor, proj_down, proj_up)
        return _dequantize_weight_triton(*arguments, dtype)
    return dequantize_weight_reference(qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, dtype)


def dequantize_weight_reference(
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The formula in PyTorch, in fp32, or in fp64 where `dtype` is; rounded once.

    The padding stays until the end. If it were cut off before, `torch.compile` on CPUs would make a loop over K with
    one scale per group, split that into groups of G, and never reach a last group that is not whole (torch 2.13).
    """
    compute = torch.promote_types(dtype, torch.float32)
    features = smooth_factor.shape[0]
    padding = (0, padded(features) - features)
    residual = decode_weight(qweight, wscales, wtscale).to(compute) / F.pad(
        smooth_factor.to(compute), padding, value=1
    )
    weight = torch.addmm(residual, proj_up.to(compute), F.pad(proj_down.to(compute), padding))
    return weight[:, :features].to(dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("diffusers_sana::dequantize_weight", mutates_args=())
def _dequantize_weight_triton(
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    from diffusers_sana.kernels.triton.dequantize_weight import dequantize_weight_forward

    return dequantize_weight_forward(qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, dtype)


@_dequantize_weight_triton.register_fake
def _(
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return proj_up.new_empty((qweight.shape[0], smooth_factor.shape[0]), dtype=dtype)
