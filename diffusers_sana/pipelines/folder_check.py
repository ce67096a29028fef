"""Says which file of a pipeline folder is missing, where the loaders do not.

transformers loads a tokenizer without a vocabulary from a folder that lacks `tokenizer.json`.
"""

from collections.abc import Collection
from pathlib import Path

from diffusers_sana.checkpoint_files import read_object


def check_complete(folder: Path, components: Collection[str]) -> None:
    """Raises where the local pipeline `folder` lacks a file.

    Args:
        folder: has a `model_index.json`.
        components: those that are to be loaded from it.

    Raises:
        OSError: naming the missing file, or an index that is damaged.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise OSError(f"{index_file} is missing. Is `{folder}` the folder of a pipeline?")
    for name, value in read_object(index_file).items():
        if name not in components:
            continue
        if not isinstance(value, list) or len(value) != 2:
            raise OSError(f"{index_file} must give library and class of `{name}`, got {value!r}. Download it again.")
        if value[0] is None:
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


def _require_one_of(folder: Path, *names: str, component: str | None = None) -> None:
    if not any((folder / name).is_file() for name in names):
        component = component or folder.name
        raise OSError(f"{folder / names[0]} is missing. Download it again, or pass `{component}` yourself.")
