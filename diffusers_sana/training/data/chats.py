"""Chats with images, as VILA-U is trained on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from diffusers_sana.files import atomic_write, digest, read_json_lines
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel
from diffusers_sana.training.data.latent_cache import model_digest
from diffusers_sana.training.data.metadata import inside
from diffusers_sana.training.data.sources import file_stamp


Chat = list[dict[str, Any]]


class ChatFolder(Dataset):
    """The chats of `folder/chats.jsonl`, one list of messages per line, whose images are files of the folder.

    Attributes:
        images: path of every image, by the name it has in the chats.
        codes: codes `[T, D]` by the same names, once they are set: the items then have these as images.

    Args:
        folder: with chats.jsonl.
        allow_outside: also take images outside of the folder that the chats name.

    Raises:
        ValueError: there are no chats, a line is none, or an image is not there or outside of the folder.
    """

    def __init__(self, folder: str | Path, allow_outside: bool = False):
        file, root = Path(folder, "chats.jsonl"), Path(folder)
        if not file.exists():
            raise ValueError(f"`data` must be a folder with chats.jsonl, got {str(folder)!r}. Check the path.")
        self.chats: list[Chat] = []
        self.images: dict[str, Path] = {}
        for number, chat in read_json_lines(file):
            where = f"{str(file)!r}, line {number}"
            try:
                names = [_string(part["image"]) for part in image_parts(chat)]
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{where}: a line must be a list of messages with `role` and `content`, a string or a list of"
                    f" parts with `type`; wrong is {error}."
                ) from None
            self.images |= {name: inside(root / name, root, where, allow_outside) for name in names}
            self.chats.append(chat)
        self.codes: dict[str, Tensor] = {}
        absent = [name for name, path in self.images.items() if not path.exists()]
        if not self.chats or absent:
            what = f"{len(absent)} of the images, {absent[0]!r} first" if absent else "any chat"
            raise ValueError(f"{file} lacks {what}. Give paths relative to its folder.")
        self.sizes_of_items = [(1, 1)] * len(self.chats)  # any chats can make a batch

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> Chat:
        return with_images(self.chats[index], self.codes or {n: str(path) for n, path in self.images.items()})


class ChatCollator:
    """Makes a batch of chats: the arguments of `VilaUForConditionalGeneration.forward`, `labels` among them.

    Args:
        processor: of the model.
        caption_dropout: fraction of the prompts of images that are emptied, so that the model also learns to
            generate without a prompt, which guidance needs. Sampled by PyTorch's global generator.
    """

    def __init__(self, processor: VilaUProcessor, caption_dropout: float = 0.0):
        self.processor, self.caption_dropout = processor, caption_dropout

    def __call__(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        dropped = torch.rand(len(chats)) < self.caption_dropout
        rows = [without_prompt(chat) if drop else chat for chat, drop in zip(chats, dropped.tolist(), strict=True)]
        return dict(self.processor.apply_chat_template(rows, tokenize=True, return_dict=True, output_labels=True))


def image_parts(chat: Chat) -> list[dict[str, Any]]:
    """The parts of the messages that are images."""
    contents = [message["content"] for message in chat if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] == "image"]


def with_images(chat: Chat, images: dict[str, Any]) -> Chat:
    """The chat with `images[name]` wherever an image has a name."""

    def replaced(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"image": images[part["image"]]} if part["type"] == "image" else part

    return [
        message
        if isinstance(message["content"], str)
        else message | {"content": [replaced(part) for part in message["content"]]}
        for message in chat
    ]


def without_prompt(chat: Chat) -> Chat:
    """The chat with nothing in the user's turn, if it is one prompt of text and one answer that shows an image."""
    if [message["role"] for message in chat[-2:]] != ["user", "assistant"] or len(chat) != 2:
        return chat
    asked, answered = image_parts(chat[:1]), image_parts(chat[1:])
    return [chat[0] | {"content": ""}, chat[1]] if answered and not asked else chat


@torch.no_grad()
def encode_images(
    images: dict[str, Path], tower: VilaUVisionModel, image_processor: Any, file: Path, batch_size: int = 32
) -> dict[str, Tensor]:
    """Codes `[T, D]` of image files, by their names.

    They are kept in `file`, with what they were made from: those of changed images are encoded again, and all of them
    for another tower or processor. Of several processes the first encodes, and the others read.

    Args:
        images: name -> path.
        tower: encodes them.
        image_processor: of the model.
        file: a safetensors file.
        batch_size: images encoded at a time.
    """
    settings = digest(model_digest(tower), json.dumps(image_processor.to_dict(), sort_keys=True, default=str))
    stamps = {name: digest(settings, file_stamp(path)) for name, path in images.items()}
    with PartialState().main_process_first():
        codes = _kept_codes(file, stamps)
        names = [name for name in images if name not in codes]
        tower.eval()
        for start in tqdm(range(0, len(names), batch_size), desc="encoding images", disable=not names):
            batch = names[start : start + batch_size]
            loaded = image_processor.fetch_images([str(images[name]) for name in batch])
            pixels = image_processor(loaded, return_tensors="pt")["pixel_values"]
            codes |= dict(zip(batch, tower.encode_to_codes(pixels.to(tower.device, tower.dtype)).cpu(), strict=True))
        if names:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                tensors = {name: value.contiguous() for name, value in codes.items()}
                save_file(tensors, temporary, metadata={"made_from": json.dumps(stamps)})
    return {name: codes[name] for name in images}


def _kept_codes(file: Path, stamps: dict[str, str]) -> dict[str, Tensor]:
    """The codes in a file that were made from what `stamps` says."""
    if not file.exists():
        return {}
    with safe_open(file, framework="pt") as kept:
        made_from = json.loads((kept.metadata() or {}).get("made_from", "{}"))
        return {name: kept.get_tensor(name) for name, stamp in stamps.items() if made_from.get(name) == stamp}


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(repr(value))
    return value
