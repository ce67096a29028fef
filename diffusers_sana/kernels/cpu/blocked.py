"""Operations in blocks that stay in the cache of a processor, without temporaries of full size.

    row_blocks          a function of rows, block by block
    linear_in_pieces    a matrix product whose weight is converted or computed piece by piece
    glu_mb_conv         the gated inverted bottleneck, one group of hidden channels at a time

For inference only: outputs are written in place.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.precision import arithmetic_dtype


ROW_BLOCK = 2**18  # elements of a block of rows: 1 MiB of fp32
WEIGHT_PIECE = 2**20  # elements of a weight converted at a time: 4 MiB of fp32
CHANNEL_GROUP = 2**21  # elements of one half of the hidden image computed at a time: 8 MiB of fp32
MIN_CHANNELS, MAX_CHANNELS = 256, 1024  # narrower products are inefficient; wider groups leave the cache


def row_blocks(
    function: Callable[[Tensor, Tensor | None], Tensor], hidden_states: Tensor, residual: Tensor | None
) -> Tensor:
    """`function(hidden_states, residual)` for a function that treats rows independently.

    Args:
        function: of rows `[R, C]` and their rows of the residual.
        hidden_states, residual: `[..., C]`; the residual may be None.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    residual = None if residual is None else residual.reshape(rows.shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    size = max(1, ROW_BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        block = slice(start, start + size)
        out[block] = function(rows[block], None if residual is None else residual[block])
    return out.view(hidden_states.shape)


def linear_in_pieces(
    hidden_states: Tensor, weight_rows: Callable[[slice], Tensor], num_outputs: int, bias: Tensor | None
) -> Tensor:
    """`hidden_states @ weight.T + bias` in `arithmetic_dtype`, rounded to the dtype of `hidden_states`.

    Args:
        hidden_states: `[..., K]`.
        weight_rows: gives rows of the weight, `[rows, K]`, in `arithmetic_dtype(hidden_states)`.
        num_outputs: N.
        bias: `[N]` or None.
    """
    dtype = arithmetic_dtype(hidden_states)
    inputs = hidden_states.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out = hidden_states.new_empty(*hidden_states.shape[:-1], num_outputs)
    rows = max(WEIGHT_PIECE // hidden_states.shape[-1], 16)
    for start in range(0, num_outputs, rows):
        piece = slice(start, start + rows)
        out[..., piece] = F.linear(inputs, weight_rows(piece), None if bias is None else bias[piece])
    return out


def glu_mb_conv(
    hidden_states: Tensor,
    expand: tuple[Tensor, Tensor | None],
    depthwise: tuple[Tensor, Tensor | None],
    project_weight: Tensor,
) -> Tensor:
    """The operation of `kernels/glu_mb_conv.py`; `expand` and `depthwise` are a weight and a bias each.

    The depthwise convolution does not mix channels, so each group of hidden channels stays in the cache between the
    two products, and the hidden image never exists as a whole. The products of the groups are summed in fp32.
    """
    dtype = arithmetic_dtype(hidden_states)
    inputs = hidden_states.to(dtype)
    features = project_weight.shape[1]

    def group_of(parameters: tuple[Tensor, Tensor | None], group: slice) -> tuple[Tensor, Tensor | None]:
        weight, bias = parameters
        return weight[group].to(dtype), None if bias is None else bias[group].to(dtype)

    def convolve(first: int, last: int) -> Tensor:
        """Hidden channels `[first, last)` before the gate, `[B, last - first, h, w]`, channels-last."""
        hidden = F.linear(inputs, *group_of(expand, slice(first, last)))
        hidden = F.silu(hidden, inplace=True).movedim(-1, 1)
        return F.conv2d(hidden, *group_of(depthwise, slice(first, last)), padding=1, groups=last - first)

    num_pixels = math.prod(hidden_states.shape[:3])
    width = min(max(CHANNEL_GROUP // num_pixels, MIN_CHANNELS), MAX_CHANNELS)
    num_groups = math.ceil(features / width)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(num_pixels, project_weight.shape[0], dtype=sum_dtype)
    for i in range(num_groups):
        first, last = i * features // num_groups, (i + 1) * features // num_groups
        gate = F.silu(convolve(features + first, features + last), inplace=True)
        gated = gate.mul_(convolve(first, last)).movedim(1, -1).reshape(num_pixels, -1)
        weight = project_weight[:, first:last].to(dtype).t()
        if sum_dtype == dtype:
            out.addmm_(gated, weight)
        else:
            out.add_(gated @ weight)
    return out.view(*hidden_states.shape[:3], -1).to(hidden_states.dtype)
