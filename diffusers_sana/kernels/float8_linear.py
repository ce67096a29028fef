"""The product of float8 layers with activations in float8 (f8a8), on `torch._scaled_mm`.

    s     = max|x / smooth| / 448                                       per token
    codes = e4m3(x / smooth / s)
    y     = (codes @ qweight.T) * s * wscales.T + (x @ proj_down.T) @ proj_up.T + bias

Format: FP8 Formats for Deep Learning, arXiv 2209.05433, E4M3. Other devices compute the same numbers in fp32.

Legend: M tokens, K input features, Kp = K padded, N output features, r rank.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import E4M3_MAX, decode_float8, pad_features, reciprocal
from diffusers_sana.kernels.rotation import rotate


MIN_CAPABILITY = (8, 9)  # the oldest NVIDIA architecture with float8 tensor cores
N_MULTIPLE = 16  # of the outputs of cuBLAS's product


@torch.compiler.assume_constant_result  # it asks the driver, which cannot be traced
def has_product(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 matrices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def float8_linear(
    hidden_states: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    rotation: Tensor | None = None,
) -> Tensor:
    """The layer's output.

    Args:
        hidden_states: `[M, K]`.
        qweight, wscales: as in `low_bit.py`; `[N, Kp]` and `[N]`.
        smooth_factor: `[K]`.
        proj_down, proj_up: `[r, K]` and `[N, r]`.
        bias: `[N]`.
        rotation: that of the layer, None if it is not rotated.

    Returns:
        `[M, N]` in the dtype of `hidden_states`.
    """
    smoothed = hidden_states.float() * reciprocal(smooth_factor)
    smoothed = pad_features(smoothed) if rotation is None else rotate(smoothed, rotation)
    scales = smoothed.abs().amax(-1, keepdim=True) / E4M3_MAX
    codes = (smoothed * reciprocal(scales)).to(torch.float8_e4m3fn)
    if has_product(codes.device) and len(codes) and len(qweight) % N_MULTIPLE == 0:
        product = _product(codes, qweight)
    else:
        product = codes.float() @ decode_float8(qweight).t()
    low = hidden_states @ proj_down.to(hidden_states.dtype).t() @ proj_up.to(hidden_states.dtype).t()
    out = torch.addcmul(low.float(), product * scales, wscales)
    return (out if bias is None else out + bias.float()).to(hidden_states.dtype)


def _product(codes: Tensor, qweight: Tensor) -> Tensor:
    """`codes @ qweight.T` on tensor cores, in fp32."""
    one = torch.ones((), device=codes.device)
    weight = qweight.view(torch.float8_e4m3fn)
    return torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
