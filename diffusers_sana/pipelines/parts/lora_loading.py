"""LoRA files of all trainers, by the one call that diffusers has for its own."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin
from torch import Tensor
from transformers.utils import cached_file

from diffusers_sana.models.transformers.lora_formats import check_lora_fits, convert_sana_lora


PEFT_CONFIG = "adapter_config.json"  # where PEFT keeps the scale of a LoRA
PEFT_PREFIX = "base_model.model."
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class LoraLoading(SanaLoraLoaderMixin):
    """Part of `SanaPipelineBase`: `load_lora_weights` for the formats of `lora_formats.py`."""

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The tensors of a LoRA by diffusers' names, whichever trainer wrote it.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder or an id on the Hub with one, or what
                is in such a file.
            weight_name: of the file in the folder or on the Hub.
            return_lora_metadata: return also the fields of PEFT's config, or None where the file tells none.
            kwargs: `HUB_ARGUMENTS`; others are left alone, as by diffusers.

        Raises:
            ValueError: the file is not one of safetensors, or see `convert_sana_lora`.
            OSError: there is no such file.
        """
        source = pretrained_model_name_or_path_or_dict
        if weight_name is not None and not weight_name.endswith(".safetensors"):
            raise ValueError(
                f"`weight_name` must be a safetensors file, got {weight_name!r}. Others can run code when they are"
                " loaded; convert it first."
            )
        from diffusers_sana._compat import fetch_state_dict  # here, so that a missing one costs LoRA files only

        hub = {name: kwargs.get(name) for name in HUB_ARGUMENTS}
        state_dict, metadata = fetch_state_dict(
            pretrained_model_name_or_path_or_dict=source if isinstance(source, dict) else str(source),
            weight_name=weight_name,
            use_safetensors=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            **hub,
        )
        if metadata is None and not isinstance(source, dict) and next(iter(state_dict), "").startswith(PEFT_PREFIX):
            metadata = _peft_config(Path(source), hub)
        state_dict, metadata = convert_sana_lora(state_dict, metadata)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: dict[str, Tensor], transformer: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        """Puts a LoRA by diffusers' names beside the layers of `transformer`; the arguments are diffusers'.

        Raises:
            ValueError: naming a key that does not fit the model.
        """
        check_lora_fits(state_dict, transformer)
        super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)


def _peft_config(source: Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The config that PEFT wrote beside its file, if it is still there."""
    place = source.parent if source.is_file() else source
    path = cached_file(str(place), PEFT_CONFIG, **_given(hub), _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text())


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
