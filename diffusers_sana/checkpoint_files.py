"""Checks of checkpoint files, with errors that name the damaged file, which the hosts' loaders mostly do not.

Only headers and small files are read; weights stay on disk.
"""

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


logger = logging.getLogger(__name__)

AGAIN = "Download it again."
# Arguments of `from_pretrained` and its relatives that `huggingface_hub` takes.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: naming the file, if it is damaged or does not contain an object.
    """
    value = _read(file)
    if not isinstance(value, dict):
        raise OSError(f"{file} must contain a JSON object, got {type(value).__name__}. {AGAIN}")
    return value


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Prefixes errors about the content of a local JSON file with its name.

    Raises:
        OSError: the file is damaged.
        ValueError: any other error.
    """
    try:
        yield
    except Exception as error:
        if not file.is_file():
            raise
        read_object(file)
        raise ValueError(f"{file}: {error}") from error


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        OSError: naming the file, if it is truncated or otherwise damaged.
    """
    return {name: tuple(tensor.shape) for name, tensor in meta_tensors(file).items()}


def meta_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file without their numbers, on the meta device, from its header.

    Raises:
        OSError: naming the file where it is cut off or otherwise damaged.
    """
    tensors = {}
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                piece = content.get_slice(name)
                shape = piece.get_shape()
                first = piece[:0] if shape else content.get_tensor(name)  # a scalar has no slices
                tensors[name] = torch.empty(shape, dtype=first.dtype, device="meta")
            return tensors
    except SafetensorError as error:
        raise OSError(f"{file} is damaged or truncated: {error}. {AGAIN}") from error


def read_shards(index: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the safetensors files that an index lists; empty for other formats.

    Raises:
        OSError: naming a file that is missing or damaged, or an index that does not match the files.
    """
    content = read_object(index)
    if not isinstance(content.get("metadata"), dict):  # the hosts write to it
        raise OSError(f"`metadata` of {index} must be an object. {AGAIN}")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise OSError(f"`weight_map` of {index} must be an object that states the file of each tensor. {AGAIN}")
    shapes = {}
    for shard in sorted(set(names.values())):
        file = index.parent / shard
        if not file.is_file():
            raise OSError(f"{file}, which {index.name} lists, is missing. {AGAIN}")
        if file.suffix == ".safetensors":
            shapes[shard] = tensor_shapes(file)
    wrong = [name for name, shard in names.items() if shard in shapes and name not in shapes[shard]]
    wrong += [name for shard in shapes for name in shapes[shard] if names.get(name) != shard]
    if wrong:
        raise OSError(
            f"{index} does not match its files for {len(wrong)} tensors, such as {sorted(wrong)[0]!r}. {AGAIN}"
        )
    return {name: shape for shard in shapes.values() for name, shape in shard.items()}


def check_readable(folder: Path) -> None:
    """Raises if a JSON or safetensors file in `folder` or in a subfolder is truncated or otherwise damaged.

    Raises:
        OSError: naming the damaged file.
    """
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.suffix == ".safetensors":
            tensor_shapes(file)
        elif ".index." in file.name and file.suffix == ".json":
            read_shards(file)
        elif file.name.endswith(("config.json", "model_index.json")):
            read_object(file)
        elif file.suffix == ".json":
            _read(file)


def check_hub_options(path: Path, download: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Options for a download that are not needed, because the checkpoint is here: right ones, or an error.

    Args:
        path: of the checkpoint.
        download: the function of `huggingface_hub` that would have had the options.
        options: by name. `revision` has no effect on a local file, which a warning says.

    Raises:
        TypeError: naming an option that the function does not have.
    """
    options = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(download).parameters.keys() | {"proxies"}  # which older versions have
    if unknown := sorted(options.keys() - known):
        raise TypeError(
            f"`{unknown[0]}` is neither an argument here nor one of `huggingface_hub.{download.__name__}`, which has"
            f" {sorted(known)}."
        )
    if "revision" in options:
        logger.warning(f"`revision` {options['revision']!r} has no effect: {path} is not on the Hub.")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # errors of JSON and of text encodings are ValueErrors
        raise OSError(f"{file} is damaged: {error}. {AGAIN}") from error
