"""Reads the files of adapters of all trainers: tensors, the metadata of the file, and PEFT's config beside it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from diffusers_sana.checkpoint_files import HUB_ARGUMENTS, read_object, tensor_shapes


PEFT_CONFIG = "adapter_config.json"  # where PEFT keeps the scale of a LoRA
PEFT_PREFIX = "base_model.model."
FILE_ARGUMENTS = (*HUB_ARGUMENTS, "subfolder")
ENDINGS = (".safetensors", ".bin", ".pt")  # of files, which no repository on the Hub is named like


def read_lora(
    source: str | Path | dict[str, Tensor],
    weight_name: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file by its own keys, and the fields of PEFT's config, or None where there is none.

    Args:
        source: a file, a folder or an id on the Hub with one, or what is in such a file.
        weight_name: of the file in the folder or on the Hub.
        use_safetensors: True for files of safetensors alone, False for `.bin`, None for either.
        hub: `FILE_ARGUMENTS`.

    Raises:
        ValueError: NaN or infinite numbers, or no tensors.
        OSError: there is no such file.
    """
    from diffusers_sana._compat import fetch_state_dict  # here, so that a missing one costs LoRA files only

    if not isinstance(source, dict) and Path(source).suffix in ENDINGS and not Path(source).exists():
        raise FileNotFoundError(
            f"there is no file {str(source)!r}; name the file of an adapter, its folder or a Hub id."
        )
    options = {name: hub.get(name) for name in FILE_ARGUMENTS}
    state_dict, metadata = fetch_state_dict(
        pretrained_model_name_or_path_or_dict=source if isinstance(source, dict) else str(source),
        weight_name=weight_name,
        use_safetensors=use_safetensors is not False,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=use_safetensors is None,
        **options,
    )
    if not state_dict:
        raise ValueError(f"{source} must have the tensors of an adapter, but is empty. Download it again.")
    if metadata is None and not isinstance(source, dict) and next(iter(state_dict), "").startswith(PEFT_PREFIX):
        metadata = _peft_config(Path(source), options)
    _check_finite(state_dict, metadata)
    return state_dict, metadata


@contextmanager
def named(source: Any, weight_name: str | None, subfolder: str | None) -> Iterator[None]:
    """Puts the name of a LoRA's file before an error about what is in it.

    Raises:
        OSError: a file is damaged.
        TypeError, ValueError: other errors, but for those of missing files and packages.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(source, Mapping):
            raise
        path = Path(str(source))
        folder = path / (subfolder or "")
        for file in [path] if path.is_file() else sorted(folder.glob(weight_name or "*.safetensors")):
            if file.suffix == ".safetensors":
                tensor_shapes(file)
        if isinstance(error, OSError) or str(source) in str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{source}: {error}") from error


def _peft_config(source: Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The config that PEFT wrote beside its file, if it is still there."""
    place = source.parent if source.is_file() else source
    path = cached_file(str(place), PEFT_CONFIG, **_given(hub), _raise_exceptions_for_missing_entries=False)
    return None if path is None else read_object(Path(path))


def _check_finite(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None) -> None:
    """Raises ValueError, naming the key, where a tensor or a number of the metadata is not finite."""
    for key, tensor in state_dict.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{key!r} must be finite, but has NaN or infinite values. The training has failed.")
    for name, value in (metadata or {}).items():
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name!r} in the metadata must be finite, got {number}.")


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
