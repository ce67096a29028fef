"""The w4a8 product of SVDQuant on x86 processors: oneDNN's 8-bit matrix product over weights kept in int8.

    out = dequantize( u8(x / smooth) @ int8(weight).T ) + (x @ proj_down.T) @ proj_up.T + bias

The results are those of `quantize_lowrank` (int8) and `lowbit_linear`. Unpacking 4 bits at every call would take as
long as the product, so `prepare` keeps the weight in 8 bits, in the layout of oneDNN. Processors without VNNI add
pairs of 8-bit products in 16 bits, which can overflow; there the weight has 63 levels instead of 127, which prevents
it.

Rows are processed in blocks that stay in the cache, from the quantization to the rounded output.

Legend: M tokens, K input features, Kp = K padded, N output features, r rank.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffusers_sana._compat import cpu_has_vnni, has_int8_product
from diffusers_sana.kernels.low_bit import nonzero, pad_features, requantize_rows
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


@cache
def is_supported() -> bool:
    """Whether this processor and this build of PyTorch support the product."""
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


def int8_linear(
    hidden_states: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    weight: PreparedWeight,
    rotation: Tensor | None = None,
) -> Tensor:
    """The layer's output.

    Args:
        hidden_states: `[M, K]`.
        smooth_factor: `[K]`.
        proj_down: `[r, K]`.
        weight: from `prepare`.
        rotation: that of the layer, None if it is not rotated.

    Returns:
        `[M, N]` in the dtype of `hidden_states`.
    """
    tokens, outputs = hidden_states.shape[0], weight.scales.shape[0]
    smooth, down, up = smooth_factor.float(), proj_down.float().t(), weight.up.t()
    out = hidden_states.new_empty(tokens, outputs)
    rows = max(BLOCK // outputs, MIN_ROWS)
    for start in range(0, tokens, rows):
        block = hidden_states[start : start + rows].float()
        low = torch.cat([block @ down, block.new_ones(len(block), 1)], dim=1)
        smoothed = pad_features(block / smooth) if rotation is None else rotate(block / smooth)
        scales = smoothed.abs().amax(-1, keepdim=True) / 127
        codes = smoothed.div_(nonzero(scales)).round_().add_(ZERO_POINT).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, ZERO_POINT, weight.packed, weight.scales, weight.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out[start : start + rows] = product.mul_(scales).addmm_(low, up)
    return out


def int8_linear_reference(
    hidden_states: Tensor, qweight: Tensor, wscales: Tensor, wtscale: Tensor | None,
    smooth_factor: Tensor, proj_down: Tensor, proj_up: Tensor, bias: Tensor | None, rotation: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in PyTorch, computed in float64 from the codes of the activations on; not rounded."""
    codes, scales, low = quantize_lowrank_reference(hidden_states, smooth_factor, proj_down, "int8", rotation)
    weight, rows = requantize_rows(qweight, wscales, wtscale, levels())
    out = (codes.double() @ weight.double().t()) * scales.double() * rows.double()
    out = out + low.double() @ proj_up.double().t()
    return out if bias is None else out + bias.double()
