"""Low-bit matrix product, low-rank up projection and bias of SVDQuant (arXiv 2411.05007, section 4.2).

    out = dequantize(codes) @ dequantize(qweight).T + low @ proj_up.T + bias

The first product depends on the format of the codes (see `quantize_lowrank.py`):

    int4, nvfp4   group scales on both sides (w4a4)
    int8          the weight becomes int8 with one scale a row, so that one integer product runs over all of K (w4a8)

Legend: M tokens, K input features, Kp = K padded, N output features, r rank.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import use_triton
from diffusers_sana.kernels.low_bit import (
    GROUP_SIZES,
    decode_e2m1,
    decode_weight,
    precision_of,
    requantize_rows,
    unpack_nibbles,
)


def lowbit_linear(
    codes: Tensor,
    scales: Tensor,
    low: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    proj_up: Tensor,
    bias: Tensor | None = None,
    *,
    activation_format: str,
) -> Tensor:
    """The product of quantized activations and a quantized weight, plus the 16-bit branch.

    Args:
        codes, scales, low: from `quantize_lowrank`.
        qweight, wscales, wtscale: the residual, as in `low_bit.py`; `[N, Kp/2]`, `[N, Kp/G]`, `[N]` or None.
        proj_up: `[N, r]`; its dtype is the output's.
        bias: `[N]`.
        activation_format: what `quantize_lowrank` was asked for: "int8" or the weight's own format.

    Returns:
        `[M, N]` in the dtype of `proj_up`.

    Raises:
        ValueError: codes whose format does not go with the weight's.
    """
    precision = precision_of(wscales)
    if activation_format not in ("int8", precision):
        raise ValueError(
            f"`activation_format` must be 'int8' or the weight's own format {precision!r}, got {activation_format!r}. "
            "Quantize the input for this weight."
        )
    unless = "there are no tokens" if codes.numel() == 0 else None
    if use_triton("lowbit_linear", low, proj_up, bias, unless=unless):
        return _lowbit_linear_triton(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, activation_format)
    arguments = (codes, scales, low, qweight, wscales, wtscale, proj_up, bias)
    return lowbit_linear_reference(*arguments, activation_format=activation_format)


def lowbit_linear_reference(
    codes: Tensor,
    scales: Tensor,
    low: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    proj_up: Tensor,
    bias: Tensor | None = None,
    *,
    activation_format: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formulas in PyTorch; `dtype=torch.float64` gives the gold standard."""
    if activation_format == "int8":
        weight, rows = requantize_rows(qweight, wscales, wtscale)
        out = (codes.to(dtype) @ weight.to(dtype).t()) * scales.to(dtype) * rows.to(dtype)
    else:
        group_size = GROUP_SIZES[activation_format]
        values = decode_e2m1(unpack_nibbles(codes, group_size)) if activation_format == "nvfp4" else codes
        groups = values.to(dtype).unflatten(-1, (-1, group_size)) * scales.to(dtype)[..., None]
        out = groups.flatten(-2) @ decode_weight(qweight, wscales, wtscale).to(dtype).t()
    out = out + low.to(dtype) @ proj_up.to(dtype).t()
    out = out if bias is None else out + bias.to(dtype)
    return out if dtype == torch.float64 else out.to(proj_up.dtype)


@torch.library.custom_op("diffusers_sana::lowbit_linear", mutates_args=())
def _lowbit_linear_triton(
    codes: Tensor,
    scales: Tensor,
    low: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    proj_up: Tensor,
    bias: Tensor | None,
    activation_format: str,
) -> Tensor:
    from diffusers_sana.kernels.triton.lowbit_linear import lowbit_linear_forward

    return lowbit_linear_forward(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, activation_format)


@_lowbit_linear_triton.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    low: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    proj_up: Tensor,
    bias: Tensor | None,
    activation_format: str,
) -> Tensor:
    return proj_up.new_empty((codes.shape[0], qweight.shape[0]))
