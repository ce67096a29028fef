"""Loads Nunchaku checkpoints of FLUX.1 and Sana as diffusers models with this package's quantized layers.

A checkpoint is one `.safetensors` file whose header has the model's config, or, if older, a folder of two files and a
`config.json`. Format and rank are derived from the tensors; `docs/third_party_checkpoints.md` lists what is changed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusers_sana.checkpoint_files import check_hub_options
from diffusers_sana.files import read_text
from diffusers_sana.loaders.nunchaku.flux import convert_flux
from diffusers_sana.loaders.nunchaku.sana import convert_sana
from diffusers_sana.loaders.quantized.assemble import Conversion, all_tensors, empty_model, fill_model
from diffusers_sana.loaders.quantized.layer import Source


# From the tensors of a file, the shapes of the state dict of the 16-bit model, and the dtype of all floating-point
# tensors, to the converted layers. Raises a ValueError that names a tensor if it is missing or has another shape.
Converter = Callable[[Source, Mapping[str, torch.Size], torch.dtype], Conversion]
CONVERTERS: dict[str, Converter] = {
    "FluxTransformer2DModel": convert_flux,
    "SanaTransformer2DModel": convert_sana,
}
FOLDER_FILES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALWAYS_16_BIT = (".lora_down", ".proj_down", ".wzeros")  # their dtype is that of the checkpoint
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
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {DTYPES} or None, got {dtype!r}.")
    path = _local(str(path_or_repo), hub)
    tensors, metadata = _read_folder(path) if path.is_dir() else read_safetensors(path)
    config, name = _config(metadata, path)
    model = empty_model(model_cls, config, name)
    return assemble(model, CONVERTERS[name], tensors, str(path), dtype)


def assemble(
    model: nn.Module,
    convert: Converter,
    tensors: Mapping[str, Tensor],
    origin: str,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Converts tensors and fills a 16-bit model on the meta device with them.

    Raises:
        ValueError: see `load_nunchaku`.
    """
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    source = Source(tensors, origin)
    if dtype is None:
        dtypes = (tensor.dtype for key, tensor in tensors.items() if key.endswith(ALWAYS_16_BIT))
        dtype = next(dtypes, torch.bfloat16)
    conversion = convert(source, shapes, dtype)
    fill_model(model, conversion, all_tensors(conversion, source, shapes, IGNORED))
    return model


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the metadata in its header.

    Raises:
        ValueError: the file is damaged or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a complete safetensors file, but is not ({error}). Download it again."
        ) from error


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads an older checkpoint: one file for the blocks and one for the other layers."""
    missing = [name for name in (*FOLDER_FILES, "config.json") if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} must be a folder with {missing[0]!r}, but lacks it. Pass a Nunchaku file or folder.")
    tensors: dict[str, Tensor] = {}
    for name in FOLDER_FILES:
        tensors |= read_safetensors(path / name)[0]
    return tensors, {"config": read_text(path / "config.json")}


def _config(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], str]:
    """The model's config and the name of its class in diffusers."""
    if "config" not in metadata:
        raise ValueError(
            f"{path} must have the model's `config` in its metadata, but lacks it. It is not a Nunchaku checkpoint."
        )
    config = json.loads(metadata["config"])
    method = json.loads(metadata.get("quantization_config", "{}")).get("method", "svdquant")
    if method != "svdquant":
        raise ValueError(f'`method` in the `quantization_config` of {path} must be "svdquant", got {method!r}.')
    class_name = config.get("_class_name") or metadata.get("model_class", "")
    name = next((name for name in CONVERTERS if class_name.lower().endswith(name.lower())), None)
    if name is None:
        raise ValueError(f"{path} must be of one of the models {sorted(CONVERTERS)}, got {class_name!r}.")
    return config, name


def _local(path_or_repo: str, hub: dict[str, Any]) -> Path:
    """The local path of the file or folder, after a download if necessary."""
    path = Path(path_or_repo)
    if path.exists():
        check_hub_options(path, hf_hub_download if path.is_file() else snapshot_download, hub)
        return path
    owner, _, name = path_or_repo.partition("/")
    name, _, filename = name.partition("/")
    if path.is_absolute() or not name:
        raise ValueError(
            "`path_or_repo` must be a file, a folder, or on the Hub 'owner/name' or 'owner/name/file.safetensors', "
            f"got {path_or_repo!r}, which does not exist."
        )
    if filename:
        return Path(hf_hub_download(f"{owner}/{name}", filename, **hub))
    return Path(snapshot_download(f"{owner}/{name}", allow_patterns=[*FOLDER_FILES, "config.json"], **hub))
