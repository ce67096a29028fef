"""Files of checkpoints that are damaged or contradict each other, named: the hosts' loaders mostly do not say which.

What is checked is read from headers and small files; weights stay on disk.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


AGAIN = "Download it again."


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: naming the file where it is damaged, or holds something else than an object.
    """
    value = _read(file)
    if not isinstance(value, dict):
        raise OSError(f"{file} must hold a JSON object, got {type(value).__name__}. {AGAIN}")
    return value


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Puts the name of a local JSON file before an error about what is in it.

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
        OSError: naming the file where it is cut off or otherwise damaged.
    """
    try:
        with safe_open(file, framework="pt") as content:
            names = content.keys()
            return {name: tuple(content.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise OSError(f"{file} is damaged or cut off: {error}. {AGAIN}") from error


def read_shards(index: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the safetensors files that an index lists; empty for other formats.

    Raises:
        OSError: naming a file that is missing or damaged, or an index that does not say what is in the files.
    """
    content = read_object(index)
    if not isinstance(content.get("metadata"), dict):  # the hosts write into it
        raise OSError(f"`metadata` of {index} must be an object. {AGAIN}")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise OSError(f"`weight_map` of {index} must be an object that gives the file of each tensor. {AGAIN}")
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
        raise OSError(f"{index} is wrong about {len(wrong)} tensors, such as {sorted(wrong)[0]!r}. {AGAIN}")
    return {name: shape for shard in shapes.values() for name, shape in shard.items()}


def check_readable(folder: Path) -> None:
    """Raises where a JSON or safetensors file in `folder` or of its components is cut off or otherwise damaged.

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


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON and of text encodings: kinds of ValueError
        raise OSError(f"{file} is damaged: {error}. {AGAIN}") from error
