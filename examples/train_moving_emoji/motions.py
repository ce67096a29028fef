"""Clips of one emoji that moves on a plain background, their captions, and which of them are held out.

A clip has eight frames of 128 px. Objects, motions and colors are few, so that a core of a CPU learns them in minutes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.train_emoji.scenes import COLORS, SMALL, STYLES, Art, with_article


FRAMES = 8
RESOLUTION = 128
FPS = 8
OBJECTS = ("fox", "cat", "penguin", "rocket", "banana", "guitar", "car", "strawberry")  # none looks the same turned
BACKGROUNDS = ("green", "blue", "yellow", "purple", "white")
STYLE = "3d"
NUM_HELD_OUT = 50
TRAVEL = 0.22  # of the frame's side, from the middle, at both ends of a slide
SIDE, TURNING = 0.56, 0.62  # sides of an object that slides, and of one that stays in the middle
SMALLEST, LARGEST = 0.28, 0.84

# Motion -> its phrasings after the object. The first one is that of prompts.
MOTIONS = {
    "left": ("slides to the left", "moves left"),
    "right": ("slides to the right", "moves right"),
    "up": ("slides to the top", "moves up"),
    "down": ("slides to the bottom", "moves down"),
    "grow": ("grows larger", "grows"),
    "shrink": ("shrinks smaller", "shrinks"),
    "spin": ("spins around", "spins"),
    "appear": ("appears", "fades in"),
}


@dataclass(frozen=True)
class Clip:
    """What a clip shows: an object of `OBJECTS`, a motion of `MOTIONS`, a background of `BACKGROUNDS`."""

    word: str
    motion: str
    color: str

    @property
    def prompt(self) -> str:
        """The full caption."""
        return self.captions[0]

    @property
    def captions(self) -> list[str]:
        """All phrasings."""
        return [
            f"{with_article(self.word)} {how} on {with_article(self.color)} background" for how in MOTIONS[self.motion]
        ]


def all_clips() -> list[Clip]:
    """Every clip, in a fixed order."""
    return [Clip(*parts) for parts in product(OBJECTS, MOTIONS, BACKGROUNDS)]


def held_out_clips() -> list[Clip]:
    """The clips that training must not show; as many of each motion as of any other, or one more."""
    rng, rows = random.Random(0), {motion: [c for c in all_clips() if c.motion == motion] for motion in MOTIONS}
    for clips in rows.values():
        rng.shuffle(clips)
    in_turn = [clips[number] for number in range(len(OBJECTS)) for clips in rows.values()]
    return in_turn[:NUM_HELD_OUT]


def taught_clips() -> list[Clip]:
    """All others."""
    held_out = set(held_out_clips())
    return [clip for clip in all_clips() if clip not in held_out]


def path(motion: str, frames: int = FRAMES) -> Tensor:
    """Where the object is in each frame: x, y of its center, side, angle, opacity, `[F, 5]`.

    Lengths are in sides of the frame, the center from the middle, y downwards; the angle is in turns, clockwise.
    """
    time = torch.linspace(0, 1, frames)
    x = y = angle = torch.zeros(frames)
    side, opacity = torch.full((frames,), TURNING), torch.ones(frames)
    slide = TRAVEL * (2 * time - 1)
    if motion in ("left", "right", "up", "down"):
        side = torch.full((frames,), SIDE)
        along = slide if motion in ("right", "down") else -slide
        x, y = (along, y) if motion in ("left", "right") else (x, along)
    elif motion in ("grow", "shrink"):
        size = SMALLEST + (LARGEST - SMALLEST) * time
        side = size if motion == "grow" else size.flip(0)
    elif motion == "spin":
        angle = torch.arange(frames) / frames
    else:
        opacity = time
    return torch.stack([x, y, side, angle, opacity], dim=1)


def render(art: Art, clips: Sequence[Clip], resolution: int = RESOLUTION) -> Tensor:
    """The clips as videos `[B, 3, F, resolution, resolution]` in [-1, 1]."""
    return torch.stack([_render(art, clip, resolution) for clip in clips])


def _render(art: Art, clip: Clip, resolution: int) -> Tensor:
    sprite = art.pixels[SMALL][art.index[clip.word], STYLES.index(STYLE)].float() / 255  # premultiplied RGBA
    x, y, side, angle, opacity = path(clip.motion).unbind(1)
    cos, sin = torch.cos(2 * torch.pi * angle), torch.sin(2 * torch.pi * angle)
    # From a place in the frame, both axes in [-1, 1], to one in the sprite: turned back, and enlarged.
    rows = [torch.stack([cos, sin, -2 * (cos * x + sin * y)], 1), torch.stack([-sin, cos, 2 * (sin * x - cos * y)], 1)]
    theta = torch.stack(rows, dim=1) / side.view(-1, 1, 1)
    fine = 2 * resolution  # twice as fine, then averaged, so that edges are smooth
    grid = F.affine_grid(theta, [FRAMES, 4, fine, fine], align_corners=False)
    layer = F.grid_sample(sprite.expand(FRAMES, -1, -1, -1), grid, align_corners=False) * opacity.view(-1, 1, 1, 1)
    color = torch.tensor(COLORS[clip.color]).view(1, 3, 1, 1) / 255
    image = color * (1 - layer[:, 3:]) + layer[:, :3]
    return (F.avg_pool2d(image, 2).clamp(0, 1) * 2 - 1).transpose(0, 1)
