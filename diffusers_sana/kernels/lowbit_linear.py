"""Low-bit matrix product, low-rank up projection and bias of SVDQuant (arXiv 2411.05007, section 4.2).

    out = dequantize(codes) @ dequantize(qweight).T + low @ proj_up.T + bias

With the kernel mode of another package its products are used for int4 and nvfp4, see `external.py`.

The first product depends on the format of the codes (see `quantize_lowrank.py`):

    int4, nvfp4   group scales on both sides (w4a4)
    int8          the weight has one scale per row, so one integer product runs over K: an int8 weight as it is stored
                  (w8a8), a 4-bit weight converted to int8 (w4a8)

        dequantize(codes) @ dequantize(qweight).T = (codes @ qweight.T) * scales * wscales.T

    (scales of tokens and of output features, as in LLM.int8(), arXiv 2208.07339, "vector-wise quantization", and
    SmoothQuant, arXiv 2211.10438).

On a GPU a 4-bit weight is converted to int8 at each call with many tokens, or, with `keep_int8`, once: then the weight
takes three times its memory.

Legend: M tokens, K input features, Kp = K padded, N output features, r rank.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import current_kernel_mode, operator, triton_operator, use_triton
from diffusers_sana.kernels.external import PRODUCTS, external_product
from diffusers_sana.kernels.kept import Kept
from diffusers_sana.kernels.low_bit import (
    GROUP_SIZES,
    decode_e2m1,
    decode_weight,
    precision_of,
    requantize_rows,
    unpack_nibbles,
)


ROOM = 4  # an int8 copy is kept where so many times its size is free

_INT8 = Kept()


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
    keep_int8: bool = False,
) -> Tensor:
    """The product of quantized activations and a quantized weight, plus the 16-bit branch.

    Args:
        codes, scales, low: from `quantize_lowrank`.
        qweight, wscales, wtscale: the residual, as in `low_bit.py`; `[N, Kp/2]`, `[N, Kp/G]`, `[N]` or None, for int8
            `[N, Kp]`, `[N]`, None.
        proj_up: `[N, r]`; its dtype is the output's.
        bias: `[N]`.
        activation_format: of `quantize_lowrank`: "int8" or the format of the weight.
        keep_int8: keep an int8 copy of a 4-bit weight from the first product with int8 codes on, where a GPU has room
            for it, until the weight changes or `kept.forget` is called. Same bits, less time.

    Returns:
        `[M, N]` in the dtype of `proj_up`.

    Raises:
        ValueError: another format.
    """
    precision = precision_of(wscales)
    if activation_format not in ("int8", precision):
        raise ValueError(
            f"`activation_format` must be 'int8' or the weight's own format {precision!r}, got {activation_format!r}. "
            "Quantize the input for this weight."
        )
    reason = "there are no tokens" if codes.numel() == 0 else None
    arguments = (codes, scales, low, qweight, wscales, wtscale, proj_up, bias)
    package = current_kernel_mode()
    if reason is None and (package, activation_format) in PRODUCTS:
        return _external_linear(*arguments, activation_format, package)
    if use_triton("lowbit_linear", low, proj_up, bias, unsupported=reason):
        if keep_int8 and activation_format == "int8" and precision != "int8":
            return _kept_int8_linear(*arguments)
        return _lowbit_linear_triton(*arguments, activation_format)
    return lowbit_linear_reference(*arguments, activation_format=activation_format)


def lowbit_linear_reference(
    codes: Tensor, scales: Tensor, low: Tensor,
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, proj_up: Tensor, bias: Tensor | None = None,
    *, activation_format: str, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The formulas in PyTorch; `dtype=torch.float64` gives the reference result."""
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


@triton_operator(
    "lowbit_linear_forward(Tensor codes, Tensor scales, Tensor low, Tensor qweight, Tensor wscales, Tensor? wtscale, "
    "Tensor proj_up, Tensor? bias, str activation_format) -> Tensor"
)
def _lowbit_linear_triton(codes: Tensor, scales: Tensor, low: Tensor, qweight: Tensor, *parts: Any) -> Tensor:
    _, _, proj_up, *_ = parts
    return proj_up.new_empty((codes.shape[0], qweight.shape[0]))


def _empty_output(codes: Tensor, scales: Tensor, low: Tensor, qweight: Tensor, *parts: Any) -> Tensor:
    return parts[2].new_empty((codes.shape[0], qweight.shape[0]))


@operator(
    "kept_int8_linear(Tensor codes, Tensor scales, Tensor low, Tensor qweight, Tensor wscales, Tensor? wtscale, "
    "Tensor proj_up, Tensor? bias) -> Tensor",
    _empty_output,
    "CompositeExplicitAutograd",
)
def _kept_int8_linear(
    codes: Tensor, scales: Tensor, low: Tensor,
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, proj_up: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """`lowbit_linear` of int8 codes with the int8 copy of a 4-bit weight; itself without room for a copy."""
    from diffusers_sana.kernels.triton.lowbit_linear import MAX_PACKED_TOKENS, lowbit_linear_forward

    if len(codes) <= MAX_PACKED_TOKENS:
        return lowbit_linear_forward(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, "int8")
    weight, rows = _INT8.get(_copy_if_there_is_room, qweight, wscales, wtscale)
    if weight is None:
        return lowbit_linear_forward(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, "int8")
    return lowbit_linear_forward(codes, scales, low, weight, rows, None, proj_up, bias, "int8")


@operator(
    "external_linear(Tensor codes, Tensor scales, Tensor low, Tensor qweight, Tensor wscales, Tensor? wtscale, "
    "Tensor proj_up, Tensor? bias, str activation_format, str package) -> Tensor",
    _empty_output,
    "CompositeExplicitAutograd",
)
def _external_linear(*arguments: Any) -> Tensor:
    """`lowbit_linear` with the product of another package; itself where that is not possible."""
    *tensors, activation_format, package = arguments
    reference = partial(lowbit_linear_reference, activation_format=activation_format)
    out = external_product(package, activation_format, reference, *tensors)
    if out is not None:
        return out
    _, _, low, _, _, _, proj_up, bias = tensors
    if use_triton("lowbit_linear", low, proj_up, bias):
        return _lowbit_linear_triton(*tensors, activation_format)
    return reference(*tensors)


def _copy_if_there_is_room(
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The weight as int8 with one scale per row, or None twice."""
    from diffusers_sana.kernels.triton.requantize_rows import requantize_rows as requantize

    if _free_bytes(qweight.device) < ROOM * 2 * qweight.numel():
        return None, None
    return requantize(qweight, wscales, wtscale)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved
