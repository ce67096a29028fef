"""Quantization and down projection: each program reads a few rows, in blocks along K, for both.

One scale per token (int8) needs the largest magnitude of the row first: a pass of its own over the rows, which are in
L2 afterwards. Per bf16 element: 2 bytes read, 1 or 1/2 written; 2 r FLOPs on tensor cores. Memory-bound at r = 32.
Each program reads the whole projection from L2.

Smoothing factors and scales are applied as reciprocals. Those of scales are approximate on a GPU, to two units
in the last place: a number half way between two codes may be rounded to the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.low_bit import decode_scales, encode_float, round_to_int
from diffusers_sana.kernels.triton.rows import as_rows


PROGRAMS = 512  # about four for each multiprocessor of the largest GPUs


def _launch_config(tokens: int, rank: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows, columns and ranks of a block, and warps.

    Twice the rows where that leaves enough programs. A block of the projection has at most 16 KiB. A rank that is too
    large for the registers of one program is shared among several, of which the first quantizes. Eight warps share a
    block of twice the rows, and any block where programs are so few that four would leave multiprocessors waiting.
    """
    programs = triton.cdiv(tokens, 16)
    block_r = min(max(16, triton.next_power_of_2(rank)), 256 // itemsize)
    block_k = min(512, 16384 // block_r) // itemsize
    if programs >= 2 * PROGRAMS:
        return 32, block_k, block_r, 8
    return 16, block_k, block_r, 4 if programs >= PROGRAMS // 2 else 8


@triton.jit
def _reciprocal(b_scales):
    """0 for scales so small that theirs is infinite: what they scale becomes 0."""
    return 1.0 / tl.where(b_scales < 1e-37, float("inf"), b_scales)


@triton.jit
def _store_groups(
    b_x, codes_ptr, scales_ptr, o_m, start, m_m, padded,
    G: tl.constexpr, IS_NVFP4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a block of groups."""
    b_groups = b_x.reshape(BLOCK_M, BLOCK_K // G, G)
    b_scales = tl.div_rn(tl.max(tl.abs(b_groups), axis=2), 6.0 if IS_NVFP4 else 7.0)
    o_g = start // G + tl.arange(0, BLOCK_K // G)
    p_scales = scales_ptr + o_m[:, None] * (padded // G) + o_g[None, :]
    m_scales = m_m[:, None] & (o_g < padded // G)[None, :]
    if IS_NVFP4:
        b_scales = encode_float(tl.minimum(b_scales, 448.0), 3, 7).to(tl.uint8)
        tl.store(p_scales, b_scales, mask=m_scales)
        b_scaled = b_groups * _reciprocal(decode_scales(b_scales))[:, :, None]
        b_codes = tl.minimum(encode_float(tl.abs(b_scaled), 1, 1), 7).to(tl.uint8)
        b_codes |= (b_scaled.to(tl.uint32, bitcast=True) >> 31 << 3).to(tl.uint8)
        b_low, b_high = tl.split(b_codes.reshape(BLOCK_M, BLOCK_K // G, 2, G // 2).permute(0, 1, 3, 2))
        o_c = start // 2 + tl.arange(0, BLOCK_K // 2)
        b_packed = (b_low | (b_high << 4)).reshape(BLOCK_M, BLOCK_K // 2)
        m_codes = m_m[:, None] & (o_c < padded // 2)[None, :]
        tl.store(codes_ptr + o_m[:, None] * (padded // 2) + o_c[None, :], b_packed, mask=m_codes)
    else:
        tl.store(p_scales, b_scales, mask=m_scales)
        b_codes = round_to_int(b_groups * _reciprocal(b_scales)[:, :, None]).to(tl.int8)
        o_c = start + tl.arange(0, BLOCK_K)
        m_codes = m_m[:, None] & (o_c < padded)[None, :]
        tl.store(codes_ptr + o_m[:, None] * padded + o_c[None, :], b_codes.reshape(BLOCK_M, BLOCK_K), mask=m_codes)


@triton.jit
def _smooth(b_x, reciprocals_ptr, o_k, features, HAS_SMOOTH: tl.constexpr):
    b_smoothed = b_x.to(tl.float32)
    if HAS_SMOOTH:
        b_smoothed *= tl.load(reciprocals_ptr + o_k, mask=o_k < features, other=0.0)[None, :]
    return b_smoothed


@triton.jit
def _row_scales(
    p_x, reciprocals_ptr, o_b, m_m, features,
    HAS_SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of each row / 127. It is reduced at the end: until then each thread has its own."""
    b_largest = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, features, BLOCK_K, num_stages=4):
        o_k = start + o_b
        b_x = tl.load(p_x + start, mask=m_m[:, None] & (o_k < features)[None, :], other=0.0)
        b_largest = tl.maximum(b_largest, tl.abs(_smooth(b_x, reciprocals_ptr, o_k, features, HAS_SMOOTH)))
    return tl.div_rn(tl.max(b_largest, axis=1), 127.0)


@triton.jit
def _quantize_lowrank_kernel(
    x_ptr, reciprocals_ptr, down_ptr, codes_ptr, scales_ptr, low_ptr,
    tokens, features, padded, rank, stride_x,
    FORMAT: tl.constexpr, HAS_SMOOTH: tl.constexpr, HAS_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    is_first = tl.program_id(1) == 0
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_b = tl.arange(0, BLOCK_K)
    m_m, m_r = o_m < tokens, o_r < rank
    p_x = x_ptr + o_m[:, None] * stride_x + o_b[None, :]
    p_down = down_ptr + o_r[None, :].to(tl.int64) * features + o_b[:, None]
    b_factors = tl.zeros([BLOCK_M], tl.float32)
    if FORMAT == "int8" and is_first:
        b_scales = _row_scales(p_x, reciprocals_ptr, o_b, m_m, features, HAS_SMOOTH, BLOCK_M, BLOCK_K)
        tl.store(scales_ptr + o_m, b_scales, mask=m_m)
        b_factors = _reciprocal(b_scales)
    b_low = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    # The next block is loaded into registers. Loaded where both use it, it would come through a buffer in shared
    # memory whose rows start in the same bank: the reads of the matrix product would conflict eight ways.
    b_next = tl.load(p_x, mask=m_m[:, None] & (o_b < features)[None, :], other=0.0)
    for start in tl.range(0, padded, BLOCK_K, num_stages=3):
        o_k = start + o_b
        b_x = b_next
        b_next = tl.load(p_x + start + BLOCK_K, mask=m_m[:, None] & (o_k + BLOCK_K < features)[None, :], other=0.0)
        if HAS_RANK:
            b_down = tl.load(p_down + start, mask=(o_k < features)[:, None] & m_r[None, :], other=0.0)
            if b_x.dtype == b_down.dtype:
                b_low = tl.dot(b_x, b_down, b_low, input_precision="ieee")
            else:
                b_low = tl.dot(b_x.to(tl.float32), b_down.to(tl.float32), b_low, input_precision="ieee")
        b_smoothed = _smooth(b_x, reciprocals_ptr, o_k, features, HAS_SMOOTH)
        if is_first:
            if FORMAT == "int8":
                b_codes = round_to_int(b_smoothed * b_factors[:, None]).to(tl.int8)
                m_codes = m_m[:, None] & (o_k < padded)[None, :]
                tl.store(codes_ptr + o_m[:, None] * padded + o_k[None, :], b_codes, mask=m_codes)
            elif FORMAT == "int4":
                _store_groups(b_smoothed, codes_ptr, scales_ptr, o_m, start, m_m, padded, 64, False, BLOCK_M, BLOCK_K)
            else:
                _store_groups(b_smoothed, codes_ptr, scales_ptr, o_m, start, m_m, padded, 16, True, BLOCK_M, BLOCK_K)
    if HAS_RANK:
        tl.store(low_ptr + o_m[:, None] * rank + o_r[None, :], b_low, mask=m_m[:, None] & m_r[None, :])


def quantize_lowrank_forward(
    x: Tensor, reciprocals: Tensor | None, down: Tensor, activation_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and low, contiguous; see the reference. `reciprocals`: of the smoothing factors, fp32."""
    (tokens, features), rank = x.shape, down.shape[0]
    padded = 64 * triton.cdiv(features, 64)
    is_nvfp4 = activation_format == "nvfp4"
    codes = x.new_empty((tokens, padded // 2 if is_nvfp4 else padded), dtype=torch.uint8 if is_nvfp4 else torch.int8)
    groups = {"int8": 1, "int4": padded // 64, "nvfp4": padded // 16}[activation_format]
    scales = x.new_empty((tokens, groups), dtype=torch.uint8 if is_nvfp4 else torch.float32)
    low = x.new_empty((tokens, rank), dtype=torch.float32)
    x = as_rows(x)
    itemsize = x.itemsize if x.dtype == down.dtype else 4
    block_m, block_k, block_r, warps = _launch_config(tokens, rank, itemsize)
    _quantize_lowrank_kernel[(triton.cdiv(tokens, block_m), max(1, triton.cdiv(rank, block_r)))](
        x, reciprocals, down.contiguous(), codes, scales, low,
        tokens, features, padded, rank, x.stride(0),
        FORMAT=activation_format, HAS_SMOOTH=reciprocals is not None, HAS_RANK=rank > 0,
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=warps,
    )  # fmt: skip
    return codes, scales.view(torch.float8_e4m3fn) if is_nvfp4 else scales, low
