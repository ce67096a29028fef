"""Loads one original (NVlabs) file as a model of this package, for `from_single_file` of the models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from diffusers_sana.loaders.nvlabs.dc_ae import CLASS_NAME as AUTOENCODER
from diffusers_sana.loaders.nvlabs.dc_ae import read_official_dc
from diffusers_sana.loaders.nvlabs.sana import CONTROLNET, TRANSFORMER, read_official_sana
from diffusers_sana.loaders.nvlabs.sana_video import VIDEO, read_official_video
from diffusers_sana.loaders.nvlabs.sana_video2 import VIDEO2, read_official_video2
from diffusers_sana.loaders.single_file import (
    SINGLE_FILE_HUB_ARGUMENTS,
    OfficialWeights,
    check_config_fields,
    read_checkpoint,
)
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from diffusers_sana.models.transformers.transformer_sana_video2 import SanaVideo2Transformer3DModel


MODELS: dict[str, type[Any]] = {
    TRANSFORMER: SanaTransformer2DModel,
    CONTROLNET: SanaControlNetModel,
    AUTOENCODER: AutoencoderDC,
    VIDEO: SanaVideoTransformer3DModel,
    VIDEO2: SanaVideo2Transformer3DModel,
}


def load_single_file(
    model_cls: type[Any],
    source: str | Path | Mapping[str, Any] | None,
    config: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "model",
    **kwargs: Any,
) -> Any:
    """Loads a `model_cls` from one file; arguments and errors are those of `from_single_file`."""
    hub = {name: kwargs.pop(name) for name in SINGLE_FILE_HUB_ARGUMENTS if name in kwargs}
    check_config_fields(model_cls, kwargs)
    checkpoint = read_checkpoint(source or {}, weights, **hub)
    if config is not None:
        hub = {name: value for name, value in hub.items() if name != "disable_mmap"}
        kwargs = {**model_cls.load_config(config, subfolder=subfolder, **hub), **kwargs}
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
    if config is not None and _has_our_names(model_cls, kwargs, checkpoint):
        official = OfficialWeights(model_cls.__name__, kwargs, {key: (key,) for key in checkpoint})
    else:
        official = read_official(model_cls, checkpoint, **kwargs)
    return official.model(checkpoint, model_cls, dtype)


def read_official(model_cls: type[Any], checkpoint: Mapping[str, Tensor], **fields: Any) -> OfficialWeights:
    """Maps the tensors of an original checkpoint to a `model_cls`, one of `MODELS` or a subclass of one.

    Raises:
        ValueError: see `read_official_sana`, `read_official_video`, `read_official_video2` and `read_official_dc`.
    """
    class_name = next(name for name, known in MODELS.items() if issubclass(model_cls, known))
    if class_name == AUTOENCODER:
        return read_official_dc(checkpoint, **fields)
    if class_name == VIDEO:
        return read_official_video(checkpoint, **fields)
    if class_name == VIDEO2:
        return read_official_video2(checkpoint, **fields)
    return read_official_sana(checkpoint, class_name, **fields)


def _has_our_names(model_cls: type[Any], config: Mapping[str, Any], checkpoint: Mapping[str, Tensor]) -> bool:
    with init_empty_weights():
        return set(model_cls.from_config(dict(config)).state_dict()) == set(checkpoint)
