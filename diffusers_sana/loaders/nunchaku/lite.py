"""Nunchaku-Lite, the SVDQuant format that diffusers itself loads: reading, and writing for NVIDIA GPUs except Hopper.

A folder of a diffusers model whose `config.json` has `quant_method: "nunchaku_lite"` and lists the layers: `svdq_w4a4`
(one format and one rank for all) and `awq_w4a16`. Layers have the model's own names; their tensors are packed as in
`packing.py`, without padding.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor, nn

from diffusers_sana.checkpoint_files import check_hub_options
from diffusers_sana.files import read_json
from diffusers_sana.kernels.low_bit import GROUP_SIZES
from diffusers_sana.loaders.nunchaku import packing
from diffusers_sana.loaders.nunchaku.layers import (
    LITE_NAMES,
    awq_tensors,
    fits_awq,
    is_plain,
    read_awq,
    read_svdq,
    svdq_tensors,
)
from diffusers_sana.loaders.nunchaku.load import DTYPES, assemble, read_safetensors
from diffusers_sana.loaders.quantized.assemble import Conversion, empty_model, matrix_shape
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantConv2d, SVDQuantLayer


WEIGHTS = "diffusion_pytorch_model"
MAX_RANK = 1024


def load_nunchaku_lite(
    path_or_repo: str | Path,
    subfolder: str = "",
    model_cls: type | None = None,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> Any:
    """Loads a model from a Nunchaku-Lite folder, on the CPU, with this package's quantized layers.

    Args:
        path_or_repo: a folder or "owner/name" on the Hub.
        subfolder: such as "transformer".
        model_cls: the class to build; by default the diffusers class that the config names.
        dtype: of everything except packed weights: bfloat16, float16 or float32; by default the file's.
        hub: for `huggingface_hub.snapshot_download`, such as `revision` or `token`.

    Returns:
        A diffusers model in eval mode, which `save_pretrained` writes in this package's own format.

    Raises:
        TypeError: an option that the Hub does not know.
        ValueError: another format, or a file that is damaged or for a different architecture; the tensor is named.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {DTYPES} or None, got {dtype!r}.")
    path = Path(path_or_repo)
    if path.is_dir():
        check_hub_options(path, snapshot_download, hub)
    else:
        patterns = [str(Path(subfolder, name)) for name in ("config.json", f"{WEIGHTS}*.safetensors")]
        path = Path(snapshot_download(str(path_or_repo), allow_patterns=patterns, **hub))
    path = path / subfolder
    single = path / f"{WEIGHTS}.safetensors"
    files = [single] if single.is_file() else sorted(path.glob(f"{WEIGHTS}-*.safetensors"))
    if not (path / "config.json").is_file() or not files:
        raise ValueError(f"{path} must be a folder with config.json and {WEIGHTS}*.safetensors, but is not.")
    config = read_json(path / "config.json")
    quantization = config.pop("quantization_config", {})
    if quantization.get("quant_method") != "nunchaku_lite":
        raise ValueError(
            f'`quant_method` in {path / "config.json"} must be "nunchaku_lite", got '
            f"{quantization.get('quant_method')!r}. Load it with `from_pretrained`."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file)[0]

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        out = Conversion(dtype)
        for name in (quantization.get("svdq_w4a4") or {}).get("targets", ()):
            out.add(name, read_svdq(source, name, *matrix_shape(shapes, name), LITE_NAMES))
        for name in (quantization.get("awq_w4a16") or {}).get("targets", ()):
            out.add(name, read_awq(source, name, *matrix_shape(shapes, name)))
        if not out.layers:
            raise ValueError(f"{source.origin} must list at least one layer in its config.json, got none.")
        return out

    model = empty_model(model_cls, config, config.get("_class_name", ""))
    return assemble(model, convert, tensors, str(path), dtype)


def export_nunchaku_lite(
    model: Any, folder: str | Path, requantize_weight_only: bool = False, max_shard_size: str = "10GB"
) -> None:
    """Writes a model quantized by this package as a folder that diffusers loads with its Nunchaku kernels.

    4-bit weights are unchanged. Layers with 16-bit activations, such as adaLN, have neither a low-rank branch nor
    smoothing in that format: if they need one, the layer is written dequantized, in 16 bits.

    Args:
        model: a diffusers model with `SVDQuantLinear` layers in bfloat16 or float16.
        folder: target folder; created if necessary.
        requantize_weight_only: round those 16-bit matrices to 4 bits instead: a quarter of the size, with a relative
            error of about .1.
        max_shard_size: the size above which weights are split into several files.

    Raises:
        ValueError: the format cannot express a layer, which is named; nothing is written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)}
    dtype, precision, rank = _check_model(model, layers)
    state = dict(model.state_dict())
    svdq, awq = [], []
    for name, layer in layers.items():
        for part in layer.state_dict():
            del state[f"{name}.{part}"]
        item = UnpackedLayer.of(layer)
        if not item.weight_only:
            svdq.append(name)
            parts = svdq_tensors(item.with_rank(rank), dtype)
            if item.precision == "nvfp4":
                parts["wtscale"] = torch.ones(1, dtype=dtype)
        elif fits_awq(item) and (requantize_weight_only or is_plain(item)):
            awq.append(name)
            parts = awq_tensors(item, dtype)
        else:
            parts = {"weight": layer.dequantize(dtype)}
            if layer.bias is not None:
                parts["bias"] = layer.bias.to(dtype)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    quantization: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": str(dtype).rpartition(".")[2]}
    if svdq:
        common = {"precision": precision, "group_size": GROUP_SIZES[precision]}
        quantization["svdq_w4a4"] = {**common, "rank": rank, "targets": svdq}
    if awq:
        quantization["awq_w4a16"] = {"precision": "int4", "group_size": packing.AWQ_GROUP, "targets": awq}
    if not svdq and not awq:
        raise ValueError("no layer of the model can be written in 4 bits. Use `requantize_weight_only=True`.")
    config = json.loads(model.to_json_string())
    config["quantization_config"] = quantization
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    pattern = f"{WEIGHTS}{{suffix}}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_model(model: nn.Module, layers: Mapping[str, SVDQuantLayer]) -> tuple[torch.dtype, str, int]:
    """The dtype, format and rank that all layers share."""
    if not layers:
        raise ValueError(f"`model` must have layers quantized by SVDQuant, but {type(model).__name__} has none.")
    if getattr(model, "peft_config", None):
        raise ValueError("`model` must have no adapters. Fuse or unload them first.")
    convolutions = [name for name, layer in layers.items() if isinstance(layer, SVDQuantConv2d)]
    if convolutions:
        raise ValueError(
            f"Nunchaku-Lite has linear layers only, but `model` has {len(convolutions)} quantized convolutions, such "
            f"as {convolutions[0]!r}. List them in `modules_to_not_convert` when quantizing."
        )
    quantized = {name: layer for name, layer in layers.items() if not layer.is_weight_only}
    for name, layer in quantized.items():
        outputs, inputs = layer.qweight.shape[0], layer.smooth_factor.shape[0]
        if outputs % packing.TILE or inputs % packing.TILE:
            raise ValueError(
                f"the sides of a layer in Nunchaku-Lite must be multiples of {packing.TILE}, but {name!r} is "
                f"{outputs} x {inputs}. List it in `modules_to_not_convert` when quantizing."
            )
    precisions = {layer.precision for layer in quantized.values()} or {"int4"}
    dtypes = {layer.proj_up.dtype for layer in layers.values()}
    ranks = [layer.rank for layer in quantized.values()]
    rank = max([1, *ranks])
    rank += -rank % packing.RANK_TILE
    for what, found, allowed in (
        ("format", precisions, [{"int4"}, {"nvfp4"}]),
        ("dtype", dtypes, [{torch.bfloat16}, {torch.float16}]),
    ):
        if found not in allowed:
            raise ValueError(
                f"the layers of `model` must have one {what} of {allowed}, got {sorted(map(str, found))}."
            )
    if rank > MAX_RANK:
        raise ValueError(f"the ranks of `model` must be at most {MAX_RANK}, got {rank}.")
    return dtypes.pop(), precisions.pop(), rank
