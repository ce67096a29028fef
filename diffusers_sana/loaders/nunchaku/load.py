"""Nunchaku's checkpoints of FLUX.1 and Sana as diffusers models with this package's quantized layers.

A file is one `.safetensors` whose header holds the model's config. Older ones are folders of two files and a
`config.json`. Format and rank are read off the tensors; see `docs/third_party_checkpoints.md` for what is changed.
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

from diffusers_sana.files import read_text
from diffusers_sana.loaders.nunchaku.assemble import Conversion, all_tensors, empty_model, fill_model
from diffusers_sana.loaders.nunchaku.flux import convert_flux
from diffusers_sana.loaders.nunchaku.layers import Source
from diffusers_sana.loaders.nunchaku.sana import convert_sana


Converter = Callable[[Source, Mapping[str, torch.Size], torch.dtype], Conversion]
CONVERTERS: dict[str, Converter] = {
    "FluxTransformer2DModel": convert_flux,
    "SanaTransformer2DModel": convert_sana,
}
FOLDER_FILES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OF_THE_DTYPE = (".lora_down", ".proj_down", ".wzeros")  # tensors that are always 16 bit
IGNORED = ".smooth_orig"  # a record of the quantizer, of no use to anybody who computes


def load_nunchaku(
    path_or_repo: str | Path, model_cls: type | None = None, torch_dtype: torch.dtype | None = None, **hub: Any
) -> Any:
    """A model from a checkpoint of Nunchaku, on the CPU.

    Args:
        path_or_repo: a `.safetensors` file, an older folder, or either on the Hub: "owner/name/file.safetensors",
            "owner/name".
        model_cls: the class to build; by default diffusers' for the model that the file names.
        torch_dtype: of everything that is not packed: bfloat16, float16 or float32; by default the file's.
        hub: for `huggingface_hub`, such as `revision` or `token`.

    Returns:
        A diffusers model in eval mode, which `save_pretrained` writes in this package's own format.

    Raises:
        ValueError: a file that is cut short, of another model or format, naming the tensor; numbers that
            `torch_dtype` cannot hold.
    """
    if torch_dtype not in (None, *DTYPES):
        raise ValueError(f"`torch_dtype` must be one of {DTYPES} or None, got {torch_dtype!r}.")
    path = _local(str(path_or_repo), hub)
    tensors, metadata = _read_folder(path) if path.is_dir() else read_safetensors(path)
    config, name = _config(metadata, path)
    model = empty_model(model_cls, config, name)
    return assemble(model, CONVERTERS[name], tensors, str(path), torch_dtype)


def assemble(
    model: nn.Module,
    convert: Converter,
    tensors: Mapping[str, Tensor],
    origin: str,
    torch_dtype: torch.dtype | None,
) -> nn.Module:
    """Converts tensors for a 16-bit model on the meta device and puts them into it.

    Raises:
        ValueError: see `load_nunchaku`.
    """
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    source = Source(tensors, origin)
    if torch_dtype is None:
        own = (tensor.dtype for key, tensor in tensors.items() if key.endswith(OF_THE_DTYPE))
        torch_dtype = next(own, torch.bfloat16)
    conversion = convert(source, shapes, torch_dtype)
    fill_model(model, conversion, all_tensors(conversion, source, shapes, IGNORED))
    return model


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the metadata in its header.

    Raises:
        ValueError: a file that is cut short or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but is not ({error}). Download it again."
        ) from error


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An older checkpoint: blocks and outer layers in a file each."""
    missing = [name for name in (*FOLDER_FILES, "config.json") if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} must be a folder with {missing[0]!r}, but has none. Pass a Nunchaku file or folder.")
    tensors: dict[str, Tensor] = {}
    for name in FOLDER_FILES:
        tensors |= read_safetensors(path / name)[0]
    return tensors, {"config": read_text(path / "config.json")}


def _config(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], str]:
    """The model's config and the name of its class in diffusers."""
    if "config" not in metadata:
        raise ValueError(f"{path} must have the model's `config` in its metadata, but has not. It is not Nunchaku's.")
    config = json.loads(metadata["config"])
    method = json.loads(metadata.get("quantization_config", "{}")).get("method", "svdquant")
    if method != "svdquant":
        raise ValueError(f'`method` in the `quantization_config` of {path} must be "svdquant", got {method!r}.')
    stated = config.get("_class_name") or metadata.get("model_class", "")
    name = next((name for name in CONVERTERS if stated.lower().endswith(name.lower())), None)
    if name is None:
        raise ValueError(f"{path} must be of one of the models {sorted(CONVERTERS)}, got {stated!r}.")
    return config, name


def _local(path_or_repo: str, hub: dict[str, Any]) -> Path:
    """Where the file or folder lies, after a download if need be."""
    path = Path(path_or_repo)
    if path.exists():
        return path
    owner, _, rest = path_or_repo.partition("/")
    name, _, filename = rest.partition("/")
    if path.is_absolute() or not name:
        raise ValueError(
            "`path_or_repo` must be a file, a folder, or on the Hub 'owner/name' or 'owner/name/file.safetensors', "
            f"got {path_or_repo!r}, where nothing is."
        )
    if filename:
        return Path(hf_hub_download(f"{owner}/{name}", filename, **hub))
    return Path(snapshot_download(f"{owner}/{name}", allow_patterns=[*FOLDER_FILES, "config.json"], **hub))
