"""Matrix product and convolution with a bias, in the arithmetic that the device is fast at.

On GPUs, and on processors with instructions for the dtype, these are the functions of PyTorch. On other processors
half precision is computed in fp32 (see `precision.py`), and the weight is converted in pieces that stay in the cache.
"""

from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.cpu.blocked import linear_in_pieces
from diffusers_sana.kernels.precision import arithmetic_dtype, is_inference


def linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`hidden_states @ weight.T + bias`.

    Args:
        hidden_states: `[..., K]`.
        weight: `[N, K]` in the same dtype.
        bias: `[N]`.

    Returns:
        `[..., N]` in the dtype of `hidden_states`.
    """
    dtype = arithmetic_dtype(hidden_states)
    if dtype == hidden_states.dtype or weight.dtype != hidden_states.dtype:  # PyTorch raises for mixed dtypes
        return F.linear(hidden_states, weight, bias)
    if hidden_states.device.type == "cpu" and is_inference(hidden_states, weight, bias):
        return linear_in_pieces(hidden_states, lambda rows: weight[rows].to(dtype), weight.shape[0], bias)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(hidden_states.to(dtype), weight.to(dtype), bias).to(hidden_states.dtype)


def conv2d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional convolution.

    Args:
        hidden_states: `[B, C, H, W]`; channels-last in memory is fast, and then so is the result.
        weight: `[C', C / groups, kernel, kernel]` in the same dtype or in `arithmetic_dtype(hidden_states)`.
        bias: `[C']`.
        stride, padding, groups: as in `torch.nn.functional.conv2d`.

    Returns:
        `[B, C', H', W']` in the dtype of `hidden_states`.
    """
    dtype = arithmetic_dtype(hidden_states)
    if dtype == hidden_states.dtype:
        return F.conv2d(hidden_states, weight, bias, stride, padding, groups=groups)
    bias = None if bias is None else bias.to(dtype)
    out = F.conv2d(hidden_states.to(dtype), weight.to(dtype), bias, stride, padding, groups=groups)
    return out.to(hidden_states.dtype)
