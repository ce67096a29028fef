"""Edges of pictures, a control image that needs no other model."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sobel_edges(pixel_values: Tensor) -> Tensor:
    """How strongly each pixel differs from its neighbours, white on black.

    The length of the gradient by Sobel's 3x3 filters, the greatest over the colours: 1 for a step between the darkest
    and the brightest value.

    Args:
        pixel_values: `[B, C, H, W]` in [-1, 1].

    Returns:
        `[B, 3, H, W]` in [-1, 1], three times the same, as an autoencoder for pictures takes it.
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=pixel_values.device)
    filters = torch.stack([across, across.T])[:, None] / 8  # a step of 2, from -1 to 1, gives 1
    padded = F.pad(pixel_values.float(), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded.flatten(0, 1)[:, None], filters)  # [B * C, 2, H, W]
    length = gradient.norm(dim=1).unflatten(0, pixel_values.shape[:2]).amax(dim=1, keepdim=True)
    return (length.clamp(max=1) * 2 - 1).expand(-1, 3, -1, -1)
