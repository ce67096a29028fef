"""A checkpoint of any runtime as it lies on disk: tensors, header, configs; and which family it is of (`sniff`)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusers_sana.checkpoint_files import check_hub_options
from diffusers_sana.files import read_json


NUNCHAKU_FOLDER = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")  # before single files
METADATA_OF_CACHE_DIT = "cache_dit_svdq_ptq"
METADATA_OF_COMFY = "_quantization_metadata"
FAMILIES = {
    "diffusers-sana": "this package",
    "nunchaku": "Nunchaku",
    "nunchaku-lite": "diffusers' Nunchaku-Lite",
    "cache-dit": "cache-dit",
    "auto-round": "auto-round (MXFP4)",
    "vllm-omni": "vLLM-Omni",
    "modelopt": "NVIDIA ModelOpt (NVFP4_SVD)",
    "comfy": "ComfyUI",
    "sdnq": "SDNQ",
}


@dataclass
class Checkpoint:
    """Everything in a file or folder.

    Attributes:
        path: of the file or folder.
        tensors: by key.
        metadata: of the headers of the safetensors files.
        config: of the model, without `quantization_config`; empty if there is none.
        quantization: the `quantization_config`; empty if there is none.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """See `sniff`.

        Raises:
            ValueError: none of them.
        """
        family = sniff(self.quantization, self.metadata, self.tensors)
        if family is None:
            raise ValueError(
                f"{self.path} must be a quantized checkpoint of one of {', '.join(FAMILIES.values())}, but has no "
                "tensors of any of them."
            )
        return family


def sniff(quantization: Mapping[str, Any], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str | None:
    """The family of a checkpoint, one of `FAMILIES`, or None if it is not quantized in any known way.

    Tensors are believed rather than names and metadata: some families share a `quant_method`, and configs get lost.

    Args:
        quantization: the `quantization_config` of a config.json, or an empty dictionary.
        metadata: the header of the safetensors file.
        tensors: by key; tensors on the meta device do.
    """
    ends = {key.rpartition(".")[2] for key in tensors}
    method = quantization.get("quant_method")
    if METADATA_OF_CACHE_DIT in metadata:
        return "cache-dit"
    if "comfy_quant" in ends or METADATA_OF_COMFY in metadata:
        return "comfy"
    if "svdquant_lora_a" in ends:
        return "modelopt"
    if method in ("sdnq", "sdnq_training") or {"svd_up", "scale"} <= ends:
        return "sdnq"
    first = next((key for key in tensors if key.endswith(".qweight")), None)
    if first is None:
        return None
    if method == "nunchaku_lite":
        return "nunchaku-lite"
    if any(key.endswith(".wscales") and tensor.dtype == torch.uint8 for key, tensor in tensors.items()):
        return "auto-round"
    if tensors[first].dtype == torch.uint8 or tensors[f"{first.removesuffix('qweight')}wscales"].dim() == 1:
        return "diffusers-sana"
    # What is left has int8 codes and the same shapes: vLLM-Omni in natural order, Nunchaku in tiles.
    sides = {side for key in tensors if key.endswith(".smooth_factor") for side in tensors[key].shape}
    if method == "svdquant" or "conversion" in metadata or any(side % 128 for side in sides):
        return "vllm-omni"
    is_fused = any("qkv" in key for key in tensors)
    return "nunchaku-lite" if "proj_down" in ends and not is_fused else "nunchaku"


def open_checkpoint(path_or_repo: str | Path, subfolder: str = "", **hub: Any) -> Checkpoint:
    """Reads a safetensors file, or a folder of them with a config.json, from here or from the Hub.

    Args:
        path_or_repo: a file, a folder, "owner/name" or "owner/name/file.safetensors".
        subfolder: of a folder, such as "transformer".
        hub: for `huggingface_hub`, such as `revision` or `token`.

    Raises:
        TypeError: an option that the Hub does not know.
        ValueError: there is no such file, or it is damaged.
    """
    path = local_path(str(path_or_repo), hub) / subfolder
    if path.is_file():
        files, folder = [path], path.parent
    else:
        index = path / "diffusion_pytorch_model.safetensors.index.json"
        shards = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
        files, folder = [path / name for name in shards] or sorted(path.glob("*.safetensors")), path
        if not files:
            raise ValueError(f"{path} must be a folder with safetensors files, but has none.")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        more, header = read_safetensors(file)
        tensors |= more
        metadata |= header
    config: dict[str, Any] = json.loads(metadata.get("config") or "{}")
    if not config and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None) or json.loads(metadata.get("quantization_config", "{}"))
    lone = folder / "quantization_config.json"
    if not quantization and lone.is_file():
        quantization = read_json(lone)
    return Checkpoint(path, tensors, metadata, config, quantization)


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


def local_path(path_or_repo: str, hub: Mapping[str, Any], patterns: list[str] | None = None) -> Path:
    """The local path of a file or folder, after a download if necessary.

    Args:
        path_or_repo: see `open_checkpoint`.
        hub: options of the download.
        patterns: of the files of a folder to download.

    Raises:
        TypeError: an option that the Hub does not know.
        ValueError: no such path, and no name on the Hub.
    """
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
    patterns = patterns or ["*.safetensors", "*.json"]
    return Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns, **hub))
