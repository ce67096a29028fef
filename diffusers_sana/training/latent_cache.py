"""Latents and text vectors computed once and kept on disk, one safetensors file an item."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm


class CachedItems(Dataset):
    """The items of a cache folder: their tensors, and `text`.

    Args:
        paths: the files, in order. Each holds `latents` `[C, h, w]`, perhaps `prompt_embeds` `[L, D]`, and the text
            in its metadata.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.sizes_of_items = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                _, height, width = file.get_slice("latents").get_shape()
            self.sizes_of_items.append((height, width))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with safe_open(self.paths[index], framework="pt") as file:
            item: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            item["text"] = file.metadata()["text"]
        return item


def fill_cache(dataset: Any, folder: str, encode: Callable[[dict[str, Any]], dict[str, Tensor]]) -> CachedItems:
    """Encode the items of a map-style `dataset` that `folder` does not hold yet, shared among the processes.

    Files are named by index: use a new folder for other data, another resolution or other encoders.

    Args:
        dataset: its items have `text`.
        folder: where the files are.
        encode: from an item to the tensors to keep.
    """
    state = PartialState()
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    paths = [root / f"{index:08d}.safetensors" for index in range(len(dataset))]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    own = missing[state.process_index :: state.num_processes]
    for index in tqdm(own, desc="encoding", disable=not state.is_main_process):
        item = dataset[index]
        tensors = {name: tensor.contiguous().cpu() for name, tensor in encode(item).items()}
        temporary = paths[index].with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"text": item["text"]})
        temporary.rename(paths[index])  # a stopped run leaves no half file behind
    state.wait_for_everyone()
    return CachedItems(paths)
