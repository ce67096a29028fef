"""ReLU linear attention at the shapes of SANA 1.6B (with and without guidance) and of DC-AE's attention stages.

python -m benchmarks.kernel_benchmark relu_linear_attention
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.relu_linear_attention import relu_linear_attention


HEAD_DIM = 32  # of all official models


def _case(name: str, batch: int, tokens: int, heads: int, interleaved: bool) -> Case:
    def make(device: str, dtype: torch.dtype) -> Tensors:
        packed = (heads, 3, HEAD_DIM) if interleaved else (3, heads, HEAD_DIM)
        qkv = torch.randn(batch, tokens, *packed, device=device, dtype=dtype)
        query, key, value = qkv.unbind(-2 if interleaved else 2)
        return {"query": query, "key": key, "value": value}

    elements = batch * tokens * heads * HEAD_DIM
    return Case(name, make, num_bytes=8 * elements, num_flops=4 * HEAD_DIM * elements)


def sana_case(batch: int, side: int) -> Case:
    """Self-attention over the latent: queries, keys and values are slices of one projection."""
    return _case(f"sana-1.6b {batch}x{32 * side}px", batch, side * side, 70, interleaved=False)


def autoencoder_case(channels: int, side: int) -> Case:
    """One scale of a block of the autoencoder: query, key and value alternate head by head."""
    return _case(f"dc-ae {side}x{side}x{channels}", 1, side * side, channels // HEAD_DIM, interleaved=True)


def forward(query, key, value):
    from diffusers_sana.kernels.triton.relu_linear_attention import relu_linear_attention_forward

    relu_linear_attention_forward(query, key, value, 1e-15)


def backward(query, key, value):
    from diffusers_sana.kernels.triton.relu_linear_attention import relu_linear_attention_backward

    batch, _, heads, head_dim = query.shape
    state = query.new_empty((batch, heads, head_dim + 1, head_dim), dtype=torch.float32)
    relu_linear_attention_backward(value, query, key, value, state, 1e-15)


def rotary(query, key, value):
    """With rotary positions, for as many tokens with the heads of SANA-Video."""
    from diffusers_sana.kernels.triton.relu_linear_attention import relu_linear_attention_rotary_forward

    batch, tokens = query.shape[:2]
    query, key, value = (query.new_empty((batch, tokens, 20, 112)) for _ in range(3))
    cos, sin = (query.new_empty((tokens, 56), dtype=torch.float32) for _ in range(2))
    relu_linear_attention_rotary_forward(query, key, value, cos, sin, 1e-15)


BENCHMARK = KernelBenchmark(
    relu_linear_attention,
    cases=[
        sana_case(2, 16), sana_case(1, 32), sana_case(2, 32), sana_case(2, 128),
        autoencoder_case(512, 128), autoencoder_case(1024, 32), autoencoder_case(512, 512),
    ],
    launches=[forward, backward, rotary],
    tiny=autoencoder_case(32, 4),
)  # fmt: skip
