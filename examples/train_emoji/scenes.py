"""Captioned scenes of 256 px, composed on the fly from emoji art: what the bundled models at 256 px learn.

A scene is one object (large or small, or small at one of four sides), two different objects side by side, or two or
three equal ones, in one of two styles on a plain background. Its caption says which, in one of several phrasings.

An autoencoder of a few million parameters has to know every image by heart, so there is little to know: objects come
in two sizes, colors do not vary, and every offset is a multiple of `GRID`. The autoencoder makes one token of each
square of that side, so a token sees the same squares again and again, wherever its object stands.
"""

import io
import json
import random
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_sana.files import digest


RESOLUTION = 256
GRID = 32  # pixels of a token's side: an autoencoder f32
LARGE, SMALL = 192, 128  # sides of an object
STYLES = ("3d", "flat")
# Muted, so that objects of the same color still stand out.
COLORS = {
    "red": (222, 92, 86),
    "orange": (244, 164, 88),
    "yellow": (250, 222, 120),
    "green": (128, 192, 128),
    "blue": (116, 168, 232),
    "purple": (164, 132, 212),
    "pink": (246, 180, 204),
    "gray": (152, 152, 156),
    "black": (36, 36, 40),
    "white": (250, 250, 250),
}
# Top left corners (x, y) of small objects, by the words of the position ...
SIDES = {"left": (0, 64), "right": (128, 64), "top": (64, 0), "bottom": (64, 128)}
CORNERS = {"center": (64, 64), **SIDES}
# ... and, of several objects, by their number, in the order in which they are named.
CORNERS_OF = {2: ((0, 64), (128, 64)), 3: ((64, 0), (0, 128), (128, 128))}
NUMBERS = {2: "two", 3: "three"}
IRREGULAR = {
    **{word: word for word in ("deer", "fish", "jellyfish", "moose", "shrimp", "tropical fish")},
    "maple leaf": "maple leaves",
    "mouse": "mice",
    "tomato": "tomatoes",
    "wolf": "wolves",
}
# Words without an article, which are not counted.
UNCOUNTED = {"bacon", "blueberries", "bread", "broccoli", "cheese", "cherries", "french fries", "garlic", "grapes"}
UNCOUNTED |= {"pancakes", "popcorn"}


# fmt: off
# Words for prompts -> label in emojibase, where it is another. Chosen from 1,604 emoji by eye: things that anybody can
# name at sight, that do not depend on writing, and that no other one resembles (one of tiger and leopard, say).
OBJECTS = {name: name for name in (
    "gorilla", "wolf", "fox", "raccoon", "lion", "unicorn", "zebra", "deer", "moose", "goat", "camel", "llama",
    "giraffe", "elephant", "rhinoceros", "hedgehog", "bat", "bear", "polar bear", "koala", "panda", "sloth",
    "kangaroo", "skunk", "seal", "chicken", "rooster", "penguin", "eagle", "duck", "swan", "owl", "flamingo",
    "peacock", "parrot", "frog", "crocodile", "turtle", "lizard", "snake", "dolphin", "shark", "fish", "tropical fish",
    "octopus", "jellyfish", "crab", "lobster", "shrimp", "snail", "butterfly", "ant", "scorpion",
    "cherry blossom", "rose", "sunflower", "tulip", "potted plant", "palm tree", "cactus", "maple leaf", "mushroom",
    "grapes", "watermelon", "tangerine", "lemon", "banana", "pineapple", "pear", "peach", "cherries", "strawberry",
    "blueberries", "tomato", "coconut", "avocado", "eggplant", "carrot", "bell pepper", "cucumber", "broccoli",
    "garlic", "bread", "croissant", "pretzel", "pancakes", "waffle", "bacon", "hamburger", "french fries", "pizza",
    "hot dog", "sandwich", "taco", "egg", "popcorn", "cookie", "birthday cake", "cupcake", "candy", "lollipop",
    "teapot", "wine glass", "beer mug", "bus", "ambulance", "police car", "taxi", "tractor", "bicycle", "skateboard",
    "roller skate", "anchor", "sailboat", "ship", "helicopter", "rocket", "rainbow", "star", "fire",
    "soccer ball", "baseball", "basketball", "saxophone", "trumpet", "accordion", "guitar", "violin", "drum",
    "ghost", "robot", "christmas tree", "balloon", "trophy", "teddy bear", "crown", "top hat", "bell", "camera",
    "light bulb", "key", "bomb", "magnet", "chair", "alarm clock", "castle", "backpack", "dress",
)} | {
    "dog": "dog face", "cat": "cat face", "monkey": "monkey face", "tiger": "tiger face", "cow": "cow face",
    "pig": "pig face", "mouse": "mouse face", "rabbit": "rabbit face", "chick": "baby chick", "horse": "horse",
    "dinosaur": "sauropod", "dragon": "dragon face", "whale": "spouting whale", "bee": "honeybee",
    "ladybug": "lady beetle", "pine tree": "evergreen tree", "apple": "red apple", "kiwi": "kiwi fruit",
    "cheese": "cheese wedge", "donut": "doughnut", "cocktail": "cocktail glass", "fire truck": "fire engine",
    "car": "automobile", "scooter": "motor scooter", "ufo": "flying saucer", "moon": "crescent moon",
    "planet": "ringed planet", "umbrella": "closed umbrella", "water drop": "droplet", "football": "american football",
    "piano": "musical keyboard", "pumpkin": "jack-o-lantern", "gift": "wrapped gift", "diamond": "gem stone",
    "train": "locomotive",
}
# fmt: on


def with_article(words: str) -> str:
    """`words` with "a" or "an", but those of `UNCOUNTED` as they are."""
    if words.endswith(tuple(UNCOUNTED)):
        return words
    is_vowel = words[0] in "aeiou" and not words.startswith(("ufo", "unicorn"))
    return f"{'an' if is_vowel else 'a'} {words}"


def plural(word: str) -> str:
    """Of an object's word."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return IRREGULAR.get(word, word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s"))


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Attributes:
        objects: words for the objects: one, or two different ones from left to right, or two or three equal ones.
        style: one of `STYLES`.
        color: of the background, one of `COLORS`.
        position: of one small object, one of `CORNERS`; "" for a large one, in the middle.
    """

    objects: tuple[str, ...]
    style: str
    color: str
    position: str = ""

    @property
    def kind(self) -> str:
        """ "object", "small", "position", "pair" or "count"."""
        if len(self.objects) > 1:
            return "pair" if len(set(self.objects)) > 1 else "count"
        return "position" if self.position in SIDES else "small" if self.position else "object"

    @property
    def prompt(self) -> str:
        """The full caption. Training also sees other phrasings, see `caption`."""
        return f"{self._subject('')} on {with_article(self.color)} background, {self.style} style"

    def caption(self, rng: random.Random) -> str:
        """One of several phrasings. Style and background are sometimes left for the model to choose."""
        manner = rng.choices(("adjective", "suffix", "none"), (0.3, 0.6, 0.1))[0]
        subject = self._subject(f"{self.style} " if manner == "adjective" else "", rng)
        on = f" on {with_article(self.color)} background"
        background = rng.choices((on, f", {self.color} background", ""), (0.8, 0.15, 0.05))[0]
        return subject + background + (f", {self.style} style" if manner == "suffix" else "")

    def _subject(self, adjective: str, rng: random.Random | None = None) -> str:
        """Objects with their number, size and position; the first phrasing of each kind without `rng`."""

        def one_of(*phrasings: str) -> str:
            return phrasings[0] if rng is None else rng.choice(phrasings)

        first, last = self.objects[0], self.objects[-1]
        if self.kind == "count":
            return f"{NUMBERS[len(self.objects)]} {adjective}{plural(first)}"
        if self.kind == "pair":
            left, right = with_article(adjective + first), with_article(adjective + last)
            return one_of(
                f"{left} on the left and {right} on the right",
                f"{left} to the left of {right}",
                f"{right} to the right of {left}",
                f"{left} and {right}",
            )
        if self.kind == "position":
            where = f"{'on' if self.position in ('left', 'right') else 'at'} the {self.position}"
            return f"{with_article(adjective + first)} {where}"
        if self.kind == "small":
            return with_article(f"{one_of('small', 'little')} {adjective}{first}")
        return with_article(f"{one_of('', '', '', 'large ', 'big ')}{adjective}{first}")


def is_held_out(scene: Scene) -> bool:
    """Whether no training of the transformer may show this scene: one in sixteen sets of objects, style and color.

    Position, size and order do not matter, so what is held out has not been seen in any arrangement.
    """
    key = "/".join([*sorted(scene.objects), scene.style, scene.color])
    return zlib.crc32(key.encode()) % 16 == 0


TRIES = 10_000  # one scene in sixteen is held out


class Scenes:
    """Scenes at random. `kinds`: how often each kind comes, in any unit."""

    KINDS: Mapping[str, float] = {"object": 0.4, "small": 0.05, "position": 0.15, "pair": 0.3, "count": 0.1}

    def __init__(self, objects: list[str], seed: int = 0, kinds: Mapping[str, float] = KINDS):
        self.objects, self.kinds = list(objects), dict(kinds)
        self._countable = [word for word in objects if word not in UNCOUNTED]
        self.random = random.Random(seed)

    def sample(self, held_out: bool | None = False) -> Scene:
        """A scene that is or is not held out; None takes either.

        Raises:
            ValueError: the objects have no such scene.
        """
        for _ in range(TRIES):
            kind = self.random.choices(list(self.kinds), list(self.kinds.values()))[0]
            style, color = self.random.choice(STYLES), self.random.choice(list(COLORS))
            known = self._countable if kind == "count" else self.objects
            objects = tuple(self.random.sample(known, 2 if kind == "pair" else 1))
            if kind == "count":
                objects *= self.random.choice(list(NUMBERS))
            position = self.random.choice(list(SIDES)) if kind == "position" else "center" if kind == "small" else ""
            scene = Scene(objects, style, color, position)
            if held_out is None or is_held_out(scene) == held_out:
                return scene
        wanted = "held out" if held_out else "not held out"
        raise ValueError(f"`objects` must have scenes of {list(self.kinds)} that are {wanted}, got {self.objects}.")


# How many prompts of each kind the models are judged by; see `held_out_scenes`.
HELD_OUT = {"object": 40, "position": 20, "pair": 24, "count": 16}


def held_out_scenes(objects: list[str], kinds: Mapping[str, int] = HELD_OUT, seed: int = 0) -> list[Scene]:
    """So many held-out scenes of each kind, one seed always the same; no object comes first twice in a kind."""
    scenes: list[Scene] = []
    for i, (kind, count) in enumerate(kinds.items()):
        source = Scenes(objects, seed + i, {kind: 1})
        chosen: dict[str, Scene] = {}
        for _ in range(2_000):
            scene = source.sample(held_out=True)
            chosen.setdefault(scene.objects[0], scene)
            if len(chosen) == count:
                break
        else:
            raise ValueError(f"`kinds` must not ask for more than there is, got {count} of {kind!r}: ask for less.")
        scenes += chosen.values()
    return scenes


class Art:
    """All objects of a pack in memory, at both sizes: `[objects, styles, 4, side, side]`, uint8, premultiplied."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        with zipfile.ZipFile(path) as pack:
            self.objects: list[str] = [row["object"] for row in json.loads(pack.read("metadata.json"))]
            images = [
                Image.open(io.BytesIO(pack.read(f"{style}/{word}.webp"))).convert("RGBa")
                for word in self.objects
                for style in STYLES
            ]
        self.index = {word: i for i, word in enumerate(self.objects)}
        self.digest = digest(Path(path))
        self.device = device
        self.pixels: dict[int, Tensor] = {}
        for side in (LARGE, SMALL):
            resized = [np.asarray(image.resize((side, side), Image.Resampling.BOX)) for image in images]
            pixels = torch.from_numpy(np.stack(resized)).movedim(-1, 1)
            self.pixels[side] = pixels.unflatten(0, (-1, len(STYLES))).contiguous().to(device)


def placement(scene: Scene) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Side of the objects, and the corner (x, y) of each."""
    if len(scene.objects) > 1:
        return SMALL, CORNERS_OF[len(scene.objects)]
    if scene.position:
        return SMALL, (CORNERS[scene.position],)
    return LARGE, (((RESOLUTION - LARGE) // 2,) * 2,)


def render(art: Art, scenes: list[Scene]) -> Tensor:
    """Images `[B, 3, 256, 256]` in [-1, 1] on the device of `art`."""
    colors = torch.tensor([COLORS[scene.color] for scene in scenes], dtype=torch.float32, device=art.device)
    images = colors[:, :, None, None].repeat(1, 1, RESOLUTION, RESOLUTION)
    # What stands in one place is pasted at once.
    places: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        side, corners = placement(scene)
        for word, (x, y) in zip(scene.objects, corners, strict=True):
            places[side, x, y].append((i, art.index[word], STYLES.index(scene.style)))
    for (side, x, y), rows in places.items():
        where, objects, styles = torch.tensor(rows, device=art.device).unbind(1)
        sprites = art.pixels[side][objects, styles].float()
        window = (where, slice(None), slice(y, y + side), slice(x, x + side))
        images[window] = images[window] * (1 - sprites[:, 3:] / 255) + sprites[:, :3]
    return images.clamp_(0, 255).div_(127.5).sub_(1)


def crop(images: Tensor, scenes: list[Scene], side: int, rng: random.Random) -> Tensor:
    """A square `[B, 3, side, side]` of each image, on the token grid, that shows most of one of its objects.

    One in eight lies anywhere, or plain backgrounds would never be learned.
    """
    parts = []
    for image, scene in zip(images, scenes, strict=True):
        object_side, corners = placement(scene)
        corner = rng.choice(corners)
        low, high = (0, object_side - side) if object_side > side else (-GRID, GRID)
        if rng.random() < 1 / 8:
            corner, low, high = (0, 0), 0, RESOLUTION - side
        x, y = (min(max(start + rng.randrange(low, high + 1, GRID), 0), RESOLUTION - side) for start in corner)
        parts.append(image[:, y : y + side, x : x + side])
    return torch.stack(parts)


def image_batches(
    art: Art, batch_size: int, side: int = RESOLUTION, seed: int = 0, kinds: Mapping[str, float] = Scenes.KINDS
) -> Iterator[dict[str, Tensor]]:
    """Endless batches `{"pixel_values": [B, 3, side, side]}` for the autoencoder, which may see every scene."""
    source = Scenes(art.objects, seed, kinds)
    while True:
        scenes = [source.sample(held_out=None) for _ in range(batch_size)]
        images = render(art, scenes)
        yield {"pixel_values": crop(images, scenes, side, source.random) if side < RESOLUTION else images}
