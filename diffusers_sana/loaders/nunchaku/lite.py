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
from torch import Tensor

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
from diffusers_sana.loaders.quantized.assemble import (
    Conversion,
    Converter,
    Reading,
    assemble,
    check_dtype,
    convert_by_names,
    empty_model,
    matrix_shape,
    stored_dtype,
)
from diffusers_sana.loaders.quantized.checkpoint import Checkpoint, read_safetensors
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written


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
    check_dtype(dtype)
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
    model = empty_model(model_cls, config, config.get("_class_name", ""))
    source = Source(tensors, str(path))
    return assemble(model, converter(quantization), source, dtype or stored_dtype(tensors))


def converter(quantization: Mapping[str, Any]) -> Converter:
    """How to read a folder with this `quantization_config`."""

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        out = Conversion(dtype)
        for name in (quantization.get("svdq_w4a4") or {}).get("targets", ()):
            out.add(name, read_svdq(source, name, *matrix_shape(shapes, name), LITE_NAMES))
        for name in (quantization.get("awq_w4a16") or {}).get("targets", ()):
            out.add(name, read_awq(source, name, *matrix_shape(shapes, name)))
        if not out.layers:
            raise ValueError(f"{source.origin} must list at least one layer in its config.json, got none.")
        return out

    return convert


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a folder; without its config, by the names of the tensors."""
    if checkpoint.quantization:
        return Reading(converter(checkpoint.quantization), checkpoint.tensors)

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        def read(name: str, rows: int, columns: int) -> UnpackedLayer | None:
            if f"{name}.wzeros" in source:
                return read_awq(source, name, rows, columns)
            return read_svdq(source, name, rows, columns, LITE_NAMES) if f"{name}.qweight" in source else None

        return convert_by_names(source, shapes, dtype, {}, read)

    return Reading(convert, checkpoint.tensors)


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
    written = write(QuantizedModel(model), requantize_weight_only=requantize_weight_only)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in written.tensors.items()}
    pattern = f"{WEIGHTS}{{suffix}}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(written.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write(model: QuantizedModel, requantize: bool = False, requantize_weight_only: bool = False, **_: Any) -> Written:
    """The content of a folder; see `export_nunchaku_lite`.

    With `requantize`, also layers of the rarer of two formats are rounded once more.
    """
    quantized = [name for name in model.layers if not model.is_weight_only(name)]
    if requantize:
        model.convert_precision(quantized, model.usual_precision(quantized), requantize, "Nunchaku-Lite")
    precision = _check_model(model, quantized)
    rank = model.common_rank(quantized, packing.RANK_TILE)
    if rank > MAX_RANK:
        raise ValueError(f"the ranks of `model` must be at most {MAX_RANK}, got {rank}.")
    state = dict(model.tensors)
    svdq, awq = [], []
    for name in model.layers:
        item = model.layer(name)
        if not item.weight_only:
            svdq.append(name)
            parts = svdq_tensors(item.with_rank(rank), model.dtype)
            if item.precision == "nvfp4":
                parts["wtscale"] = torch.ones(1, dtype=model.dtype)
        elif fits_awq(item) and (requantize or requantize_weight_only or is_plain(item)):
            awq.append(name)
            parts = awq_tensors(item, model.dtype)
        else:
            parts = model.dense(name)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    dtype = str(model.dtype).rpartition(".")[2]
    quantization: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": dtype}
    if svdq:
        common = {"precision": precision, "group_size": GROUP_SIZES[precision]}
        quantization["svdq_w4a4"] = {**common, "rank": rank, "targets": svdq}
    if awq:
        quantization["awq_w4a16"] = {"precision": "int4", "group_size": packing.AWQ_GROUP, "targets": awq}
    if not svdq and not awq:
        raise ValueError("no layer of the model can be written in 4 bits. Use `requantize_weight_only=True`.")
    return Written(state, {**model.config, "quantization_config": quantization})


def _check_model(model: QuantizedModel, quantized: list[str]) -> str:
    """The format that all layers share."""
    convolutions = [name for name in model.layers if model.is_convolution(name)]
    if convolutions:
        raise ValueError(
            f"Nunchaku-Lite has linear layers only, but `model` has {len(convolutions)} quantized convolutions, such "
            f"as {convolutions[0]!r}. List them in `modules_to_not_convert` when quantizing."
        )
    for name in quantized:
        outputs, inputs = model.layer(name).codes.shape
        if outputs % packing.TILE or inputs % packing.TILE:
            raise ValueError(
                f"the sides of a layer in Nunchaku-Lite must be multiples of {packing.TILE}, but {name!r} is "
                f"{outputs} x {inputs}. List it in `modules_to_not_convert` when quantizing."
            )
    precisions = {model.layer(name).precision for name in quantized} or {"int4"}
    for what, found, allowed in (
        ("format", precisions, [{"int4"}, {"nvfp4"}]),
        ("dtype", {layer.proj_up.dtype for layer in model.layers.values()}, [{torch.bfloat16}, {torch.float16}]),
    ):
        if found not in allowed:
            raise ValueError(
                f"the layers of `model` must have one {what} of {allowed}, got {sorted(map(str, found))}."
            )
    return precisions.pop()
