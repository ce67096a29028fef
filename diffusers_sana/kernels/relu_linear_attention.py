"""ReLU linear attention (Sana, arXiv 2410.10629, section 2.2; EfficientViT, arXiv 2205.14756).

    out_i = sum_j v_j (relu(k_j) . relu(q_i)) / (sum_j relu(k_j) . relu(q_i) + eps)

The sums over j do not depend on i, so one (head_dim + 1, head_dim) state per head serves all queries and the cost
is linear in the number of tokens. State, products and division are fp32 whatever the dtype of the inputs: sums over
thousands of tokens overflow fp16 and lose all small terms in bf16. An enclosing autocast changes nothing.

Legend: B batch, N tokens, H heads, D head_dim.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.nn import functional as F


def relu_linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-15) -> Tensor:
    """Unmasked linear attention with the feature map `relu`.

    Args:
        query, key, value: `[B, N, H, D]`, any strides and floating dtype; `key` and `value` may have another N.
        eps: added to the denominator, in fp32 (1e-15 is zero in fp16).

    Returns:
        `[B, N, H, D]` in the dtype of `value`, contiguous. Zero where no key and query share a positive entry.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = F.relu(query).to(dtype).transpose(1, 2)  # [B, H, N, D]
    key = F.relu(key).to(dtype).transpose(1, 2)
    device_type = query.device.type
    with torch.autocast(device_type, enabled=False) if is_autocast_available(device_type) else nullcontext():
        state = torch.matmul(value.to(dtype).permute(0, 2, 3, 1), key)  # [B, H, D, D]: sum_j v_j k_j^T
        numerator = torch.matmul(query, state.transpose(-1, -2))
        denominator = torch.matmul(query, key.sum(dim=-2).unsqueeze(-1))
    # Written as [B, N, H, D] at once, so that the caller merges heads without a copy.
    return (numerator / (denominator + eps)).transpose(1, 2).to(value.dtype).contiguous()
