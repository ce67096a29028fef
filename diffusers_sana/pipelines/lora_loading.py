"""LoRA files of many trainers, by the one call that diffusers has for its own."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import get_adapter_name, logging
from torch import Tensor, nn

from diffusers_sana.checks import check_number
from diffusers_sana.loaders.lora.files import FILE_ARGUMENTS, named, read_lora
from diffusers_sana.loaders.lora.formats import TEXT_PREFIX, check_lora_fits, convert_sana_lora


logger = logging.get_logger(__name__)


class LoraLoading(SanaLoraLoaderMixin):
    """Part of `SanaPipelineBase`: `load_lora_weights` for the formats of `loaders/lora/formats.py`."""

    _lora_loadable_modules = ["transformer", "text_encoder"]
    text_encoder_name = "text_encoder"
    _convert_lora = staticmethod(convert_sana_lora)
    transformer: Any
    text_encoder: Any

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The tensors of a LoRA by diffusers' names, in any of the formats of `loaders/lora/formats.py`.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or an id on the Hub with one, or what is in such a
                file.
            weight_name: of the file in the folder or on the Hub.
            return_lora_metadata: return also the fields of PEFT's config, or None where the file tells none.
            use_safetensors: True for files of safetensors alone, False for `.bin`, None for either. Of a `.bin`, only
                tensors are read: code in it is never run.
            kwargs: `FILE_ARGUMENTS`.

        Raises:
            TypeError: an argument that has no effect.
            ValueError: naming the file, which has NaN or infinite numbers; or see `convert_sana_lora`.
            OSError: there is no such file, or it is damaged.
        """
        source = pretrained_model_name_or_path_or_dict
        if unknown := sorted(kwargs.keys() - set(FILE_ARGUMENTS)):
            raise TypeError(
                f"`{unknown[0]}` is no argument of `load_lora_weights`. For files it has {FILE_ARGUMENTS}."
            )
        with named(source, weight_name, kwargs.get("subfolder")):
            state_dict, metadata = read_lora(source, weight_name, use_safetensors, **kwargs)
            if any("." in key for key in state_dict):  # else it is nothing of a model: diffusers warns of it
                state_dict, metadata = cls._convert_lora(state_dict, metadata)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """Puts a LoRA beside the layers of the transformer and the text encoder.

        Args:
            pretrained_model_name_or_path_or_dict, kwargs: see `lora_state_dict`.
            adapter_name: of the adapter in both models; None for a new one, "default_0" and so on.
            hotswap: put it into the place of the adapter of that name, in the transformer only.
            low_cpu_mem_usage: do not initialize what is read from the file.

        Raises:
            ValueError: naming the file and what does not fit the model; or see `lora_state_dict`.
            OSError: there is no such file, or it is damaged.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            # PEFT may keep these tensors as parameters, which hot-swapping overwrites.
            source = {key: tensor.clone() for key, tensor in source.items()}
        with named(source, kwargs.get("weight_name"), kwargs.get("subfolder")):
            found: Any = self.lora_state_dict(source, **kwargs | {"return_lora_metadata": True})
            state_dict, metadata = found
            text = {key: tensor for key, tensor in state_dict.items() if key.startswith(TEXT_PREFIX)}
            others = {key: tensor for key, tensor in state_dict.items() if key not in text}
            text_encoder = self.text_encoder
            if text and text_encoder is None:
                logger.warning(
                    f"The LoRA also changes the text encoder ({len(text)} tensors), which this pipeline does not have."
                    " Only the part of the transformer is loaded."
                )
                text = {}
            if not hotswap:
                adapter_name = adapter_name or _new_name(self.transformer, text_encoder)
            options = {"adapter_name": adapter_name, "_pipeline": self, "hotswap": hotswap, "metadata": metadata}
            if text:
                _check_text_encoder(text, text_encoder, adapter_name, hotswap)
            if others or not state_dict:
                options["low_cpu_mem_usage"] = low_cpu_mem_usage
                self.load_lora_into_transformer(others, self.transformer, **options)
            if text:
                self.load_lora_into_text_encoder(text, text_encoder=text_encoder, **options)

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, Tensor],
        transformer: torch.nn.Module,
        adapter_name: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Puts a LoRA by diffusers' names beside the layers of `transformer`; the arguments are diffusers'.

        Raises:
            ValueError: naming a key that does not fit the model.
        """
        from diffusers_sana.loaders.lora.layers import (
            drop_unused_changes,
            for_hotswap,
            for_model,
            prepare_changes,
        )
        from diffusers_sana.models.transformers.lora_layers import drop_unused, prepare_depthwise

        if not any(key.startswith(f"{cls.transformer_name}.") for key in state_dict):
            super().load_lora_into_transformer(state_dict, transformer, adapter_name, *args, **kwargs)
            return
        check_lora_fits(state_dict, transformer)
        adapter_name = adapter_name or get_adapter_name(transformer)
        prefix = f"{cls.transformer_name}."
        plain = for_model({key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}, transformer)
        if kwargs.get("hotswap"):
            plain = for_hotswap(plain, transformer, adapter_name)
        state_dict = {prefix + key: tensor for key, tensor in plain.items()}
        if kwargs.get("hotswap"):
            # PEFT may swap the layers' parameters with these, which are the caller's: before 0.20 always, since then
            # if the rank rises.
            state_dict = {
                key: nn.Parameter(x.clone(memory_format=torch.contiguous_format), x.is_floating_point())
                for key, x in state_dict.items()
            }
        else:
            prepare_depthwise(transformer, plain, adapter_name)
            prepare_changes(transformer, plain, adapter_name)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are no mistake
                super().load_lora_into_transformer(state_dict, transformer, adapter_name, *args, **kwargs)
        finally:
            drop_unused_changes(transformer)
            drop_unused(transformer)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, Tensor],
        network_alphas: Any = None,
        text_encoder: Any = None,
        prefix: str | None = None,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        hotswap: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts the part of a LoRA that belongs to the text encoder beside its layers; the arguments are diffusers'.

        Args:
            state_dict: by diffusers' names, those of the text encoder with the prefix `text_encoder.`.
            network_alphas, prefix, kwargs: for `state_dict` without such keys, of which diffusers warns.
            text_encoder: a Gemma 2 of transformers, dense or quantized.
            adapter_name: a new name; None for "default_0" and so on.
            _pipeline: whose offloading stops while layers are replaced.
            hotswap: must be False.
            metadata: PEFT's fields, with the same prefix.

        Raises:
            ValueError: naming a key that does not fit the model; or the name is taken.
        """
        from diffusers_sana.loaders.lora.layers import load_into_model

        own = {key: tensor for key, tensor in state_dict.items() if key.startswith(TEXT_PREFIX)}
        if not own:
            prefix = prefix or cls.text_encoder_name
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                state_dict, network_alphas, text_encoder, prefix=prefix, **kwargs
            )
            return
        adapter_name = adapter_name or get_adapter_name(text_encoder)
        _check_text_encoder(own, text_encoder, adapter_name, hotswap)
        with _without_offloading(_pipeline):
            load_into_model(text_encoder, own, metadata, adapter_name, TEXT_PREFIX)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: Any = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_layers: dict[str, Tensor] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Saves the layers of an adapter, of one model or both; the arguments are those of diffusers' SD3 pipeline.

        Raises:
            ValueError: there are no layers.
        """
        models = {
            cls.transformer_name: (transformer_lora_layers, transformer_lora_adapter_metadata),
            cls.text_encoder_name: (text_encoder_lora_layers, text_encoder_lora_adapter_metadata),
        }
        state_dict: dict[str, Tensor] = {}
        fields: dict[str, Any] = {}
        for name, (layers, metadata) in models.items():
            state_dict |= cls.pack_weights(layers or {}, name)
            fields |= {f"{name}.{field}": value for field, value in (metadata or {}).items() if layers}
        if not state_dict:
            raise ValueError("`transformer_lora_layers` or `text_encoder_lora_layers` must be given, got neither.")
        cls.write_lora_layers(
            state_dict, str(save_directory), is_main_process, weight_name, save_function, safe_serialization, fields
        )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds LoRAs to the weights; the arguments are diffusers', but that `components` is all models by default.

        Raises:
            ValueError, RuntimeError: an adapter that the weights cannot express. None is changed then.
        """
        from diffusers_sana.loaders.lora.layers import all_or_none_fused
        from diffusers_sana.models.transformers.lora_layers import check_can_be_fused

        check_number("lora_scale", lora_scale)
        components = self._lora_loadable_modules if components is None else components
        models = [model for name in components if isinstance(model := getattr(self, name, None), nn.Module)]
        for model in models:
            check_can_be_fused(model, adapter_names)
        with all_or_none_fused(models):
            super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes fused LoRAs out of the weights of `components`, all models by default."""
        super().unfuse_lora(self._lora_loadable_modules if components is None else components, **kwargs)


def _new_name(*models: nn.Module | None) -> str:
    """A name that diffusers would give to the next adapter, new in all models."""
    names = [get_adapter_name(model) for model in models if model is not None]
    return max(names, key=lambda name: int(name.rpartition("_")[2]))


def _check_text_encoder(
    state_dict: Mapping[str, Tensor], text_encoder: Any, adapter_name: str | None, hotswap: bool
) -> None:
    """Raises ValueError, naming what is wrong, for an adapter that cannot be loaded into the text encoder."""
    if hotswap:
        raise ValueError(
            "`hotswap` swaps adapters of the transformer only, but the file also changes the text encoder "
            f"({next(iter(state_dict))!r}). Load it without `hotswap`, under another name."
        )
    if adapter_name in getattr(text_encoder, "peft_config", {}):
        raise ValueError(f"`adapter_name` must be new, but the text encoder has an adapter {adapter_name!r}.")
    check_lora_fits(state_dict, text_encoder, TEXT_PREFIX)


@contextmanager
def _without_offloading(pipeline: Any) -> Iterator[None]:
    """Takes the hooks of offloading off while layers are replaced, as diffusers does for the transformer."""
    from diffusers_sana._compat import reapply_group_offloading

    if pipeline is None:
        yield
        return
    by_model, by_layer, by_group = pipeline._optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if by_model:
            pipeline.enable_model_cpu_offload()
        elif by_layer:
            pipeline.enable_sequential_cpu_offload()
        elif by_group:
            for model in pipeline.components.values():
                if isinstance(model, nn.Module):
                    reapply_group_offloading(model)
