"""What the bundled VILA-U is taught: to describe pictures of emoji, and to draw them.

A sample is a chat of one question and one answer about a scene of `examples.train_emoji.data`: a single object in the
middle, so that the small model has one thing to learn.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import trange

from diffusers_sana import VilaUVisionModel
from diffusers_sana.training.chats import Chat, ChatCollator
from examples.train_emoji.data import COLORS, STYLES, EmojiScenes, Scene, is_held_out, with_article


# fmt: off
# What it can draw and name: half of `COMMON_OBJECTS`, which is what a CPU can teach in an hour.
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
JITTER = 0.25  # of place, size and colour: little, so that a short training meets the same codes again
SHARE_DRAWN = 0.7  # of chats in which the model draws


def answer(question: str, scene: Scene) -> str:
    """The true answer."""
    return {
        "object": with_article(scene.labels[0]),
        "color": scene.color,
        "style": scene.style,
        "caption": scene.prompt,
    }[QUESTIONS[question]]


def drawing_chat(prompt: str, picture: Tensor) -> Chat:
    """The user asks for a picture. `picture`: its codes `[T, D]`."""
    shown = {"role": "assistant", "content": [{"type": "image", "image": picture}]}
    return [{"role": "user", "content": prompt}, shown]


def question_chat(question: str, picture: Tensor, said: str) -> Chat:
    """The user shows a picture and asks."""
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


class TowerScenes:
    """Endless captioned pictures for the tower: mostly what will be taught, for the rest all scenes there are."""

    def __init__(self, scenes: EmojiScenes):
        self.scenes = scenes

    def batches(self, batch_size: int) -> Iterator[dict]:
        """`{"pixel_values": [B, 3, H, W] in [-1, 1], "text": list of B captions}`."""
        while True:
            drawn = [
                sample_single(self.scenes) if self.scenes.random.random() < 0.75 else self.scenes.sample_scene()
                for _ in range(batch_size)
            ]
            yield {"pixel_values": self.scenes.render(drawn), "text": [self.scenes.caption(scene) for scene in drawn]}


def sample_single(scenes: EmojiScenes) -> Scene:
    """One object in the middle; never a held-out triple."""
    while True:
        rng = scenes.random
        label, style, color = rng.choice(scenes.labels), rng.choice(STYLES), rng.choice(list(COLORS))
        if not is_held_out(label, style, color):
            return Scene((label,), style, color)


class EmojiChats:
    """Endless batches of chats about scenes, whose codes come from a store of which each batch renews a part.

    Args:
        scenes: draws the pictures.
        tower: encodes them.
        size: scenes in the store.
        renewed: scenes drawn anew for each batch.
    """

    def __init__(self, scenes: EmojiScenes, tower: VilaUVisionModel, size: int, renewed: int):
        self.scenes, self.tower, self.size, self.renewed = scenes, tower.eval(), size, renewed

    def encode(self, scenes: list[Scene]) -> Tensor:
        """Codes `[B, T, D]` of the scenes."""
        pictures = self.scenes.render(scenes, JITTER).to(self.tower.device, self.tower.dtype)
        return self.tower.encode_to_codes(pictures).cpu()

    def chat(self, scene: Scene, codes: Tensor) -> Chat:
        """One of the things that can be said about a scene."""
        if self.scenes.random.random() < SHARE_DRAWN:
            return drawing_chat(self.scenes.caption(scene), codes)
        question = self.scenes.random.choice(list(QUESTIONS))
        return question_chat(question, codes, answer(question, scene))

    def batches(self, collate: ChatCollator, batch_size: int) -> Iterator[dict]:
        """What `collate` makes of `batch_size` chats."""
        described = [sample_single(self.scenes) for _ in range(self.size)]
        steps = trange(0, self.size, 64, desc="filling the store of codes", mininterval=10)
        codes = torch.cat([self.encode(described[i : i + 64]) for i in steps])
        oldest = 0
        while True:
            new = [sample_single(self.scenes) for _ in range(self.renewed)]
            places = [(oldest + i) % self.size for i in range(self.renewed)]
            oldest += self.renewed
            codes[places] = self.encode(new)
            for place, scene in zip(places, new, strict=True):
                described[place] = scene
            chosen = torch.randint(self.size, (batch_size,), generator=self.scenes.generator).tolist()
            yield collate([self.chat(described[i], codes[i]) for i in chosen])
