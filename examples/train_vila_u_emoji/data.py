"""What the bundled VILA-U is taught: to describe images of emoji, and to generate them.

A sample is a chat of one question and one answer about a scene of `scenes`: a single object in the
middle, so that the small model has one thing to learn.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import trange

from diffusers_sana import VilaUVisionModel
from diffusers_sana.training.data.chats import Chat, ChatCollator

from .scenes import EmojiScenes, Scene, triples, with_article


# fmt: off
# What it can generate and name: half of `COMMON_OBJECTS`, which is what a CPU can teach in an hour.
TAUGHT = (
    "bear", "bird", "butterfly", "cat", "crab", "dog", "dolphin", "dragon", "elephant", "fish", "flamingo", "fox",
    "frog", "giraffe", "honeybee", "horse", "koala", "lady beetle", "lion", "octopus", "owl", "panda", "penguin",
    "pig", "rabbit", "snail", "snake", "tiger", "turtle", "unicorn", "whale", "zebra", "cactus", "mushroom",
    "palm tree", "rose", "sunflower", "tulip", "avocado", "banana", "birthday cake", "carrot", "cherries", "cupcake",
    "doughnut", "french fries", "grapes", "hamburger", "ice cream", "lemon", "pineapple", "pizza", "red apple",
    "strawberry", "watermelon", "automobile", "bicycle", "bus", "helicopter", "rocket", "sailboat", "fire", "star",
    "guitar",
)
# fmt: on

# Question -> what the answer says of a scene.
QUESTIONS = {
    "What is this?": "object",
    "What does the picture show?": "object",
    "Which colour is the background?": "color",
    "What style is it drawn in?": "style",
    "Describe the picture.": "caption",
}
FRACTION_GENERATED = 0.85  # of chats in which the model generates an image


def answer(question: str, scene: Scene) -> str:
    """The true answer."""
    return {
        "object": with_article(scene.labels[0]),
        "color": scene.color,
        "style": scene.style,
        "caption": scene.prompt,
    }[QUESTIONS[question]]


def generation_chat(prompt: str, image: Tensor) -> Chat:
    """The user asks for an image. `image`: its codes `[T, D]`."""
    shown = {"role": "assistant", "content": [{"type": "image", "image": image}]}
    return [{"role": "user", "content": prompt}, shown]


def question_chat(question: str, image: Tensor, said: str) -> Chat:
    """The user shows an image and asks."""
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


class TowerScenes:
    """Endless captioned images for the tower: mostly what will be taught, for the rest all scenes there are."""

    def __init__(self, scenes: EmojiScenes):
        self.scenes = scenes

    def batches(self, batch_size: int) -> Iterator[dict]:
        """`{"pixel_values": [B, 3, H, W] in [-1, 1], "text": list of B captions}`."""
        rng, singles = self.scenes.random, single_scenes(self.scenes.labels)
        while True:
            chosen = [
                rng.choice(singles) if rng.random() < 0.75 else self.scenes.sample_scene() for _ in range(batch_size)
            ]
            yield {
                "pixel_values": self.scenes.render(chosen),
                "text": [self.scenes.caption(scene) for scene in chosen],
            }


def single_scenes(labels: Sequence[str]) -> list[Scene]:
    """Every scene of one object in the middle but the held-out ones, in random order."""
    scenes = [Scene((label,), style, color) for label, style, color in triples(labels, held_out=False)]
    random.Random(0).shuffle(scenes)
    return scenes


class EmojiChats:
    """Endless batches of chats about scenes of one object.

    Images to be generated are exact renderings, each encoded once, so a short training sees the same codes repeatedly.
    Images to be described vary in place, size and color, and come from a store of which each batch renews a part.

    Args:
        scenes: composes the images.
        tower: encodes them.
        size: scenes in the store.
        renewed: new scenes for each batch.
    """

    def __init__(self, scenes: EmojiScenes, tower: VilaUVisionModel, size: int, renewed: int):
        self.scenes, self.tower, self.size, self.renewed = scenes, tower.eval(), size, renewed
        self.singles = single_scenes(scenes.labels)

    def encode(self, scenes: list[Scene], jitter: float) -> Tensor:
        """Codes `[B, T, D]` of the scenes."""
        codes = []
        for start in trange(0, len(scenes), 64, desc="encoding scenes", mininterval=10, disable=len(scenes) < 64):
            images = self.scenes.render(scenes[start : start + 64], jitter)
            codes.append(self.tower.encode_to_codes(images.to(self.tower.device, self.tower.dtype)).cpu())
        return torch.cat(codes)

    def batches(self, collate: ChatCollator, batch_size: int) -> Iterator[dict]:
        """What `collate` makes of `batch_size` chats."""
        rng = self.scenes.random
        targets = self.encode(self.singles, jitter=0.0)
        shown = rng.choices(self.singles, k=self.size)
        codes = self.encode(shown, jitter=1.0)
        oldest = 0

        def chat() -> Chat:
            if rng.random() < FRACTION_GENERATED:
                index = rng.randrange(len(self.singles))
                return generation_chat(self.scenes.caption(self.singles[index]), targets[index])
            index, question = rng.randrange(self.size), rng.choice(list(QUESTIONS))
            return question_chat(question, codes[index], answer(question, shown[index]))

        while True:
            new = rng.choices(self.singles, k=self.renewed)
            codes[oldest : oldest + self.renewed] = self.encode(new, jitter=1.0)
            shown[oldest : oldest + self.renewed] = new
            oldest = (oldest + self.renewed) % self.size
            yield collate([chat() for _ in range(batch_size)])
