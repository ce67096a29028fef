"""Folders of safetensors files: read one tensor at a time, written one shard at a time."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusers_sana.files import read_json


FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 1024**3
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class WeightFiles:
    """The tensors of a folder: one file, or those that an index lists. The constructor reads headers only.

    Args:
        folder: with the files.
        name: of the file if there is no index.

    Attributes:
        shapes, dtypes: by key.

    Raises:
        ValueError: a file is missing, damaged or does not match the index, or a dtype is not floating-point.
    """

    def __init__(self, folder: str | Path, name: str = FILE):
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, safe_open] = {}
        index = self.folder / INDEX
        named = read_json(index)["weight_map"] if index.exists() else {}
        for file in sorted(set(named.values())) or [name]:
            self._open(file)
        absent = [key for key in named if key not in self.shapes]
        if absent:
            raise ValueError(f"{index} lists {absent[0]!r} and {len(absent) - 1} more tensors that no file has.")

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def tensor(self, key: str) -> Tensor:
        """Reads one tensor."""
        return self._files[key].get_tensor(key)

    def nbytes(self, key: str) -> int:
        """Size of a tensor."""
        return torch.Size(self.shapes[key]).numel() * self.dtypes[key].itemsize

    def _open(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{self.folder} must have the file {name!r}, but lacks it. Download the folder again.")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is incomplete: {error}. Download it again.") from error
        for key in file.keys():  # noqa: SIM118  # not a dictionary
            if key in self.shapes:
                raise ValueError(f"{path} has {key!r}, which is also in another file of the folder.")
            header = file.get_slice(key)
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {key!r} must be one of {sorted(DTYPES)}, got {header.get_dtype()}.")
            self.shapes[key], self.dtypes[key] = tuple(header.get_shape()), DTYPES[header.get_dtype()]
            self._files[key] = file


def write_weights(
    folder: Path, sizes: Iterable[tuple[str, int]], load: Callable[[str], Tensor], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes tensors as one file, or as shards with an index, with one shard in memory at a time.

    Args:
        folder: created if it does not exist.
        sizes: names and bytes, in the order of writing.
        load: returns the tensor of a name; called once per name.
        max_bytes: per shard; a single tensor may be larger.
    """
    shards: list[list[str]] = [[]]
    total = used = 0
    for name, size in sizes:
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        (folder / INDEX).unlink()  # of an earlier attempt with other shards
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else FILE
        # Copies, because safetensors rejects tensors that share memory, such as one codebook under four names.
        tensors = {name: load(name).clone(memory_format=torch.contiguous_format) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
