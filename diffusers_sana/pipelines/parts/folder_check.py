"""Says which file of a pipeline folder is missing or damaged, where the loaders do not.

transformers loads a tokenizer without a vocabulary from a folder that lacks `tokenizer.json`, and parse errors of JSON
and safetensors come without the name of the file.
"""

import json
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open


def check_complete(folder: Path, components: Collection[str]) -> None:
    """Raises where the local pipeline `folder` lacks a file.

    Args:
        folder: has a `model_index.json`.
        components: those that are to be loaded from it.

    Raises:
        OSError: naming the missing file.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise OSError(f"{index_file} is missing. Is `{folder}` the folder of a pipeline?")
    for name, value in _read_json(index_file).items():
        if name not in components or value[0] is None:
            continue
        component = folder / name
        if name == "tokenizer":
            _require_one_of(component, "tokenizer.json", "tokenizer.model")
        elif name == "processor":
            check_processor(component)
        elif name == "scheduler":
            _require_one_of(component, "scheduler_config.json")
        else:
            _require_one_of(component, "config.json")
            if all(file.suffix == ".json" for file in component.iterdir()):
                raise OSError(f"{component} has no file of weights, such as *.safetensors. Download it again.")


def check_processor(folder: Path) -> None:
    """Raises where the local `folder` lacks a file of its processor.

    Raises:
        OSError: naming the missing file.
    """
    _require_one_of(folder, "processor_config.json", component="processor")
    _require_one_of(folder, "tokenizer.json", "tokenizer.model", component="processor")


def check_readable(folder: Path) -> None:
    """Raises where a JSON or safetensors file in `folder` or of its components is cut off or otherwise damaged.

    Raises:
        OSError: naming the damaged file.
    """
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.suffix == ".json":
            _read_json(file)
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise OSError(f"{file} is damaged: {error}. Download it again.") from error


def _require_one_of(folder: Path, *names: str, component: str | None = None) -> None:
    if not any((folder / name).is_file() for name in names):
        component = component or folder.name
        raise OSError(f"{folder / names[0]} is missing. Download it again, or pass `{component}` yourself.")


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{file} is damaged: {error}. Download it again.") from error
