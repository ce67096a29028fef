"""Chats with pictures, as VILA-U is trained on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel


Chat = list[dict[str, Any]]


class ChatFolder(Dataset):
    """The chats of `folder/chats.jsonl`, a list of messages a line, whose pictures are files of the folder.

    Attributes:
        pictures: path of every picture, by the name it has in the chats.
        codes: codes `[T, D]` by the same names, once somebody has set them: the items then have these as pictures.

    Raises:
        ValueError: there are no chats, or a picture is not there.
    """

    def __init__(self, folder: str | Path):
        file = Path(folder, "chats.jsonl")
        if not file.exists():
            raise ValueError(f"`data` must be a folder with chats.jsonl, got {str(folder)!r}. Check the path.")
        self.chats: list[Chat] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        names = sorted({part["image"] for chat in self.chats for part in picture_parts(chat)})
        self.pictures = {name: Path(folder, name) for name in names}
        self.codes: dict[str, Tensor] = {}
        absent = [name for name, path in self.pictures.items() if not path.exists()]
        if not self.chats or absent:
            what = f"{len(absent)} of the pictures, {absent[0]!r} first" if absent else "any chat"
            raise ValueError(f"{file} lacks {what}. Give paths relative to its folder.")
        self.sizes_of_items = [(1, 1)] * len(self.chats)  # any chats can make a batch

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> Chat:
        return with_pictures(self.chats[index], self.codes or {n: str(path) for n, path in self.pictures.items()})


class ChatCollator:
    """Makes a batch of chats: the arguments of `VilaUForConditionalGeneration.forward`, `labels` among them.

    Args:
        processor: of the model.
        caption_dropout: share of the prompts of pictures that are emptied, so that the model also learns to draw
            without a prompt, which guidance needs. Drawn from PyTorch's global generator.
    """

    def __init__(self, processor: VilaUProcessor, caption_dropout: float = 0.0):
        self.processor, self.caption_dropout = processor, caption_dropout

    def __call__(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        dropped = torch.rand(len(chats)) < self.caption_dropout
        rows = [without_prompt(chat) if drop else chat for chat, drop in zip(chats, dropped.tolist(), strict=True)]
        return dict(self.processor.apply_chat_template(rows, tokenize=True, return_dict=True, output_labels=True))


def picture_parts(chat: Chat) -> list[dict[str, Any]]:
    """The parts of the messages that are pictures."""
    contents = [message["content"] for message in chat if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] == "image"]


def with_pictures(chat: Chat, pictures: dict[str, Any]) -> Chat:
    """The chat with `pictures[name]` wherever a picture has a name."""

    def replaced(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"image": pictures[part["image"]]} if part["type"] == "image" else part

    return [
        message
        if isinstance(message["content"], str)
        else message | {"content": [replaced(part) for part in message["content"]]}
        for message in chat
    ]


def without_prompt(chat: Chat) -> Chat:
    """The chat with nothing in the user's turn, if it is one prompt of text and one answer that shows a picture."""
    if [message["role"] for message in chat[-2:]] != ["user", "assistant"] or len(chat) != 2:
        return chat
    asked, answered = picture_parts(chat[:1]), picture_parts(chat[1:])
    return [chat[0] | {"content": ""}, chat[1]] if answered and not asked else chat


@torch.no_grad()
def encode_pictures(
    pictures: dict[str, Path], tower: VilaUVisionModel, image_processor: Any, file: Path, batch_size: int = 32
) -> dict[str, Tensor]:
    """Codes `[T, D]` of picture files, by their names.

    They are kept in `file`, and taken from there when it has them all: use a new one for another tower or other files.

    Args:
        pictures: name -> path.
        tower: encodes them.
        image_processor: of the model.
        file: a safetensors file to write.
        batch_size: pictures encoded at a time.
    """
    if file.exists():
        codes = load_file(file)
        if pictures.keys() <= codes.keys():
            return {name: codes[name] for name in pictures}
    names, codes = list(pictures), {}
    tower.eval()
    for start in tqdm(range(0, len(names), batch_size), desc="encoding pictures"):
        batch = names[start : start + batch_size]
        images = image_processor.fetch_images([str(pictures[name]) for name in batch])
        pixels = image_processor(images, return_tensors="pt")["pixel_values"]
        codes |= dict(zip(batch, tower.encode_to_codes(pixels.to(tower.device, tower.dtype)).cpu(), strict=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in codes.items()}, partial)
    partial.replace(file)
    return codes
