"""Loads Nunchaku checkpoints as diffusers models with this package's quantized layers.

A checkpoint is one `.safetensors` file whose header has the model's config, or, if older, a folder of two files and a
`config.json`. Format and rank are derived from the tensors; `docs/third_party_checkpoints.md` lists what is changed.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.files import read_text
from diffusers_sana.loaders.nunchaku.flux import convert_flux
from diffusers_sana.loaders.nunchaku.sana import convert_sana
from diffusers_sana.loaders.nunchaku.v2 import SCHEMES, convert_v2
from diffusers_sana.loaders.quantized.assemble import (
    Converter,
    Reading,
    assemble,
    check_dtype,
    empty_model,
    stored_dtype,
)
from diffusers_sana.loaders.quantized.checkpoint import (
    NUNCHAKU_FOLDER,
    Checkpoint,
    local_path,
    read_safetensors,
)
from diffusers_sana.loaders.quantized.layer import Source


CONVERTERS: dict[str, Converter] = {
    "FluxTransformer2DModel": convert_flux,
    "SanaTransformer2DModel": convert_sana,
    **{name: partial(convert_v2, class_name=name) for name in SCHEMES},
}
IGNORED = (".smooth_orig", ".smooth_factor_orig")  # a record of the quantizer, not needed for inference


def load_nunchaku(
    path_or_repo: str | Path, model_cls: type | None = None, dtype: torch.dtype | None = None, **hub: Any
) -> Any:
    """Loads a model from a Nunchaku checkpoint, on the CPU.

    Args:
        path_or_repo: a `.safetensors` file, an older folder, or either on the Hub: "owner/name/file.safetensors",
            "owner/name".
        model_cls: the class to build; by default the diffusers class that the file names.
        dtype: of everything except packed weights: bfloat16, float16 or float32; by default the file's.
        hub: for `huggingface_hub`, such as `revision` or `token`.

    Returns:
        A diffusers model in eval mode, which `save_pretrained` writes in this package's own format.

    Raises:
        TypeError: an option that the Hub does not know.
        ValueError: the file is damaged, or for a different architecture or format (the tensor is named), or has values
            that `dtype` cannot represent.
    """
    check_dtype(dtype)
    path = local_path(str(path_or_repo), hub, [*NUNCHAKU_FOLDER, "config.json"])
    tensors, metadata = _read_folder(path) if path.is_dir() else read_safetensors(path)
    if "config" not in metadata:
        raise ValueError(
            f"{path} must have the model's `config` in its metadata, but lacks it. It is not a Nunchaku checkpoint."
        )
    config = json.loads(metadata["config"])
    quantization = json.loads(metadata.get("quantization_config", "{}"))
    checkpoint = Checkpoint(path, tensors, metadata, config, quantization)
    name = class_name_of(checkpoint)
    plan = reading(checkpoint, name, {})
    source = Source(tensors, str(path))
    model = empty_model(model_cls, config, name)
    return assemble(model, plan.convert, source, dtype or stored_dtype(tensors), plan.ignored)


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a file.

    Raises:
        ValueError: another quantization method, or a model that Nunchaku does not have.
    """
    method = checkpoint.quantization.get("method", "svdquant")
    if method != "svdquant":
        raise ValueError(
            f'`method` in the `quantization_config` of {checkpoint.path} must be "svdquant", got {method!r}.'
        )
    if class_name not in CONVERTERS:
        raise ValueError(f"{checkpoint.path} must be of one of the models {sorted(CONVERTERS)}, got {class_name!r}.")
    return Reading(CONVERTERS[class_name], checkpoint.tensors, IGNORED)


def class_name_of(checkpoint: Checkpoint) -> str:
    """The model's class in diffusers, which Nunchaku writes with a prefix and in other cases of letters."""
    written = checkpoint.config.get("_class_name") or checkpoint.metadata.get("model_class", "")
    return next((name for name in CONVERTERS if written.lower().endswith(name.lower())), written)


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads an older checkpoint: one file for the blocks and one for the other layers."""
    missing = [name for name in (*NUNCHAKU_FOLDER, "config.json") if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} must be a folder with {missing[0]!r}, but lacks it. Pass a Nunchaku file or folder.")
    tensors: dict[str, Tensor] = {}
    for name in NUNCHAKU_FOLDER:
        tensors |= read_safetensors(path / name)[0]
    return tensors, {"config": read_text(path / "config.json")}
