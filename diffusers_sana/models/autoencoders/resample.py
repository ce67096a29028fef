"""Down- and upsampling by two and their shortcuts, without the intermediate images of the plain formulas.

A pixel of the finer image is identified by its phase: `(row % 2, column % 2)`, in the order (0, 0), (0, 1), (1, 0),
(1, 1).

Legend: B batch, C channels, H height, W width of the coarser image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.linear import conv2d
from diffusers_sana.kernels.precision import arithmetic_dtype


def interpolated_conv2d(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The phases of a 3x3 convolution, zero padding 1, of the image upsampled by two with nearest neighbors.

    The nine taps of a fine pixel fall on four coarse pixels, so each phase is a 2x2 convolution of the coarse image
    with summed taps: four ninths of the work, and the upsampled image is never stored.

    Args:
        hidden_states: `[B, C, H, W]`.
        weight: `[C', C, 3, 3]`.
        bias: `[C']`.

    Returns:
        Four phases `[B, C', H, W]`.
    """
    height, width = hidden_states.shape[-2:]
    taps = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Phase 0 sees the coarse rows before and at its own, phase 1 at and after its own.
    rows = [
        torch.stack([taps[:, :, 0], taps[:, :, 1] + taps[:, :, 2]], dim=2),
        torch.stack([taps[:, :, 0] + taps[:, :, 1], taps[:, :, 2]], dim=2),
    ]  # 2 x [C', C, 2, 3]
    kernels = [
        kernel
        for row in rows
        for kernel in (
            torch.stack([row[..., 0], row[..., 1] + row[..., 2]], dim=-1),
            torch.stack([row[..., 0] + row[..., 1], row[..., 2]], dim=-1),
        )
    ]
    kernel = torch.cat(kernels).to(arithmetic_dtype(hidden_states))  # [4 C', C, 2, 2]
    out = conv2d(hidden_states, kernel, None if bias is None else bias.repeat(4), padding=1)  # [B, 4 C', H + 1, W + 1]
    phases = out.chunk(4, dim=1)
    return [phases[2 * i + j][..., i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)]


def interleave(phases: Sequence[Tensor], hidden_states: Tensor, repeats: int | None) -> Tensor:
    """Interleaves four phases to the fine image and adds the shortcut of DC-AE's upsampler.

    The shortcut is `pixel_shuffle(repeat_interleave(hidden_states, repeats))`: channel `(4 c + 2 i + j) // repeats` of
    the coarse image for channel c of the phase (i, j).

    Args:
        phases: four images `[B, C', H, W]`.
        hidden_states: the coarse image `[B, C, H, W]`.
        repeats: `4 C' / C`, or None for no shortcut.

    Returns:
        `[B, C', 2 H, 2 W]`, channels-last in memory.
    """
    batch, channels, height, width = phases[0].shape
    out = phases[0].new_empty(batch, 2 * height, 2 * width, channels).movedim(-1, 1)
    for k, phase in enumerate(phases):
        if repeats is not None:
            phase = phase + _repeated_channels(hidden_states, k, repeats, channels)
        out[..., k // 2 :: 2, k % 2 :: 2] = phase
    return out


def _repeated_channels(hidden_states: Tensor, phase: int, repeats: int, channels: int) -> Tensor:
    if 4 % repeats == 0:  # all released models: a view
        return hidden_states[:, phase // repeats :: 4 // repeats]
    index = (4 * torch.arange(channels, device=hidden_states.device) + phase) // repeats
    return hidden_states.index_select(1, index)


def down_shortcut(hidden_states: Tensor, group_size: int) -> Tensor:
    """`pixel_unshuffle` by two, then the mean of each `group_size` consecutive channels.

    Args:
        hidden_states: the fine image `[B, C, 2 H, 2 W]`.
        group_size: how many of the `4 C` channels are averaged.

    Returns:
        `[B, 4 C / group_size, H, W]`.
    """
    if group_size == 4:
        return F.avg_pool2d(hidden_states, 2)
    if group_size == 2:  # the mean of two neighbors in a row; the two rows become channels
        return F.avg_pool2d(hidden_states, (1, 2)).unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2)
    return average_channels(F.pixel_unshuffle(hidden_states, 2), group_size)


def average_channels(hidden_states: Tensor, group_size: int) -> Tensor:
    """Mean over groups of `group_size` consecutive channels: `[B, C, H, W]` to `[B, C / group_size, H, W]`."""
    return hidden_states.unflatten(1, (-1, group_size)).mean(dim=2)


def repeat_channels(hidden_states: Tensor, repeats: int) -> Tensor:
    """Each channel `repeats` times in a row: `[B, C, H, W]` to `[B, C * repeats, H, W]`."""
    return hidden_states.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)
