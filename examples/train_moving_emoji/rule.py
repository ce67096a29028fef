"""Which motion a video shows, by a rule on its frames: where what differs from the background is, and how much.

Nothing here is learned. On true renders, through the autoencoder and back, it must be right nearly always.

Legend: F frames, H W height and width in pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


NOISE = 0.12  # a difference from the background, in colors of [-1, 1], that is none
LEAST_CHANGE = 0.12  # of the frame's side, that an object must move to slide
LEAST_GROWTH = 1.5  # by which its extent must change to grow or to shrink
MOST_CONTRAST = 0.5  # that the first frame of an object that appears may have, of the last one's
STEADY = 0.9  # correlation with time of what a motion changes
ANGLES, RADII = 72, 10  # of the polar grid on which frames are compared
TURN = 1 / 8  # of a full turn, per frame
TURN_ERROR = 1 / 18  # of a step that still counts
STEPS_THAT_TURN = 0.7  # fraction of the steps


class Measures(NamedTuple):
    """What the rule knows of the frames.

    Lengths are in sides of the frame, turns are clockwise.

    Attributes:
        center: x and y of what is not background, from the middle, `[F, 2]`.
        extent: its standard deviation, `[F]`.
        contrast: how much its most different pixels differ, `[F]`.
        turns: between a frame and the next, `[F - 1]`.
    """

    center: Tensor
    extent: Tensor
    contrast: Tensor
    turns: Tensor


def measure(video: Tensor) -> Measures:
    """Of a video `[3, F, H, W]` in [-1, 1]: moments of the distance of pixels from the background's color."""
    frames = video.float().transpose(0, 1)
    height, width = frames.shape[-2:]
    border = torch.cat([frames[..., 0, :], frames[..., -1, :], frames[..., 0], frames[..., -1]], dim=-1)
    background = border.transpose(0, 1).flatten(1).median(dim=1).values.view(1, 3, 1, 1)
    difference = frames - background
    mass = (difference.norm(dim=1) - NOISE).clamp(min=0)  # [F, H, W]
    total = mass.sum((1, 2)).clamp(min=1e-6)
    y, x = ((torch.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    center = torch.stack([(mass * x).sum((1, 2)), (mass * y.view(-1, 1)).sum((1, 2))], dim=1) / total[:, None]
    away = (x - center[:, :1, None]) ** 2 + (y.view(-1, 1) - center[:, 1:, None]) ** 2
    extent = ((mass * away).sum((1, 2)) / total).sqrt()
    contrast = mass.flatten(1).topk(mass[0].numel() // 50).values.mean(1)
    return Measures(center, extent, contrast, _turns(difference, center.mean(0)))


def _turns(difference: Tensor, center: Tensor) -> Tensor:
    """By how much each frame is turned against the one before it, in turns, `[F - 1]` from -1/2 to 1/2."""
    angle = torch.arange(ANGLES) / ANGLES * 2 * torch.pi
    radius = torch.linspace(0.06, 0.42, RADII)
    places = torch.stack([angle.cos()[:, None] * radius, angle.sin()[:, None] * radius], dim=-1)
    grid = (2 * (places + center)).expand(len(difference), -1, -1, -1)
    polar = F.grid_sample(difference, grid, align_corners=False) * radius  # [F, 3, ANGLES, RADII]
    spectrum = torch.fft.rfft(polar, dim=2)
    agreement = torch.fft.irfft((spectrum[1:] * spectrum[:-1].conj()).sum((1, 3)), n=ANGLES)  # by shift
    best = agreement.argmax(dim=1)
    return torch.where(best > ANGLES // 2, best - ANGLES, best) / ANGLES


def motion_of(video: Tensor) -> str:
    """The motion that a video `[3, F, H, W]` in [-1, 1] shows, one of `MOTIONS`; "" where it is none of them."""
    center, extent, contrast, turns = measure(video)
    if contrast[-1] > NOISE and contrast[0] < MOST_CONTRAST * contrast[-1] and _steady(contrast) > STEADY:
        return "appear"
    if contrast.min() < NOISE:  # an object must be there all the time
        return ""
    moved = center[-1] - center[0]
    axis = int(moved.abs().argmax())
    if moved[axis].abs() > LEAST_CHANGE:
        steady = _steady(center[:, axis]).abs() > STEADY
        return (("left", "right"), ("up", "down"))[axis][int(moved[axis] > 0)] if steady else ""
    growth = extent[-1] / extent[0]
    if max(growth, 1 / growth) > LEAST_GROWTH:
        return ("grow" if growth > 1 else "shrink") if _steady(extent).abs() > STEADY else ""
    turning = ((turns - TURN).abs() < TURN_ERROR).float().mean()
    return "spin" if turning > STEPS_THAT_TURN else ""


def _steady(values: Tensor) -> Tensor:
    """The correlation of `[F]` with time."""
    time = torch.arange(len(values), dtype=torch.float32)
    return torch.corrcoef(torch.stack([time, values]))[0, 1].nan_to_num()
