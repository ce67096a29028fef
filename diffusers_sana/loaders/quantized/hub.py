"""Quantized checkpoints of all runtimes, read and written: `load_quantized`, `export_quantized`, `convert_quantized`.

    checkpoint.py   what lies on disk, and which family it is of
    layer.py        a layer in natural order, between all formats
    names.py        fused and renamed layers
    assemble.py     from tensors to a model with our layers
    model.py        from a model with our layers to tensors
    vllm_omni.py, modelopt.py, comfy.py, cache_dit.py, sdnq.py, ../nunchaku/: one format each

A format's `reading` says how to read a checkpoint and its `write` returns what to write.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_sana.files import read_json
from diffusers_sana.loaders.nunchaku import lite
from diffusers_sana.loaders.nunchaku import load as nunchaku
from diffusers_sana.loaders.nunchaku import write as nunchaku_write
from diffusers_sana.loaders.quantized import TARGETS, cache_dit, comfy, comfy_convrot, modelopt, sdnq, vllm_omni
from diffusers_sana.loaders.quantized.assemble import Reading, assemble, check_dtype, empty_model, stored_dtype
from diffusers_sana.loaders.quantized.checkpoint import Checkpoint, local_path, open_checkpoint
from diffusers_sana.loaders.quantized.layer import Source
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written
from diffusers_sana.quantizers.svdquant.calibrate import run_pipeline


logger = logging.getLogger(__name__)

OWN = TARGETS[-1]
WEIGHTS = "diffusion_pytorch_model"
READERS: dict[str, Callable[[Checkpoint, str, Mapping[str, Tensor]], Reading]] = {
    "nunchaku": nunchaku.reading,
    "auto-round": nunchaku.reading,
    "nunchaku-lite": lite.reading,
    "cache-dit": cache_dit.reading,
    "vllm-omni": vllm_omni.reading,
    "modelopt": modelopt.reading,
    "comfy": comfy.reading,
    "sdnq": sdnq.reading,
}
WRITERS: dict[str, Callable[..., Written]] = {
    "nunchaku": nunchaku_write.write,
    "nunchaku-lite": lite.write,
    "vllm-omni": vllm_omni.write,
    "modelopt": modelopt.write,
    "comfy": comfy.write,
    "comfy-convrot": comfy.write_convrot,
    "cache-dit": cache_dit.write,
}
TAKES_ROTATED = {"comfy": comfy_convrot.fits, "comfy-convrot": comfy_convrot.fits}


def load_quantized(
    path_or_repo: str | Path,
    *,
    subfolder: str = "",
    base: str | Path | None = None,
    model_cls: type[Any] | None = None,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> Any:
    """Loads a model from a quantized checkpoint of any known runtime, on the CPU, with this package's layers.

    The runtime is recognised by the tensors. 4-bit codes and scales are never changed.

    Args:
        path_or_repo: a `.safetensors` file or a folder of them, or either on the Hub: "owner/name/file.safetensors",
            "owner/name".
        subfolder: of a folder, such as "transformer".
        base: the 16-bit model or its pipeline, a folder or Hub id: for files that have neither a config nor all
            tensors, as those of ComfyUI and cache-dit, and to tell orders apart in older files of vLLM-Omni.
        model_cls: the class to build; by default the diffusers class that the config names.
        dtype: of everything except packed weights: bfloat16, float16 or float32; by default the checkpoint's.
        hub: for `huggingface_hub`, such as `revision` or `token`.

    Returns:
        A diffusers model in eval mode, which `save_pretrained` writes in this package's own format.

    Raises:
        TypeError: an option that the Hub does not know.
        ValueError: no known format, a layer that this package's layers cannot represent, or a file that is damaged or
            for a different architecture; the layer or tensor is named.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path_or_repo, subfolder, **hub)
    family = checkpoint.family
    if family == OWN:
        cls = model_cls or getattr(diffusers, checkpoint.config.get("_class_name", ""), None)
        if cls is None:
            raise ValueError(f"`model_cls` must be given: {checkpoint.path} does not name a class of diffusers.")
        return cls.from_pretrained(checkpoint.path, dtype=dtype)
    of_base = Checkpoint(Path(), {}) if base is None else _open_base(base, subfolder or "transformer", hub)
    config = checkpoint.config or of_base.config
    if not config:
        raise ValueError(
            f"`base` must be the 16-bit model, a folder or Hub id: {checkpoint.path} has no config of the model."
        )
    name = config.get("_class_name") or checkpoint.metadata.get("model_class", "")
    if family in ("nunchaku", "auto-round"):
        name = nunchaku.class_name_of(Checkpoint(checkpoint.path, {}, checkpoint.metadata, config))
    plan = READERS[family](checkpoint, name, of_base.tensors)
    model = empty_model(model_cls, config, name)
    source = Source(plan.tensors, str(checkpoint.path), of_base.tensors)
    return assemble(model, plan.convert, source, dtype or stored_dtype(checkpoint.tensors), plan.ignored)


def _open_base(base: str | Path, component: str, hub: Mapping[str, Any]) -> Checkpoint:
    """The 16-bit model, alone or in a pipeline."""
    path = local_path(str(base), hub)
    return open_checkpoint(path, component if (path / "model_index.json").is_file() else "")


def export_quantized(model: nn.Module, folder: str | Path, to: str, **options: Any) -> Path:
    """Writes a model with this package's quantized layers in the format of another runtime.

    Args:
        model: a diffusers model.
        folder: new or empty; created if necessary.
        to: one of `TARGETS`.
        options: of the format: `requantize=True` rounds once more what the format cannot hold as it is; `num_bits`
            (8 or 4) for "comfy-convrot"; `tiled=True` for "comfy" in the keys of ComfyUI's own loader.

    Returns:
        The file for formats of one file, else the folder.

    Raises:
        ValueError: the format cannot express a layer, which is named; nothing is written.
    """
    folder = Path(folder)
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {TARGETS}, got {to!r}.")
    if to == OWN:
        model.save_pretrained(folder)  # type: ignore[operator]
        return folder
    content = QuantizedModel(model, TAKES_ROTATED.get(to))
    if options.get("requantize"):
        content.requantize_rotated()
    written = WRITERS[to](content, **options)
    folder.mkdir(parents=True, exist_ok=True)
    # Views of one tensor become separate tensors, which safetensors requires.
    tensors = {
        key: torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
        for key, tensor in written.tensors.items()
    }
    for name, content in written.extra.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if written.config is None:
        path = folder / f"{to}.safetensors"
        save_file(tensors, path, written.metadata)
        return path
    (folder / "config.json").write_text(json.dumps(written.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if written.metadata:
        save_file(tensors, folder / f"{WEIGHTS}.safetensors", {"format": "pt", **written.metadata})
    else:
        save_torch_state_dict(tensors, folder, filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors")
    return folder


def convert_quantized(
    path_or_repo: str | Path,
    folder: str | Path,
    to: str,
    *,
    component: str = "transformer",
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    hub: Mapping[str, Any] | None = None,
    prompts: Sequence[str] = (),
    num_inference_steps: int | None = None,
    **options: Any,
) -> Path:
    """Converts a quantized checkpoint of any known runtime to the format of another.

    For a folder of a pipeline, its component is converted; where the new format is a folder too, the other components
    are copied.

    Args:
        path_or_repo: see `load_quantized`.
        folder: new or empty.
        to: one of `TARGETS`.
        component: of a pipeline.
        base: see `load_quantized`.
        dtype: of everything except packed weights; by default the checkpoint's.
        hub: options for `huggingface_hub`.
        prompts: for "modelopt": what the pipeline generates while the scales of the layers' inputs are measured.
        num_inference_steps: of that; by default the pipeline's.
        options: of the format, see `export_quantized`.

    Returns:
        What was written: a file or a folder.

    Raises:
        ValueError: see `load_quantized` and `export_quantized`; nothing is written.
    """
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {TARGETS}, got {to!r}.")
    path, folder = local_path(str(path_or_repo), hub or {}, ["*"]), Path(folder)
    is_pipeline = path.is_dir() and (path / "model_index.json").is_file()
    if is_pipeline and component not in read_json(path / "model_index.json"):
        raise ValueError(f"`component` must be one of the pipeline {path}, got {component!r}.")
    subfolder = component if is_pipeline else ""
    model = load_quantized(path, subfolder=subfolder, base=base, dtype=dtype)
    if prompts:
        if not is_pipeline:
            raise ValueError(f"`prompts` need the folder of a pipeline, got {path}.")
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=model.dtype, **{component: model})
        with modelopt.measure_input_scales(model):
            run_pipeline(pipe, list(prompts), num_inference_steps, 0, False, {})
    result = export_quantized(model, folder / subfolder, to, **options)
    if is_pipeline and result.is_dir():
        for item in sorted(path.iterdir()):
            if item.name != component:
                copy = shutil.copytree if item.is_dir() else shutil.copy2
                copy(item, folder / item.name)
        return folder
    return result
