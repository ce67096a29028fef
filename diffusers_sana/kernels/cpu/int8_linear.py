"""The w4a8 and w8a8 products on x86 processors: oneDNN's 8-bit matrix product over weights kept in int8.

    out = dequantize( u8(x / smooth) @ int8(weight).T ) + (x @ proj_down.T) @ proj_up.T + bias

The results are those of `quantize_lowrank` (int8) and `lowbit_linear`. Unpacking 4 bits at every call would take as
long as the product, so a weight is kept in 8 bits, in the layout of oneDNN, from the first call on until its codes are
no longer used or `forget` is called. Processors without VNNI add pairs of 8-bit products in 16 bits, which can
overflow; there the weight has 63 levels instead of 127, which prevents it.

It is an operator of PyTorch, because `torch.compile` can trace neither oneDNN's layout nor the copies.

Rows are processed in blocks that stay in the cache, from the quantization to the rounded output.

Legend: M tokens, K input features, Kp = K padded, N output features, r rank.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffusers_sana._compat import cpu_has_vnni, has_int8_product
from diffusers_sana.kernels.dispatch import operator
from diffusers_sana.kernels.kept import Kept
from diffusers_sana.kernels.low_bit import pad_features, reciprocal, requantize_rows
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from diffusers_sana.kernels.rotation import rotate


BLOCK = 2**20  # elements of the output computed at a time: 4 MiB of fp32
MIN_ROWS = 64
ZERO_POINT = 128  # the 8-bit inputs are unsigned; oneDNN subtracts the offset


@dataclass
class PreparedWeight:
    """A weight in the layout of oneDNN.

    Attributes:
        packed: opaque.
        scales: `[N]`, fp32.
        zeros: `[N]`.
        up: `[N, r + 1]`, fp32: the up projection and the bias.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    up: Tensor


_PREPARED = Kept()


@torch.compiler.assume_constant_result  # which it cannot trace
def is_supported() -> bool:
    """Whether this processor and this build of PyTorch support the product."""
    return _is_supported()


@cache
def _is_supported() -> bool:
    return has_int8_product() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@cache
def levels() -> int:
    """The largest magnitude of an integer weight."""
    return 127 if cpu_has_vnni() else 63


def prepare(
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, proj_up: Tensor, bias: Tensor | None
) -> PreparedWeight:
    """Unpacks a weight and converts it to the layout of oneDNN. Arguments as in `lowbit_linear`."""
    codes, scales = requantize_rows(qweight, wscales, wtscale, levels())
    last = torch.zeros(codes.shape[0]) if bias is None else bias.float()
    return PreparedWeight(
        torch.ops.onednn.qlinear_prepack(codes, None),
        scales,
        torch.zeros(codes.shape[0], dtype=torch.int32),
        torch.cat([proj_up.float(), last[:, None]], dim=1),
    )


def is_prepared(qweight: Tensor) -> bool:
    """Whether an 8-bit copy of a weight is in memory."""
    return qweight in _PREPARED


def forget(qweight: Tensor) -> None:
    """Drops the 8-bit copy of a weight."""
    _PREPARED.drop(qweight)


def _empty_output(hidden_states: Tensor, qweight: Tensor, *parts: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], qweight.shape[0])


@operator(
    "int8_linear(Tensor hidden_states, Tensor qweight, Tensor wscales, Tensor? wtscale, Tensor smooth_factor, "
    "Tensor proj_down, Tensor proj_up, Tensor? bias, Tensor? rotation) -> Tensor",
    _empty_output,
)
def int8_linear(
    hidden_states: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    rotation: Tensor | None,
) -> Tensor:
    """The layer's output; arguments are positional.

    Args:
        hidden_states: `[M, K]`.
        qweight, wscales, wtscale, proj_up, bias: as in `lowbit_linear`.
        smooth_factor: `[K]`.
        proj_down: `[r, K]`.
        rotation: that of the layer, None if it is not rotated.

    Returns:
        `[M, N]` in the dtype of `hidden_states`.
    """
    weight = _PREPARED.get(prepare, qweight, wscales, wtscale, proj_up, bias)
    tokens, outputs = hidden_states.shape[0], weight.scales.shape[0]
    reciprocals, down, up = reciprocal(smooth_factor), proj_down.float().t(), weight.up.t()
    out = hidden_states.new_empty(tokens, outputs)
    rows = max(BLOCK // outputs, MIN_ROWS)
    for start in range(0, tokens, rows):
        block = hidden_states[start : start + rows].float()
        low = torch.cat([block @ down, block.new_ones(len(block), 1)], dim=1)
        smoothed = pad_features(block * reciprocals) if rotation is None else rotate(block * reciprocals, rotation)
        scales = smoothed.abs().amax(-1, keepdim=True) / 127
        codes = smoothed.mul_(reciprocal(scales)).round_().add_(ZERO_POINT).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, ZERO_POINT, weight.packed, weight.scales, weight.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out[start : start + rows] = product.mul_(scales).addmm_(low, up)
    return out


def int8_linear_reference(
    hidden_states: Tensor, qweight: Tensor, wscales: Tensor, wtscale: Tensor | None,
    smooth_factor: Tensor, proj_down: Tensor, proj_up: Tensor, bias: Tensor | None, rotation: Tensor | None,
) -> Tensor:  # fmt: skip
    """The formula in PyTorch, computed in float64 from the codes of the activations on; not rounded."""
    codes, scales, low = quantize_lowrank_reference(hidden_states, smooth_factor, proj_down, "int8", rotation)
    weight, rows = requantize_rows(qweight, wscales, wtscale, levels())
    out = (codes.double() @ weight.double().t()) * scales.double() * rows.double()
    out = out + low.double() @ proj_up.double().t()
    return out if bias is None else out + bias.double()
