"""Product of low-bit matrices, transposed: each program computes output features (rows) of some tokens (columns).

A 4-bit weight is the left operand, which tensor cores can read from registers, where it is unpacked. Packing is
planar, so low and high nibbles are two products with two strips of K. By the format of the activations:

    int4    8-bit products of length 64; each sum is scaled by its two group scales (4 operations per output and group)
    int8    the weight as int8 with one scale per row, as which it may be stored; one 32-bit sum over K, scaled once
    nvfp4   block-scaled products in 4 bits where supported; else in fp16, which represents every code times its scale

Converting 4 bits to int8 takes about ten instructions, the time of a hundred products or more on tensor cores. So a
4-bit weight is converted in registers if one program has all tokens, and otherwise beforehand, in memory: a separate
pass over the weight, followed by a plain 8-bit product.

The second to last step is the low-rank branch. Its input is fp32; tensor cores round it to 11 bits, the precision of
fp16, if the output is in half precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.low_bit import (
    architecture,
    as_bits,
    decode_e2m1,
    decode_e4m3,
    expand_groups,
    first_halves,
)
from diffusers_sana.kernels.triton.requantize_rows import multipliers, requantize, requantize_rows, row_scales


GROUPED = 8  # blocks of tokens whose programs run together, so that they share weights through L2
BLOCK_R = 32
PROGRAMS = 512  # number of programs from which larger blocks still fill the largest GPUs
MAX_PACKED_TOKENS = 64  # per program, so that a weight is unpacked once
NVFP4_ARCHITECTURES = (100, 103, 120, 121)


def _launch_config(
    tokens: int, features: int, outputs: int, activation_format: str, is_packed: bool, precision: str, target: int
) -> tuple[int, int, int, dict[str, int]]:
    """Output features, tokens and columns of a block; warps and stages.

    Blocks are smaller if registers also hold codes to be decoded, or fp32 operands.
    """
    block_m, block_k = min(max(16, triton.next_power_of_2(tokens)), 128), 128 if features % 128 == 0 else 64
    stages = 3 if target else 2
    has_nvfp4 = activation_format == "nvfp4" and target in NVFP4_ARCHITECTURES
    if is_packed and not has_nvfp4:
        block_k = block_k if activation_format == "int8" else 64
        return 64, min(block_m, 64), block_k, {"num_warps": 4, "num_stages": stages}
    if target and precision == "ieee":
        return 64, min(block_m, 64), block_k, {"num_warps": 4, "num_stages": stages}
    if target == 90 and triton.cdiv(tokens, 256) * triton.cdiv(outputs, 128) >= PROGRAMS:
        return 128, 256, block_k, {"num_warps": 8, "num_stages": stages}
    return 128, block_m, block_k, {"num_warps": 8 if block_m == 128 else 4, "num_stages": stages}


@triton.jit
def _int4_product(codes_ptr, scales_ptr, qweight_ptr, wscales_ptr, o_m, o_n, features):
    """int8 `[M, K]` with scales in fp32, times int4."""
    o_k = tl.arange(0, 32)
    o_codes = o_m[None, :] * features + o_k[:, None]
    o_weight = o_n[:, None] * (features // 2) + o_k[None, :]
    o_scales, o_wscales = o_m * (features // 64), o_n * (features // 64)
    b_out = tl.zeros([o_n.shape[0], o_m.shape[0]], tl.float32)
    for _ in range(features // 64):
        b_weight = tl.load(qweight_ptr + o_weight).to(tl.int8, bitcast=True)
        b_sum = tl.dot((b_weight << 4) >> 4, tl.load(codes_ptr + o_codes), out_dtype=tl.int32)
        b_sum = tl.dot(b_weight >> 4, tl.load(codes_ptr + 32 + o_codes), b_sum, out_dtype=tl.int32)
        b_scales = tl.load(scales_ptr + o_scales)[None, :]
        b_out += b_sum.to(tl.float32) * (tl.load(wscales_ptr + o_wscales).to(tl.float32)[:, None] * b_scales)
        codes_ptr += 64
        qweight_ptr += 32
        scales_ptr += 1
        wscales_ptr += 1
    return b_out


@triton.jit
def _int8_product(codes_ptr, weight_ptr, o_m, o_n, features, BLOCK_K: tl.constexpr):
    """int8 `[M, K]` times int8."""
    o_k = tl.arange(0, BLOCK_K)
    o_codes = o_m[None, :] * features + o_k[:, None]
    o_weight = o_n[:, None] * features + o_k[None, :]
    b_sum = tl.zeros([o_n.shape[0], o_m.shape[0]], tl.int32)
    for _ in range(features // BLOCK_K):
        b_sum = tl.dot(tl.load(weight_ptr + o_weight), tl.load(codes_ptr + o_codes), b_sum, out_dtype=tl.int32)
        codes_ptr += BLOCK_K
        weight_ptr += BLOCK_K
    return b_sum


@triton.jit
def _packed_int8_product(
    codes_ptr, qweight_ptr, wscales_ptr, b_rows, o_m, o_n, features, G: tl.constexpr, BLOCK_K: tl.constexpr
):
    """int8 `[M, K]` times int4 or e2m1 as integers of their row."""
    o_codes = o_m[None, :] * features + first_halves(BLOCK_K, G)[:, None]
    o_packed = o_n[:, None] * (features // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    o_wscales = o_n[:, None] * (features // G) + tl.arange(0, BLOCK_K // G)[None, :]
    b_sum = tl.zeros([o_n.shape[0], o_m.shape[0]], tl.int32)
    for _ in range(features // BLOCK_K):
        b_packed = tl.load(qweight_ptr + o_packed)
        b_multipliers = multipliers(tl.load(wscales_ptr + o_wscales), b_rows, G // 2)
        b_low = requantize(b_packed & 15, b_multipliers, G == 16)
        b_sum = tl.dot(b_low, tl.load(codes_ptr + o_codes), b_sum, out_dtype=tl.int32)
        b_high = requantize(b_packed >> 4, b_multipliers, G == 16)
        b_sum = tl.dot(b_high, tl.load(codes_ptr + G // 2 + o_codes), b_sum, out_dtype=tl.int32)
        codes_ptr += BLOCK_K
        qweight_ptr += BLOCK_K // 2
        wscales_ptr += BLOCK_K // G
    return b_sum


@triton.jit
def _nvfp4_product(
    codes_ptr, scales_ptr, qweight_ptr, wscales_ptr, o_m, o_n, features,
    HAS_NVFP4: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """e2m1 `[M, K]` times e2m1, both with e4m3 scales.

    Planar packing orders the elements of a group in another way than the hardware does, but both operands alike.
    """
    o_j, o_g = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 16)
    o_codes = o_m[None, :] * (features // 2) + o_j[:, None]
    o_scales = o_m[:, None] * (features // 16) + o_g[None, :]
    o_weight = o_n[:, None] * (features // 2) + o_j[None, :]
    o_wscales = o_n[:, None] * (features // 16) + o_g[None, :]
    b_out = tl.zeros([o_n.shape[0], o_m.shape[0]], tl.float32)
    for _ in range(features // BLOCK_K):
        b_codes, b_weight = tl.load(codes_ptr + o_codes), tl.load(qweight_ptr + o_weight)
        b_scales, b_wscales = tl.load(scales_ptr + o_scales), tl.load(wscales_ptr + o_wscales)
        if HAS_NVFP4:
            b_scales = b_scales.to(tl.float8e4nv, bitcast=True)
            b_wscales = b_wscales.to(tl.float8e4nv, bitcast=True)
            b_out = tl.dot_scaled(b_weight, b_wscales, "e2m1", b_codes, b_scales, "e2m1", b_out)
        else:
            b_multipliers = tl.trans(expand_groups(decode_e4m3(b_scales), 8))
            b_wmultipliers = expand_groups(decode_e4m3(b_wscales), 8)
            b_low = decode_e2m1(b_weight & 15) * b_wmultipliers
            b_out = tl.dot(b_low, decode_e2m1(b_codes & 15) * b_multipliers, b_out)
            b_high = decode_e2m1(b_weight >> 4) * b_wmultipliers
            b_out = tl.dot(b_high, decode_e2m1(b_codes >> 4) * b_multipliers, b_out)
        codes_ptr += BLOCK_K // 2
        scales_ptr += BLOCK_K // 16
        qweight_ptr += BLOCK_K // 2
        wscales_ptr += BLOCK_K // 16
    return b_out


@triton.jit
def _lowbit_linear_kernel(
    codes_ptr, scales_ptr, low_ptr, qweight_ptr, wscales_ptr, wtscale_ptr, up_ptr, bias_ptr, out_ptr,
    tokens, features, outputs, rank,
    FORMAT: tl.constexpr, G: tl.constexpr, IS_PACKED: tl.constexpr, HAS_NVFP4: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    i_p = tl.program_id(0)
    i_m, i_n = tl.swizzle2d(i_p // blocks_n, i_p % blocks_n, blocks_m, blocks_n, GROUPED)
    # Offsets from the program's first rows fit into 32 bits. What lies beyond the last row is never stored: there the
    # last row is read.
    i_m, i_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_m, m_n = i_m + o_m < tokens, i_n + o_n < outputs
    o_x = tl.minimum(o_m, (tokens - 1 - i_m).to(tl.int32))
    o_w = tl.minimum(o_n, (outputs - 1 - i_n).to(tl.int32))
    code_bytes = features // 2 if FORMAT == "nvfp4" else features
    scales_a_row = 1 if FORMAT == "int8" else features // G
    codes_ptr += i_m * code_bytes
    scales_ptr += i_m * scales_a_row
    low_ptr += i_m * rank
    qweight_ptr += i_n * (features // 2 if IS_PACKED else features)
    wscales_ptr += i_n * (features // G if IS_PACKED else 1)
    up_ptr += i_n * rank
    if FORMAT == "int4":
        b_out = _int4_product(codes_ptr, scales_ptr, qweight_ptr, wscales_ptr, o_x, o_w, features)
    elif FORMAT == "nvfp4":
        b_out = _nvfp4_product(codes_ptr, scales_ptr, qweight_ptr, wscales_ptr, o_x, o_w, features, HAS_NVFP4, BLOCK_K)
    else:
        if IS_PACKED:
            b_rows = row_scales(wscales_ptr, o_w, features // G, G == 16, 16)
            b_sum = _packed_int8_product(codes_ptr, qweight_ptr, wscales_ptr, b_rows, o_x, o_w, features, G, BLOCK_K)
        else:
            b_rows = tl.load(wscales_ptr + o_w)
            b_sum = _int8_product(codes_ptr, qweight_ptr, o_x, o_w, features, BLOCK_K)
        b_out = b_sum.to(tl.float32) * b_rows[:, None] * tl.load(scales_ptr + o_x)[None, :]
    if wtscale_ptr is not None:
        b_out *= tl.load(wtscale_ptr + i_n + o_w).to(tl.float32)[:, None]
    for start in range(0, rank, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        b_up = tl.load(up_ptr + o_w[:, None] * rank + o_r[None, :], mask=(o_r < rank)[None, :], other=0.0)
        b_low = tl.load(low_ptr + o_x[None, :] * rank + o_r[:, None], mask=(o_r < rank)[:, None], other=0.0)
        b_out = tl.dot(b_up.to(tl.float32), b_low, b_out, input_precision=PRECISION)
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + i_n + o_w).to(tl.float32)[:, None]
    tl.store(
        out_ptr + i_m * outputs + i_n + o_m[None, :] * outputs + o_n[:, None], b_out, mask=m_n[:, None] & m_m[None, :]
    )


def lowbit_linear_forward(
    codes: Tensor, scales: Tensor, low: Tensor,
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, up: Tensor, bias: Tensor | None,
    activation_format: str,
) -> Tensor:  # fmt: skip
    """`[M, N]` in the dtype of `up`; see the reference."""
    (tokens, rank), outputs = low.shape, qweight.shape[0]
    out = up.new_empty((tokens, outputs))
    is_int8, group_size = wscales.dim() == 1, 64 if wtscale is None else 16
    target, features = architecture(), qweight.shape[1] * (1 if is_int8 else 2)
    is_packed = not is_int8 and (activation_format != "int8" or tokens <= MAX_PACKED_TOKENS)
    if not is_packed and not is_int8:
        qweight, wscales = requantize_rows(qweight, wscales, wtscale)
        wtscale = None
    precision = "tf32" if target and up.dtype != torch.float32 else "ieee"
    block_n, block_m, block_k, options = _launch_config(
        tokens, features, outputs, activation_format, is_packed, precision, target
    )
    _lowbit_linear_kernel[(triton.cdiv(tokens, block_m) * triton.cdiv(outputs, block_n),)](
        codes.contiguous(), as_bits(scales), low.contiguous(), qweight.contiguous(), as_bits(wscales), wtscale,
        up.contiguous(), bias, out, tokens, features, outputs, rank,
        FORMAT=activation_format, G=group_size, IS_PACKED=is_packed, HAS_NVFP4=target in NVFP4_ARCHITECTURES,
        PRECISION=precision,
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=BLOCK_R, GROUPED=GROUPED, **options,
    )  # fmt: skip
    return out
