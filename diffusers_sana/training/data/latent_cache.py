"""Latents and text vectors computed once and kept on disk, one safetensors file per item.

A file's name is a digest of everything its tensors depend on: the image, its size, its texts, and the settings of the
encoding with the encoders' weights. So a folder may serve several runs, and nothing is ever taken for what it is not.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from diffusers_sana.files import atomic_write, digest


class CachedItems(Dataset):
    """The items of a cache folder: their tensors, and `text`.

    Args:
        paths: the files, in order. Each holds `latents` `[C, h, w]`, or `[C, T, h, w]` of a video, perhaps
            `prompt_embeds` `[L, D]`, and the text in its metadata.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.sizes_of_items = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                _, *size = file.get_slice("latents").get_shape()
            self.sizes_of_items.append(tuple(size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with safe_open(self.paths[index], framework="pt") as file:
            item: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            item["text"] = file.metadata()["text"]
        return item


def fill_cache(
    dataset: Any, folder: str, encode: Callable[[dict[str, Any]], dict[str, Tensor]], settings: Mapping[str, Any]
) -> CachedItems:
    """Encode the items of a map-style `dataset` that `folder` does not hold yet, shared among the processes.

    Args:
        dataset: its items have `text`; `dataset.made_from(index)` says in JSON's values what an item depends on.
        folder: where the files are. Those of other items or settings stay there.
        encode: from an item to the tensors to keep.
        settings: all that `encode` depends on besides the item, in JSON's values; of models their `model_digest`.
    """
    state = PartialState()
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    of_settings = digest(dict(settings))
    records = [json.dumps(dataset.made_from(index), sort_keys=True) for index in range(len(dataset))]
    paths = [root / f"{digest(of_settings, record)}.safetensors" for record in records]
    own = range(state.process_index, len(paths), state.num_processes)
    missing = [index for index in own if not paths[index].exists()]
    for index in tqdm(missing, desc="encoding", disable=not state.is_main_process):
        item = dataset[index]
        tensors = {name: tensor.contiguous().cpu() for name, tensor in encode(item).items()}
        with atomic_write(paths[index]) as temporary:
            save_file(tensors, temporary, metadata={"text": item["text"], "made_from": records[index]})
    state.wait_for_everyone()
    return CachedItems(paths)


def model_digest(model: Any) -> str | None:
    """A name of a model of diffusers or transformers: of its configuration and its weights; None for None."""
    if model is None:
        return None
    config = dict(model.config) if isinstance(model.config, Mapping) else model.config.to_dict()
    known = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    found = [json.dumps(known, sort_keys=True, default=str)]
    for name, tensor in sorted(model.state_dict().items()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.append(digest([name, str(tensor.dtype), list(tensor.shape)], content))
    return digest(found)


def tokenizer_digest(tokenizer: Any) -> str:
    """A name of what a fast tokenizer makes of texts."""
    return digest(json.loads(tokenizer.backend_tokenizer.to_str()))
