"""Converts original files of Sana, SANA-Video, ControlNets and DC-AE to diffusers folders of a model or a pipeline.

To load such a file without writing anything, use `from_single_file` of the model; see
`docs/third_party_checkpoints.md`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from diffusers_sana.files import read_json
from diffusers_sana.loaders.nvlabs.dc_ae import CLASS_NAME as AUTOENCODER
from diffusers_sana.loaders.nvlabs.dc_ae import is_official_dc, read_official_dc
from diffusers_sana.loaders.nvlabs.load import MODELS
from diffusers_sana.loaders.nvlabs.sana import (
    CONTROLNET,
    TRANSFORMER,
    is_official_sana,
    read_official_sana,
)
from diffusers_sana.loaders.nvlabs.sana_video import VIDEO, is_official_video, read_official_video
from diffusers_sana.loaders.nvlabs.sana_video2 import VIDEO2, is_official_video2, read_official_video2
from diffusers_sana.loaders.single_file import (
    OfficialWeights,
    check_config_fields,
    read_content,
    select_weights,
    weight_sets,
)


COMPONENTS = {
    TRANSFORMER: "transformer",
    CONTROLNET: "controlnet",
    AUTOENCODER: "vae",
    VIDEO: "transformer",
    VIDEO2: "transformer",
}
IN_SANA_FILES = {"transformer": TRANSFORMER, "controlnet": CONTROLNET}
# What the other components of a pipeline rely on.
MUST_FIT = ("in_channels", "caption_channels", "latent_channels", "guidance_embeds")
MAX_SHARD_SIZE = "5GB"  # in memory at a time


@dataclass
class ConversionPlan:
    """What a conversion will do.

    Attributes:
        official: which model the file contains, and where every tensor goes.
        model: the model with the memory-mapped weights of the file.
        weights: which weights of the file these are, "model" or "ema".
        other_weights: the other sets of weights in the file.
    """

    official: OfficialWeights
    model: Any
    weights: str = "model"
    other_weights: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        """The name of the model in a pipeline."""
        return COMPONENTS[self.official.class_name]

    def __str__(self) -> str:
        tensors = self.model.state_dict().values()
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        count = sum(tensor.numel() for tensor in tensors)
        lines = [
            f"{self.official.class_name}: {len(tensors)} tensors, {count:,} parameters, {', '.join(dtypes)}",
            *(f"  {name} = {value!r}" for name, value in sorted(self.official.config.items())),
        ]
        if self.other_weights:
            lines.append(f"weights: {self.weights}; the file also has {', '.join(self.other_weights)}")
        if self.official.left_out:
            lines.append(f"left out: {len(self.official.left_out)} tensors, such as {self.official.left_out[0]}")
        return "\n".join(lines)


def plan_conversion(
    path: str | Path,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "model",
    **fields: Any,
) -> ConversionPlan:
    """Checks a file and returns what `convert` would do: a dry run.

    Args:
        path: `.pth` or `.safetensors` of Sana, SANA-1.5, SANA-Sprint, SANA-Video, SANA-Video 2.0, LongSANA, a
            ControlNet or DC-AE, with the original tensor names.
        component: "transformer" or "controlnet", for a file that has both; by default the ControlNet.
        dtype: of the weights; by default the file's, in which case no weight is read.
        weights: "model", or "ema" for the EMA weights that the original trainers store next to them.
        fields: config fields that the file does not state or states wrongly.

    Raises:
        ValueError: the file is damaged or for a different architecture, or a tensor is missing, unknown or of another
            shape (it is named); a required field is missing.
        TypeError: an argument that is not a config field.
    """
    content = read_content(path)
    checkpoint = select_weights(content, weights)
    other_weights = tuple(name for name in weight_sets(content) if name != weights)
    if is_official_video2(checkpoint):
        official = read_official_video2(checkpoint, **fields)
    elif is_official_video(checkpoint):
        official = read_official_video(checkpoint, **fields)
    elif is_official_sana(checkpoint):
        official = read_official_sana(checkpoint, IN_SANA_FILES[component] if component else None, **fields)
    elif is_official_dc(checkpoint):
        official = read_official_dc(checkpoint, **fields)
    else:
        raise ValueError(
            f"{path} must be an original file of Sana or DC-AE, but has a tensor {next(iter(checkpoint))!r}."
        )
    model_cls = MODELS[official.class_name]
    check_config_fields(model_cls, fields)
    return ConversionPlan(official, official.model(checkpoint, model_cls, dtype), weights, other_weights)


def convert(
    path: str | Path,
    target: str | Path,
    base: str | Path | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "model",
    **fields: Any,
) -> ConversionPlan:
    """Converts a file to a folder that `from_pretrained` of diffusers and of this package loads.

    Args:
        path, component, dtype, weights, fields: see `plan_conversion`.
        target: a new folder.
        base: folder or Hub id of a pipeline that provides the other components; None writes the model alone.

    Returns:
        What was done; `print` it for a summary.

    Raises:
        ValueError, TypeError: see `plan_conversion`; a `base` that does not match the model.
        FileExistsError: `target` is not empty.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"`target` must be a new folder, but {target} is not empty.")
    plan = plan_conversion(path, component, dtype, weights, **fields)
    folder = target
    if base is not None:
        _copy_base(plan, str(base), target)
        folder = target / plan.component
    plan.model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    return plan


def _copy_base(plan: ConversionPlan, base: str, target: Path) -> None:
    """Copies a pipeline except for one component."""
    name = plan.component
    if not Path(base).is_dir():
        base = snapshot_download(base, ignore_patterns=[f"{name}/*.safetensors*", f"{name}/*.bin*"])
    index = read_json(Path(base) / "model_index.json")
    if name not in index:
        parts = [part for part, value in index.items() if isinstance(value, list)]
        raise ValueError(
            f"`base` must be a pipeline with a {name!r}, but {base} has {parts}. Convert the model alone."
        )
    old = read_json(Path(base) / name / "config.json")
    for field in MUST_FIT:
        new = plan.official.config.get(field)
        if new is not None and field in old and old[field] != new:
            raise ValueError(
                f"`base` must have a {name} with {field} = {new!r}, as in the file, but {base} has {old[field]!r}. "
                "It is for a different architecture."
            )
    shutil.copytree(base, target, ignore=shutil.ignore_patterns(name, ".*"), dirs_exist_ok=True)
