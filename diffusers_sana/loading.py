"""What the name of a model stands for: a bundled checkpoint, a folder or a Hub id, and the pipeline that loads it."""

import json
import logging
from pathlib import Path
from typing import Any

from diffusers_sana.checkpoints import BUNDLED


logger = logging.getLogger(__name__)


def checkpoint_path(model: str) -> str:
    """The folder of a bundled checkpoint, such as "sana-emoji"; any other name is returned unchanged."""
    return BUNDLED.get(model, model)


def pipeline_class_name(model: str) -> str:
    """Name of the pipeline class that a checkpoint is for, from its index: reads no weights, imports nothing heavy.

    Args:
        model: bundled name, folder, or id of a Hub repository.

    Returns:
        The class that `model_index.json` names. "VilaUPipeline" for a transformers checkpoint, which has no such file;
        that pipeline raises if it is another model.

    Raises:
        OSError: there is no such model, or its index is damaged.
    """
    place = checkpoint_path(model)
    index = _find(place, "model_index.json") or _find(place, "config.json")
    if index is None:
        raise OSError(f"{model} has neither a model_index.json nor a config.json; name the folder that has one")
    if index.name == "config.json":
        return "VilaUPipeline"
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, LookupError, TypeError) as error:
        raise OSError(f"{index} must be JSON with a `_class_name`; download it again ({error!r})") from error


def find_pipeline_class(model: str) -> type[Any]:
    """The pipeline class for a checkpoint: ours for Sana, SANA-Sprint and VILA-U, else diffusers' `DiffusionPipeline`.

    Args:
        model: bundled name, folder, or id of a Hub repository.

    Raises:
        OSError: as `pipeline_class_name`.
    """
    name = pipeline_class_name(model)
    if name not in ("SanaPipeline", "SanaSprintPipeline", "VilaUPipeline"):
        from diffusers import DiffusionPipeline

        return DiffusionPipeline
    import diffusers_sana

    return getattr(diffusers_sana, name)


def load_on(device: str, pipeline_class: type[Any], model: str, dtype: str) -> Any:
    """A pipeline on a device, as the command line names them. Warns where the dtype makes it slow.

    Args:
        device: such as "cpu" or "cuda".
        pipeline_class: whose `from_pretrained` loads it.
        model: bundled name, folder, or id of a Hub repository.
        dtype: "float32", "bfloat16" or "float16".
    """
    import torch

    if device == "cpu" and dtype == "float16":
        logger.warning("float16 is slow on a CPU; float32 or bfloat16 (--dtype) is faster there.")
    pipe = pipeline_class.from_pretrained(checkpoint_path(model), dtype=getattr(torch, dtype))
    return pipe.to(device, silence_dtype_warnings=True)  # diffusers says that float16 fails there, which ours does not


def _find(place: str, file: str) -> Path | None:
    """A file of a folder or Hub repository, None if it has no such file."""
    if Path(place).is_dir():
        return path if (path := Path(place) / file).is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(place, file))
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(place, file) is not None:  # the cache knows that there is no such file
            return None
        raise OSError(f"there is no folder {place}, and the Hub cannot be reached: {error}") from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        raise OSError(f"there is no folder {place}, and the Hub has no such repository: {error}") from error
