"""Several captions per image, of which one is sampled each epoch, the better ones more often (arXiv 2410.10629).

`captions.jsonl` in a folder of images has one line per image:

    {"file_name": "a.png", "captions": [{"model": "original", "text": "a cat", "clip_score": 27.1}, ...]}

`clip_score` is 100 times the cosine of CLIP's embeddings of image and text, or null where it was not measured.
`examples/caption_images.py` writes such files. Several lines of one image count together, and of several captions by
one model the last counts: so a program that captions may add lines to the end.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_sana.files import read_json_lines
from diffusers_sana.training.config import check_choice


CAPTIONS_FILE = "captions.jsonl"
WEIGHTINGS = ("power", "softmax")


@dataclass(frozen=True)
class Caption:
    """What one model says about an image.

    Attributes:
        model: its name; "original" for a caption the image came with.
        text: the caption.
        clip_score: 100 times the cosine of CLIP's embeddings of image and text; None: not measured.
        made_from: a digest of the image and the settings that the text was made from; "" if nobody knows.
        scored_from: a digest of the image and the CLIP that the score was made from.
    """

    model: str
    text: str
    clip_score: float | None = None
    made_from: str = ""
    scored_from: str = ""


def caption_line(file_name: str, captions: Iterable[Caption]) -> str:
    """A line of `captions.jsonl`, with its end."""
    optional = ("made_from", "scored_from")
    entries = [
        {key: value for key, value in asdict(caption).items() if value or key not in optional} for caption in captions
    ]
    row = {"file_name": file_name, "captions": entries}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_captions(path: Path) -> dict[str, list[Caption]]:
    """The captions of each image of a `captions.jsonl`, in the order of the file.

    Half a line at the end, which a killed program leaves, does not count; nor does an image without captions.

    Raises:
        ValueError: a line is not as above; the message names the file and the line.
    """
    found: dict[str, dict[str, Caption]] = {}
    for number, row in read_json_lines(path, may_be_torn=True):
        try:
            by_model = found.setdefault(_string(row["file_name"]), {})
            for caption in row["captions"]:
                by_model[_string(caption["model"])] = Caption(
                    caption["model"],
                    _string(caption["text"]),
                    caption.get("clip_score"),
                    caption.get("made_from", ""),
                    caption.get("scored_from", ""),
                )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r}, line {number}: a line must have `file_name` and a list of `captions` with `model` and"
                f" `text`, which are strings; wrong is {error}."
            ) from None
    return {file_name: list(by_model.values()) for file_name, by_model in found.items() if by_model}


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(repr(value))
    return value


def best_caption(captions: Sequence[Caption]) -> Caption:
    """The one of the highest score; the first, where there are no scores."""
    return max(captions, key=lambda caption: -1.0 if caption.clip_score is None else caption.clip_score)


def caption_probabilities(
    captions: Sequence[Caption], weighting: str = "power", temperature: float = 0.1, threshold: float = 25.0
) -> Tensor:
    """The probability of each of an image's captions: `[len(captions)]`, fp64, of sum 1.

    Args:
        captions: of one image. Without scores all are equally probable.
        weighting: of a score c and temperature t: "power" c^(1/t), as in Sana's released code; "softmax" exp(c / t),
            as in the paper. Either is divided by the sum over the captions.
        temperature: the lower, the more the best caption is preferred. Scores are up to 100: what 0.1 is to "power"
            is about 2.5 to "softmax", where 0.1 leaves hardly any but the best.
        threshold: captions with a lower score are not sampled; where all are lower, the best one is. 0 keeps all.

    Raises:
        ValueError: where only some of the captions have a score.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}. Use a small number for the best caption.")
    measured = [caption.clip_score for caption in captions if caption.clip_score is not None]
    if not measured:
        return torch.full((len(captions),), 1 / len(captions), dtype=torch.float64)
    if len(measured) < len(captions):
        raise ValueError(
            f"`captions` must all have a `clip_score`, or none, got {len(measured)} scores of {len(captions)}, one of "
            f"them of {captions[0].text!r}. Run examples/caption_images.py with --clip."
        )
    scores = torch.tensor(measured, dtype=torch.float64)
    logits = (scores if weighting == "softmax" else scores.clamp(min=1e-6).log()) / temperature
    dropped = scores < min(threshold, max(measured))
    return logits.masked_fill(dropped, -torch.inf).softmax(0)


def embeds_name(number: int) -> str:
    """What a latent cache calls the text vectors of an image's `number`-th caption."""
    return f"prompt_embeds.{number}"


class SampledCaptions(Dataset):
    """Items of which each has, in each epoch, one of its captions, sampled by seed, epoch and index.

    It is indexed by pairs (epoch, index); `training.data.batches.make_loader` does so.

    Args:
        items: map-style, with `sizes_of_items`. The `text` of an item is replaced; of text vectors named as by
            `embeds_name`, those of the sampled caption become `prompt_embeds`.
        captions: of each item.
        seed: of the sampling.
        weighting, temperature, threshold: see `caption_probabilities`.
    """

    def __init__(
        self,
        items: Any,
        captions: Sequence[Sequence[Caption]],
        seed: int = 0,
        weighting: str = "power",
        temperature: float = 0.1,
        threshold: float = 25.0,
    ):
        self.items, self.captions, self.seed = items, captions, seed
        self.sizes_of_items = items.sizes_of_items
        self.probabilities = [
            caption_probabilities(of_item, weighting, temperature, threshold).numpy() for of_item in captions
        ]

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, epoch: int, index: int) -> int:
        """The number of the caption that an item has in an epoch."""
        generator = np.random.default_rng((self.seed, epoch, index))
        return int(generator.choice(len(self.captions[index]), p=self.probabilities[index]))

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        epoch, index = at
        number, item = self.sample(epoch, index), self.items[index]
        cached = {name for name in item if name.startswith("prompt_embeds")}
        if cached and embeds_name(number) not in cached:
            raise ValueError(
                f"`cache_dir` holds text vectors of {len(cached)} captions of item {index}, which has "
                f"{len(self.captions[index])}. Fill the cache from the same captions."
            )
        sampled = {name: value for name, value in item.items() if name not in cached | {"texts"}}
        sampled["text"] = self.captions[index][number].text
        if cached:
            sampled["prompt_embeds"] = item[embeds_name(number)]
        return sampled
