"""Depthwise convolution, then a matrix per group of channels: programs sweep down strips of one group.

The strips are those of `glu_depthwise_conv`: a pixel, once loaded, serves all k x k taps from registers, and k rows of
sums are in flight. A finished row of all strips is one matrix, which tensor cores multiply by the matrix of the group.
Per bf16 element at k = 5: 2 bytes read, 2 written; 25 multiply-adds, and G more on tensor cores. Barely memory-bound.

The depthwise sums are fp32, and rounding them before the product would be a second rounding. In half precision they
are split into two bf16 tensors of 16 bits in total, and an fp16 matrix is split exactly into two: bf16 has the range
of fp32, the products are exact in fp32, and the contribution of a third bf16 tensor is far below the rounding of the
output. Otherwise the product is in fp32.

The gradient of the input is the reverse, in two kernels: the transposed matrix, which writes the gradient of d in the
wider dtype of gradient and weight, then the mirrored taps.
"""

# Triton extends tuples only by addition, which mypy rejects.
# ruff: noqa: RUF005
# mypy: disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.glu_depthwise_conv import INTERPRETED, place_strips, strip_rows


COLUMNS = 4  # joined in pairs below


def _launch_config(group_size: int) -> tuple[int, int]:
    """Strips and warps of a program: two channels per thread."""
    return 256 // group_size, 4


@triton.jit
def _load_matrix(p_weight, SPLIT: tl.constexpr):
    """The matrix in fp32 (`SPLIT` 0), in bf16 (1), or as a sum of two in bf16 (2)."""
    b_weight = tl.load(p_weight)
    if SPLIT == 0:
        b_parts = (b_weight.to(tl.float32),)
    elif SPLIT == 1:
        b_parts = (b_weight,)
    else:
        b_high = b_weight.to(tl.bfloat16)
        b_parts = (b_high, (b_weight.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16))
    return b_parts


@triton.jit
def _add_product(b_sum, b_x, b_y):
    """`sum + x y`, with x and y fp32 or bf16."""
    if INTERPRETED:  # it takes the bits of bf16 for integers
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def _multiply(b_d, b_matrix, SPLIT: tl.constexpr):
    """`[M, G]` times the matrix that `_load_matrix` returned, in fp32."""
    b_out = tl.zeros(b_d.shape, tl.float32)
    if SPLIT == 0:
        b_out = _add_product(b_out, b_d.to(tl.float32), b_matrix[0])
    else:
        b_high = b_d.to(tl.bfloat16)
        if b_d.dtype != tl.bfloat16:
            b_low = (b_d.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16)
            b_out = _add_product(b_out, b_low, b_matrix[0])
        if SPLIT == 2:
            b_out = _add_product(b_out, b_high, b_matrix[1])
        b_out = _add_product(b_out, b_high, b_matrix[0])
    return b_out


@triton.jit
def _add_row(b_sums, b_row, b_taps, D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds what a row of inputs contributes to the row of outputs of which K - D rows were missing."""
    b_out = ()
    for j in tl.static_range(COLUMNS):
        b_sum = b_sums[D * COLUMNS + j]
        for k in tl.static_range(K):
            b_sum += b_row[j + k] * b_taps[(K - 1 - D) * K + k]
        b_out = b_out + (b_sum,)
    return b_out


@triton.jit
def _strip_kernel(
    x_ptr, depthwise_ptr, pointwise_ptr, out_ptr,
    batch, height, width, rows,
    CHANNELS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The projection; or, without the matrix, the convolution with mirrored taps."""
    groups: tl.constexpr = CHANNELS // G
    pad: tl.constexpr = K // 2
    o_g = tl.arange(0, G)
    i_g = tl.program_id(0) % groups * G
    i_s = tl.program_id(0) // groups * STRIPS
    o_c = i_g + o_g[None, :]
    o_h, o_w, o_p = place_strips(i_s + tl.arange(0, STRIPS)[:, None], batch, height, width, rows, COLUMNS)

    b_taps = ()
    for i in tl.static_range(K * K):
        p_tap = depthwise_ptr + o_c * (K * K) + (K * K - 1 - i if pointwise_ptr is None else i)
        b_taps = b_taps + (tl.load(p_tap).to(tl.float32),)
    b_zero = tl.zeros([STRIPS, G], tl.float32)
    b_sums = (b_zero,) * (K * COLUMNS)
    p_x = x_ptr + (o_p - pad * width - pad) * CHANNELS + o_c
    if pointwise_ptr is not None:
        b_matrix = _load_matrix(pointwise_ptr + (i_g + o_g)[None, :] * G + o_g[:, None], SPLIT)
        # Other threads hold a finished row: the pixels of all strips below each other.
        o_m = tl.arange(0, STRIPS * COLUMNS)[:, None]
        o_h_out, o_w_out, o_p = place_strips(i_s + o_m // COLUMNS, batch, height, width, rows, COLUMNS)
        o_w_out += o_m % COLUMNS
        o_p += o_m % COLUMNS
    p_out = out_ptr + (o_p - (K - 1) * width) * CHANNELS + o_c

    for i in range(rows + K - 1):
        # Row i - pad of the strip is the last of K for output row i - K + 1.
        m_h = (o_h + i >= pad) & (o_h + i < height + pad)
        b_row = ()
        for j in tl.static_range(COLUMNS + K - 1):
            mask = m_h & (o_w + j >= pad) & (o_w + j < width + pad)
            b_row = b_row + (tl.load(p_x + j * CHANNELS, mask=mask, other=0.0).to(tl.float32),)
        b_done = _add_row(b_sums, b_row, b_taps, 0, K, COLUMNS)
        # The first rows have no output, and their products go nowhere: cheaper than a branch, which costs registers.
        i_out = i - (K - 1)
        if pointwise_ptr is None:
            for j in tl.static_range(COLUMNS):
                m_out = (o_h + i_out >= o_h) & (o_h + i_out < height) & (o_w + j < width)
                tl.store(p_out + j * CHANNELS, b_done[j], mask=m_out)
        else:
            # [STRIPS, G, column % 2, column // 2] to [STRIPS * COLUMNS, G], for one product.
            b_d = tl.join(tl.join(b_done[0], b_done[1]), tl.join(b_done[2], b_done[3]))
            b_d = b_d.permute(0, 3, 2, 1).reshape(STRIPS * COLUMNS, G)
            m_out = (o_h_out + i_out >= o_h_out) & (o_h_out + i_out < height) & (o_w_out < width)
            tl.store(p_out, _multiply(b_d, b_matrix, SPLIT), mask=m_out)
        b_new = ()
        for d in tl.static_range(1, K):
            b_new = b_new + _add_row(b_sums, b_row, b_taps, d, K, COLUMNS)
        b_sums = b_new + (b_zero,) * COLUMNS
        p_x += width * CHANNELS
        p_out += width * CHANNELS


@triton.jit
def _transposed_matrix_kernel(
    grad_ptr, pointwise_ptr, out_ptr, pixels,
    CHANNELS: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradient of d."""
    groups: tl.constexpr = CHANNELS // G
    o_g = tl.arange(0, G)
    i_g = tl.program_id(0) % groups * G
    o_p = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    o_x = o_p * CHANNELS + i_g + o_g[None, :]
    b_matrix = _load_matrix(pointwise_ptr + (i_g + o_g)[:, None] * G + o_g[None, :], SPLIT)
    b_grad = tl.load(grad_ptr + o_x, mask=o_p < pixels, other=0.0)
    tl.store(out_ptr + o_x, _multiply(b_grad, b_matrix, SPLIT), mask=o_p < pixels)


def _split(x: Tensor, pointwise: Tensor) -> int:
    """See `_load_matrix`."""
    if torch.float32 in (x.dtype, pointwise.dtype):
        return 0
    return 1 if pointwise.dtype == torch.bfloat16 else 2


def _launch_strips(x: Tensor, depthwise: Tensor, pointwise: Tensor | None, out: Tensor, group_size: int) -> None:
    batch, height, width, channels = x.shape
    strips, num_warps = _launch_config(group_size)
    across, groups = batch * triton.cdiv(width, COLUMNS), channels // group_size
    rows = strip_rows(across * groups, height, strips)
    _strip_kernel[(triton.cdiv(across * triton.cdiv(height, rows), strips) * groups,)](
        x, depthwise.contiguous(), pointwise, out, batch, height, width, rows,
        CHANNELS=channels, G=group_size, K=depthwise.shape[-1], COLUMNS=COLUMNS, STRIPS=strips,
        SPLIT=0 if pointwise is None else _split(x, pointwise), num_warps=num_warps, num_stages=1,
    )  # fmt: skip


def multiscale_projection_forward(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """`[B, h, w, C]` to the same shape, contiguous; see the reference."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_strips(x.contiguous(), depthwise, pointwise.contiguous(), out, pointwise.shape[1])
    return out


def multiscale_projection_backward(grad: Tensor, depthwise: Tensor, pointwise: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the input, `[B, h, w, C]`, in `dtype`."""
    wider = torch.promote_types(grad.dtype, depthwise.dtype)
    grad_d = torch.empty(grad.shape, dtype=wider, device=grad.device)
    grad_x = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    channels, group_size = pointwise.shape[:2]
    pixels = grad.numel() // channels
    block_p = 2048 // group_size
    _transposed_matrix_kernel[(triton.cdiv(pixels, block_p) * (channels // group_size),)](
        grad.contiguous(), pointwise.contiguous(), grad_d, pixels,
        CHANNELS=channels, G=group_size, BLOCK_P=block_p, SPLIT=_split(grad, pointwise), num_warps=4,
    )  # fmt: skip
    _launch_strips(grad_d, depthwise, None, grad_x, group_size)
    return grad_x
