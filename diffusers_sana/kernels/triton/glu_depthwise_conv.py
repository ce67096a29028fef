"""SiLU, depthwise 3x3 convolution and gate: programs sweep down strips of a few columns.

A strip is `COLUMNS` wide and `strip_rows` high. Its columns are separate tensors of the same threads, so that a pixel,
once loaded and activated, serves all nine taps from registers: (COLUMNS + 2) / COLUMNS loads and activations per
element. The strips of a program are adjacent and share their common columns through L1.

Per bf16 output: 4 bytes read, 2 written; 18 multiply-adds and, halo included, about 6 exponentials and reciprocals.
Their throughput (16 per cycle and multiprocessor) is the next limit after memory, which is the reason for `_sigmoids`.

The backward pass first writes the gradient of y, in the wider dtype of input and weight: in half precision this halves
the traffic of fp32, and the additional rounding averages out in the sums over taps and pixels. A second kernel reads
it together with the input and writes the gradient of the input and partial sums of the parameters' gradients, which
are added in a fixed order.
"""

# Triton extends tuples only by addition, which mypy rejects.
# ruff: noqa: RUF005
# mypy: disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from diffusers_sana._compat import triton_knobs


COLUMNS = 4  # even: sigmoids are taken in pairs
STRIPS = 4  # per program, one per warp
BLOCK_C = 64  # two a thread
MIN_PROGRAMS = 1024  # two rounds of what the largest GPUs hold at a time


def strip_rows(across: int, height: int, strips: int) -> int:
    """Rows of a strip: many, for those above and below are only its halo, but so that there are enough programs.

    `across` is the number of strips side by side, over the images of the batch and the blocks of channels too;
    `strips` is how many a program has.
    """
    rows = 32
    while rows > 4 and (rows >= 2 * height or across * triton.cdiv(height, rows) < MIN_PROGRAMS * strips):
        rows //= 2
    return rows


INTERPRETED = tl.constexpr(triton_knobs.runtime.interpret)  # the interpreter has no libdevice


@triton.jit
def _sigmoids(b_x, b_y, FAST: tl.constexpr):
    """sigmoid(x), sigmoid(y), sigmoid(-x), sigmoid(-y).

    A difference from one would lose the digits of sigmoid(-x) that the slope x * sigmoid(-x) needs. The bounds keep
    all products finite.

    With `FAST`, for half precision, the two share one reciprocal, and sigmoid(x) stops falling at x = -40, where silu
    is below 1e-15. That is good to a few units of fp32.
    """
    if not FAST:
        b_p, b_q = tl.exp(tl.minimum(-b_x, 80.0)), tl.exp(tl.minimum(-b_y, 80.0))
        b_s, b_t = 1.0 / (1.0 + b_p), 1.0 / (1.0 + b_q)
    else:
        b_x, b_y = tl.minimum(-b_x, 40.0), tl.minimum(-b_y, 40.0)
        if INTERPRETED:
            b_p, b_q = tl.exp(b_x), tl.exp(b_y)
            b_r = tl.rsqrt((1.0 + b_p) * (1.0 + b_q))
        else:
            # The same instructions without the cases of denormal numbers, which would double their number.
            b_p, b_q = libdevice.fast_expf(b_x), libdevice.fast_expf(b_y)
            b_r = libdevice.rsqrt((1.0 + b_p) * (1.0 + b_q))
        b_r *= b_r  # fewer instructions than a division
        b_s, b_t = (1.0 + b_q) * b_r, (1.0 + b_p) * b_r
    return b_s, b_t, b_p * b_s, b_q * b_t


@triton.jit
def place_strips(o_s, batch, height, width, strip_rows, COLUMNS: tl.constexpr):
    """First row, first column and first pixel, counted over the batch, of the strips numbered `o_s`."""
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, strip_rows)
    o_b = o_s // (across * down)
    # Strips past the last lie below their image, out of reach of the taps.
    o_h = tl.where(o_b < batch, (o_s // across) % down * strip_rows, height + strip_rows)
    o_w = o_s % across * COLUMNS
    return o_h, o_w, (o_b.to(tl.int64) * height + o_h) * width + o_w


@triton.jit
def _load_taps(weight_ptr, o_c, m_c):
    """The nine taps of each channel, `[1, BLOCK_C]` each."""
    b_taps = ()
    for i in tl.static_range(9):
        b_taps = b_taps + (tl.load(weight_ptr + o_c * 9 + i, mask=m_c, other=0.0).to(tl.float32),)
    return b_taps


@triton.jit
def _add_row(b_sums, b_row, b_taps, TAP_ROW: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds to the sums of a row of outputs what a row of inputs contributes."""
    b_out = ()
    for j in tl.static_range(COLUMNS):
        b_sum = b_sums[j]
        for k in tl.static_range(3):
            b_sum += b_row[j + k] * b_taps[3 * TAP_ROW + k]
        b_out = b_out + (b_sum,)
    return b_out


@triton.jit
def _gate_kernel(
    x_ptr, weight_ptr, bias_ptr, grad_ptr, out_ptr,
    batch, height, width, strip_rows,
    FEATURES: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The output, `[B, h, w, F]`; or, given its gradient, the gradient of y, `[B, h, w, 2F]`."""
    channel_blocks: tl.constexpr = (FEATURES + BLOCK_C - 1) // BLOCK_C
    o_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_c = o_c < FEATURES
    o_s = tl.program_id(0) // channel_blocks * STRIPS + tl.arange(0, STRIPS)[:, None]
    o_h, o_w, o_p = place_strips(o_s, batch, height, width, strip_rows, COLUMNS)

    b_taps_a = _load_taps(weight_ptr, o_c, m_c)
    b_taps_g = _load_taps(weight_ptr + 9 * FEATURES, o_c, m_c)
    b_bias_a = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    b_bias_g = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    if bias_ptr is not None:
        b_bias_a += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_bias_g += tl.load(bias_ptr + FEATURES + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_first_a, b_first_g = (b_bias_a,) * COLUMNS, (b_bias_g,) * COLUMNS
    b_upper_a, b_upper_g, b_lower_a, b_lower_g = b_first_a, b_first_g, b_first_a, b_first_g

    p_x = x_ptr + (o_p - width - 1) * (2 * FEATURES) + o_c
    for i in range(strip_rows + 2):
        # Row i - 1 of the strip is the last of three for output row i - 2.
        m_h = (o_h + i >= 1) & (o_h + i <= height) & m_c
        b_a, b_g = (), ()
        for j in tl.static_range(COLUMNS + 2):
            mask = m_h & (o_w + j >= 1) & (o_w + j <= width)
            b_x_a = tl.load(p_x + j * 2 * FEATURES, mask=mask, other=0.0).to(tl.float32)
            b_x_g = tl.load(p_x + (j * 2 + 1) * FEATURES, mask=mask, other=0.0).to(tl.float32)
            b_sigmoids = _sigmoids(b_x_a, b_x_g, FAST)
            b_a, b_g = b_a + (b_x_a * b_sigmoids[0],), b_g + (b_x_g * b_sigmoids[1],)
        b_upper_a = _add_row(b_upper_a, b_a, b_taps_a, 2, COLUMNS)
        b_upper_g = _add_row(b_upper_g, b_g, b_taps_g, 2, COLUMNS)
        if i >= 2:
            m_h = (o_h + i - 2 < height) & m_c
            o_out = o_p + (i - 2) * width
            for j in tl.static_range(0, COLUMNS, 2):
                b_sigmoids = _sigmoids(b_upper_g[j], b_upper_g[j + 1], FAST)
                for k in tl.static_range(2):
                    mask = m_h & (o_w + j + k < width)
                    b_y_a, b_gate = b_upper_a[j + k], b_upper_g[j + k] * b_sigmoids[k]
                    o_k = (o_out + j + k) * FEATURES + o_c
                    if grad_ptr is None:
                        tl.store(out_ptr + o_k, b_y_a * b_gate, mask=mask)
                    else:
                        b_grad = tl.load(grad_ptr + o_k, mask=mask, other=0.0).to(tl.float32)
                        p_y = out_ptr + (o_out + j + k) * (2 * FEATURES) + o_c
                        b_slope = b_sigmoids[k] + b_gate * b_sigmoids[2 + k]
                        tl.store(p_y, b_grad * b_gate, mask=mask)
                        tl.store(p_y + FEATURES, b_grad * b_y_a * b_slope, mask=mask)
        b_upper_a = _add_row(b_lower_a, b_a, b_taps_a, 1, COLUMNS)
        b_upper_g = _add_row(b_lower_g, b_g, b_taps_g, 1, COLUMNS)
        b_lower_a = _add_row(b_first_a, b_a, b_taps_a, 0, COLUMNS)
        b_lower_g = _add_row(b_first_g, b_g, b_taps_g, 0, COLUMNS)
        p_x += width * (2 * FEATURES)


@triton.jit
def _load_row(p_x, m_h, o_w, width, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """The pixels of one row of the strips, with one more on either side."""
    b_row = ()
    for j in tl.static_range(COLUMNS + 2):
        mask = m_h & (o_w + j >= 1) & (o_w + j <= width)
        b_row = b_row + (tl.load(p_x + j * CHANNELS, mask=mask, other=0.0).to(tl.float32),)
    return b_row


@triton.jit
def _input_kernel(
    grad_y_ptr, x_ptr, weight_ptr, grad_x_ptr, partials_ptr,
    batch, height, width, strip_rows,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradient of the input; and of the taps and the bias the program's part, `[programs, 10, 2F]`."""
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    o_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_c = o_c < CHANNELS
    i_s = tl.program_id(0) // channel_blocks
    o_s = i_s * STRIPS + tl.arange(0, STRIPS)[:, None]
    o_h, o_w, o_p = place_strips(o_s, batch, height, width, strip_rows, COLUMNS)

    b_taps = _load_taps(weight_ptr, o_c, m_c)
    b_partials = (tl.zeros([STRIPS, BLOCK_C], tl.float32),) * 10
    p_y = grad_y_ptr + (o_p - width - 1) * CHANNELS + o_c
    b_above = _load_row(p_y, (o_h >= 1) & (o_h <= height) & m_c, o_w, width, CHANNELS, COLUMNS)
    p_y += width * CHANNELS
    b_here = _load_row(p_y, (o_h < height) & m_c, o_w, width, CHANNELS, COLUMNS)
    o_x = o_p * CHANNELS + o_c
    for i in range(strip_rows):
        p_y += width * CHANNELS
        b_below = _load_row(p_y, (o_h + i + 1 < height) & m_c, o_w, width, CHANNELS, COLUMNS)
        b_rows = b_below + b_here + b_above  # the order of the taps: the first looks up, so from below it is seen
        m_h = (o_h + i < height) & m_c
        for j in tl.static_range(0, COLUMNS, 2):
            b_x = ()
            for k in tl.static_range(2):
                p_x = x_ptr + o_x + (j + k) * CHANNELS
                b_x = b_x + (tl.load(p_x, mask=m_h & (o_w + j + k < width), other=0.0).to(tl.float32),)
            b_sigmoids = _sigmoids(b_x[0], b_x[1], FAST)
            for k in tl.static_range(2):
                b_silu = b_x[k] * b_sigmoids[k]
                b_grad = tl.zeros([STRIPS, BLOCK_C], tl.float32)
                b_new = ()
                for t in tl.static_range(9):
                    b_y = b_rows[t // 3 * (COLUMNS + 2) + j + k + 2 - t % 3]
                    b_grad += b_y * b_taps[t]
                    b_new = b_new + (b_partials[t] + b_y * b_silu,)
                b_partials = b_new + (b_partials[9] + b_here[j + k + 1],)
                b_grad *= b_sigmoids[k] + b_silu * b_sigmoids[2 + k]
                tl.store(grad_x_ptr + o_x + (j + k) * CHANNELS, b_grad, mask=m_h & (o_w + j + k < width))
        b_above, b_here = b_here, b_below
        o_x += width * CHANNELS
    for t in tl.static_range(10):
        p_partial = partials_ptr + (i_s.to(tl.int64) * 10 + t) * CHANNELS + o_c
        tl.store(p_partial, tl.sum(b_partials[t], axis=0)[None, :], mask=m_c)


def _grid(x: Tensor, channels: int) -> tuple[int, int, int]:
    """Rows of a strip, programs for one block of channels, blocks of channels."""
    batch, height, width, _ = x.shape
    channel_blocks = triton.cdiv(channels, BLOCK_C)
    across = batch * triton.cdiv(width, COLUMNS)
    rows = strip_rows(across * channel_blocks, height, STRIPS)
    return rows, triton.cdiv(across * triton.cdiv(height, rows), STRIPS), channel_blocks


def _launch_gate(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None, out: Tensor) -> None:
    features = x.shape[-1] // 2
    rows, programs, channel_blocks = _grid(x, features)
    _gate_kernel[(programs * channel_blocks,)](
        x, weight, bias, grad, out, *x.shape[:3], rows,
        FEATURES=features, BLOCK_C=BLOCK_C, COLUMNS=COLUMNS, STRIPS=STRIPS,
        FAST=x.dtype != torch.float32, num_warps=STRIPS,
    )  # fmt: skip


def glu_depthwise_conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[B, h, w, 2F]` to `[B, h, w, F]`, contiguous; see the reference."""
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    _launch_gate(x.contiguous(), weight.contiguous(), bias, None, out)
    return out


def glu_depthwise_conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the input `[B, h, w, 2F]`, and of taps and bias `[10, 2F]` in fp32."""
    x, weight = x.contiguous(), weight.contiguous()
    grad_y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_gate(x, weight, bias, grad.contiguous(), grad_y)
    channels = x.shape[-1]
    rows, programs, channel_blocks = _grid(x, channels)
    partials = torch.empty((programs, 10, channels), dtype=torch.float32, device=x.device)
    _input_kernel[(programs * channel_blocks,)](
        grad_y, x, weight, grad_x, partials, *x.shape[:3], rows,
        CHANNELS=channels, BLOCK_C=BLOCK_C, COLUMNS=COLUMNS, STRIPS=STRIPS,
        FAST=x.dtype != torch.float32, num_warps=STRIPS,
    )  # fmt: skip
    return grad_x, partials.sum(dim=0)
