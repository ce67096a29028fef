"""Captioned images composed on the fly from emoji art.

A scene is one object (somewhere) or two (side by side) in one style on a plain background; its caption says which,
or leaves some of it out. Composition is vectorized over the batch and runs on any device.
"""

import io
import json
import random
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from examples.train_emoji.scenes import COLORS as SANA_COLORS


STYLES = ("3d", "flat")
# The colors of the bundled Sana, so that its images can be asked about, and two more, in the order by which triples of
# object, style and color were held out.
NAMES = "red orange yellow green teal blue purple pink brown gray black white"
COLORS = {name: (SANA_COLORS | {"teal": (112, 200, 196), "brown": (158, 116, 86)})[name] for name in NAMES.split()}
# Words of the caption -> center of the object, in units of half the image from its center (x right, y down).
POSITIONS = {
    "": (0.0, 0.0),
    " on the left": (-0.42, 0.0),
    " on the right": (0.42, 0.0),
    " at the top": (0.0, -0.42),
    " at the bottom": (0.0, 0.42),
}
# What prompts may name: things with short names. The autoencoder also sees all other emoji.
OBJECT_SUBGROUPS = {
    "animal-mammal",
    "animal-bird",
    "animal-amphibian",
    "animal-reptile",
    "animal-marine",
    "animal-bug",
    "plant-flower",
    "plant-other",
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "food-asian",
    "food-sweet",
    "drink",
    "transport-ground",
    "transport-water",
    "transport-air",
    "sky-weather",
    "sport",
    "musical-instrument",
}


# fmt: off
# What the smaller vocabulary of a training on a CPU is made of.
COMMON_OBJECTS = (
    "bat", "bear", "bird", "butterfly", "camel", "cat", "chicken", "baby chick", "crab", "crocodile", "dog",
    "dolphin", "dragon", "duck", "eagle", "elephant", "fish", "tropical fish", "flamingo", "fox", "frog",
    "giraffe", "gorilla", "hedgehog", "honeybee", "horse", "kangaroo", "koala", "lady beetle", "lion", "lizard",
    "lobster", "monkey face", "mouse", "octopus", "owl", "panda", "parrot", "peacock", "penguin", "pig",
    "polar bear", "rabbit", "raccoon", "rooster", "shark", "snail", "snake", "swan", "tiger", "turtle", "unicorn",
    "whale", "zebra", "cactus", "cherry blossom", "evergreen tree", "maple leaf", "mushroom", "palm tree", "rose",
    "sunflower", "tulip", "avocado", "banana", "birthday cake", "bread", "broccoli", "carrot", "cherries",
    "coconut", "cookie", "croissant", "cucumber", "cupcake", "doughnut", "egg", "eggplant", "french fries",
    "grapes", "green apple", "hamburger", "hot dog", "ice cream", "kiwi fruit", "lemon", "lollipop", "mango",
    "peach", "pear", "pineapple", "pizza", "potato", "red apple", "sandwich", "strawberry", "sushi", "taco",
    "tangerine", "tomato", "watermelon", "beer mug", "teapot", "wine glass", "ambulance", "automobile", "bicycle",
    "bus", "fire engine", "helicopter", "police car", "rocket", "sailboat", "ship", "taxi", "tractor", "droplet",
    "fire", "full moon", "rainbow", "star", "basketball", "soccer ball", "drum", "guitar", "trumpet", "violin",
)
# fmt: on


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())  # `hash` differs from process to process


def is_held_out(label: str, style: str, color: str) -> bool:
    """One in sixteen triples of object, style and background never occurs in training: prompts to judge by."""
    return _hash(f"{label}/{style}/{color}") % 16 == 0


def triples(labels: Sequence[str], held_out: bool) -> list[tuple[str, str, str]]:
    """All triples of object, style and background that are, or are not, held out."""
    every = [(label, style, color) for label in labels for style in STYLES for color in COLORS]
    return [triple for triple in every if is_held_out(*triple) == held_out]


def with_article(label: str, adjective: str = "") -> str:
    words = f"{adjective} {label}".strip()
    if label.endswith("s") and not label.endswith(("ss", "us")):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What an image shows. `labels`: one object, or two from left to right."""

    labels: tuple[str, ...]
    style: str
    color: str
    position: str = ""

    @property
    def prompt(self) -> str:
        """The full caption; training also uses shorter ones (`EmojiScenes.caption`)."""
        subject = " and ".join(with_article(label) for label in self.labels)
        return f"{subject}{self.position} on {with_article(self.color)} background, {self.style} style"


class EmojiArt:
    """All images in memory: `pixels` `[num_emoji, num_styles, 4, 128, 128]`, uint8, color premultiplied."""

    def __init__(self, path: str | Path):
        with zipfile.ZipFile(path) as pack:
            self.rows = json.loads(pack.read("metadata.json"))
            pixels = np.zeros((len(self.rows), len(STYLES), 4, 128, 128), np.uint8)
            for i, row in enumerate(self.rows):
                for j, style in enumerate(STYLES):
                    image = Image.open(io.BytesIO(pack.read(f"{style}/{row['hexcode']}.webp"))).convert("RGBa")
                    pixels[i, j] = np.asarray(image).transpose(2, 0, 1)
        self.pixels = torch.from_numpy(pixels)
        self.objects = [
            i
            for i, row in enumerate(self.rows)
            if row["subgroup"] in OBJECT_SUBGROUPS and len(row["label"].split()) <= 2
        ]
        self.index = {self.rows[i]["label"]: i for i in self.objects}
        self.labels = list(self.index)
        # Emoji that no training ever sees, to measure the autoencoder by; none of them can be prompted.
        self.held_out = [
            i
            for i, row in enumerate(self.rows)
            if row["label"] not in self.index and row["subgroup"] != "country-flag" and _hash(row["label"]) % 12 == 0
        ]
        self.training = sorted(set(range(len(self.rows))) - set(self.held_out))

    def among(self, wanted: Sequence[str]) -> list[str]:
        """Those of the objects `wanted` that there are; all objects if there is none of them."""
        return [label for label in wanted if label in self.index] or self.labels

    def sprites(self, emoji: Tensor, style: Tensor, device: torch.device | str) -> Tensor:
        """`[B, 4, 128, 128]` in [0, 1]."""
        return self.pixels[emoji, style].to(device).float() / 255


def paste(canvas: Tensor, sprites: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """Puts sprite b on canvas b.

    Args:
        canvas: `[B, 3, H, W]` in [0, 1].
        sprites: `[B, 4, h, w]`, premultiplied.
        center: `[B, 2]`, x and y in [-1, 1].
        size: `[B, 2]`, width and height as a fraction of the canvas; a negative width mirrors.
    """
    if size.abs().max() * canvas.shape[-1] < 0.75 * sprites.shape[-1]:
        sprites = F.avg_pool2d(sprites, 2)  # bilinear sampling alone would alias
    theta = torch.zeros(len(canvas), 2, 3, device=canvas.device)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / size[:, 0], 1 / size[:, 1]
    theta[:, :, 2] = -center / size
    grid = F.affine_grid(theta, list(canvas.shape), align_corners=False)
    pasted = F.grid_sample(sprites, grid, align_corners=False)
    return pasted[:, :3] + canvas * (1 - pasted[:, 3:])


class EmojiScenes:
    """Random scenes, their images and captions, and endless batches of images for the autoencoder.

    Args:
        art: the emoji.
        resolution: side of the images in pixels.
        device: where images are composed.
        seed: of everything random here.
        labels: objects of captioned scenes; default: all that `art` can name.
    """

    def __init__(
        self,
        art: EmojiArt,
        resolution: int = 128,
        device: str = "cpu",
        seed: int = 0,
        labels: Sequence[str] | None = None,
    ):
        self.art, self.resolution, self.device = art, resolution, device
        self.labels = list(art.labels if labels is None else labels)
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def compose(
        self, emoji: list[tuple[int, ...]], style: list[int], color: Tensor, position: list[str], jitter: float = 1.0
    ) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of one object, or two, per row of `emoji`."""
        batch = len(emoji)
        styles = torch.tensor(style)
        canvas = color.to(self.device)[:, :, None, None].expand(-1, -1, self.resolution, self.resolution)
        pair = torch.tensor([len(row) == 2 for row in emoji])
        center = (
            torch.tensor([POSITIONS[p] for p in position]) + self._uniform(batch, 2, low=-0.04, high=0.04) * jitter
        )
        aside = torch.tensor([p != "" for p in position])
        size = torch.where(aside, 0.5, 0.8)[:, None] * (1 + self._uniform(batch, 1, low=-0.06, high=0.06) * jitter)
        size = size.expand(-1, 2)
        single = (~pair).nonzero()[:, 0]
        images = torch.empty(canvas.shape, device=self.device)
        if len(single):
            sprites = self.art.sprites(torch.tensor([emoji[i][0] for i in single]), styles[single], self.device)
            images[single] = paste(
                canvas[single], sprites, center[single].to(self.device), size[single].to(self.device)
            )
        double = pair.nonzero()[:, 0]
        if len(double):
            layer = canvas[double]
            for slot, x in enumerate((-0.48, 0.48)):
                sprites = self.art.sprites(torch.tensor([emoji[i][slot] for i in double]), styles[double], self.device)
                offset = torch.tensor([x, 0.0]) + self._uniform(len(double), 2, low=-0.03, high=0.03) * jitter
                scale = torch.full((len(double), 2), 0.47)
                layer = paste(layer, sprites, offset.to(self.device), scale.to(self.device))
            images[double] = layer
        return images.clamp(0, 1) * 2 - 1

    def autoencoder_batches(self, batch_size: int) -> Iterator[dict]:
        """`{"pixel_values": [B, 3, H, W]}`: any emoji, any style, on any color."""
        palette = torch.tensor(list(COLORS.values())) / 255
        pool = self.art.training + 7 * self.art.objects  # mostly what prompts can name
        while True:
            emoji = [
                tuple(self.random.choices(pool, k=2 if self.random.random() < 0.3 else 1)) for _ in range(batch_size)
            ]
            style = [self.random.randrange(len(STYLES)) for _ in range(batch_size)]
            color = palette[torch.randint(len(palette), (batch_size,), generator=self.generator)]
            color = (color + self._uniform(batch_size, 3, low=-0.06, high=0.06)).clamp(0, 1)
            color = torch.where(self._uniform(batch_size, 1) < 0.2, self._uniform(batch_size, 3), color)
            position = [self.random.choice(list(POSITIONS)) if self.random.random() < 0.4 else "" for _ in emoji]
            images = self.compose(emoji, style, color, position)
            yield {
                "pixel_values": torch.where(
                    self._uniform(batch_size, 1, 1, 1).to(self.device) < 0.5, images, images.flip(-1)
                )
            }

    def sample_scene(self) -> Scene:
        style, color = self.random.choice(STYLES), self.random.choice(list(COLORS))
        kind = self.random.random()
        if kind < 0.12:
            return Scene(tuple(self.random.sample(self.labels, 2)), style, color)
        position = self.random.choice([p for p in POSITIONS if p]) if kind < 0.3 else ""
        label = self.random.choice(self.labels)
        if is_held_out(label, style, color):
            return self.sample_scene()
        return Scene((label,), style, color, position)

    def caption(self, scene: Scene) -> str:
        """One of several phrasings; style and background are sometimes left for the model to choose."""
        style = self.random.choices(("adjective", "suffix", "none"), (0.4, 0.4, 0.2))[0]
        subject = " and ".join(
            with_article(label, scene.style if style == "adjective" else "") for label in scene.labels
        )
        background = f" on {with_article(scene.color)} background" if self.random.random() < 0.95 else ""
        return f"{subject}{scene.position}{background}" + (f", {scene.style} style" if style == "suffix" else "")

    def render(self, scenes: list[Scene], jitter: float = 1.0) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of the scenes."""
        color = torch.tensor([COLORS[scene.color] for scene in scenes]) / 255
        color = (color + self._uniform(len(scenes), 3, low=-0.02, high=0.02) * jitter).clamp(0, 1)
        emoji = [tuple(self.art.index[label] for label in scene.labels) for scene in scenes]
        style = [STYLES.index(scene.style) for scene in scenes]
        return self.compose(emoji, style, color, [scene.position for scene in scenes], jitter)


def held_out_scenes(labels: Sequence[str], singles: int = 52, pairs: int = 12) -> list[Scene]:
    """Scenes of the objects `labels`: triples of object, style and color kept out of training, and random pairs."""
    rng = random.Random(1)
    positions = [p for p in POSITIONS if p]
    chosen = rng.sample(triples(labels, held_out=True), singles)
    scenes = [
        Scene((label,), style, color, "" if i % 4 else positions[i // 4 % len(positions)])
        for i, (label, style, color) in enumerate(chosen)
    ]
    scenes += [
        Scene(tuple(rng.sample(list(labels), 2)), rng.choice(STYLES), rng.choice(list(COLORS))) for _ in range(pairs)
    ]
    return scenes
