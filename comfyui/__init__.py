"""Nodes of ComfyUI for Sana; see README.md beside this file.

What runs between them is a `SanaModel`: a loaded pipeline, which all share, and the LoRAs of one branch of the graph.
A node changes nothing in a pipeline that another node, or a later run of the same graph, could notice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from diffusers_sana import (
    SanaImg2ImgPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    checkpoint_path,
    find_pipeline_class,
    quantize,
)
from diffusers_sana.files import digest


try:
    from comfy.utils import ProgressBar
except ImportError:  # the nodes are plain Python, also without ComfyUI
    ProgressBar = None

DTYPES = ["bfloat16", "float32", "float16"]
LARGEST_SEED = 2**64 - 1
TEXT = ("STRING", {"multiline": True, "default": ""})
IMAGE_TO_IMAGE = {SanaPipeline: SanaImg2ImgPipeline, SanaSprintPipeline: SanaSprintImg2ImgPipeline}


@dataclass(frozen=True, eq=False)
class SanaModel:
    """A pipeline and what is to be in force when it generates.

    Attributes:
        pipe: shared by all nodes behind the one that loaded it.
        loras: file -> strength.
        branches: all models that share the pipeline, as long as ComfyUI keeps them.
    """

    pipe: Any
    loras: tuple[tuple[str, float], ...] = ()
    branches: WeakSet = field(default_factory=WeakSet)

    def __post_init__(self) -> None:
        self.branches.add(self)

    def prepare(self) -> None:
        """Puts exactly `loras` in force. Files stay loaded while a branch uses them and they do not change."""
        used = {state_of(file) for model in self.branches for file, _ in model.loras}
        loaded = set(getattr(self.pipe.transformer, "peft_config", {}))
        if loaded and not loaded & used:
            self.pipe.unload_lora_weights()
        elif loaded - used:
            self.pipe.delete_adapters(sorted(loaded - used))
        strengths: dict[str, float] = {}
        for file, strength in self.loras:
            name = state_of(file)
            if name not in getattr(self.pipe.transformer, "peft_config", {}):
                self.pipe.load_lora_weights(file, adapter_name=name)
            strengths[name] = strengths.get(name, 0.0) + strength
        if strengths:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(strengths), list(strengths.values()))
        elif getattr(self.pipe.transformer, "peft_config", {}):
            self.pipe.disable_lora()


def state_of(place: str) -> str:
    """A name of a file or folder as it is now, from paths, sizes and times; of a Hub id, which stands for itself."""
    path = Path(place)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()) if place else []
    return digest(place, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files))


class SanaLoad:
    """Loads a pipeline of Sana or SANA-Sprint."""

    CATEGORY = "Sana"
    RETURN_TYPES = ("SANA_MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("STRING", {"default": "sana-emoji", "tooltip": "folder, Hub id, or sana-emoji"}),
                "dtype": (DTYPES, {"default": "bfloat16"}),
                "four_bit": ("BOOLEAN", {"default": False, "tooltip": "quantize the transformer after loading"}),
                "cpu_offload": ("BOOLEAN", {"default": False, "tooltip": "keep on the GPU only what runs"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: str, **others: Any) -> str:
        """Asked by ComfyUI before it uses an earlier result again."""
        return state_of(str(checkpoint_path(model.strip())))

    def load(self, model: str, dtype: str, four_bit: bool, cpu_offload: bool) -> tuple[SanaModel]:
        """Raises a ValueError for a model that is no Sana."""
        place = checkpoint_path(model.strip())
        pipeline_class = find_pipeline_class(place)
        if pipeline_class not in IMAGE_TO_IMAGE:
            raise ValueError(f"`model` must be a Sana or a SANA-Sprint, but {model!r} is a {pipeline_class.__name__}.")
        pipe = pipeline_class.from_pretrained(place, torch_dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=ProgressBar is not None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not cpu_offload:
            pipe.to(device)
        if four_bit:
            quantize(pipe)
        if cpu_offload:
            pipe.enable_model_cpu_offload()
        return (SanaModel(pipe),)


class SanaLora:
    """Adds a LoRA, in the format of one of many trainers."""

    CATEGORY = "Sana"
    RETURN_TYPES = ("SANA_MODEL",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("SANA_MODEL",),
                "lora": ("STRING", {"default": "", "tooltip": "file, folder or Hub id"}),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **others: Any) -> str:
        """Asked by ComfyUI before it uses an earlier result again."""
        return state_of(lora.strip())

    def add(self, model: SanaModel, lora: str, strength: float) -> tuple[SanaModel]:
        """The file is read when the model first generates with it, and again when it has changed."""
        return (replace(model, loras=(*model.loras, (lora.strip(), strength))),)


class SanaSample:
    """Draws images of a prompt."""

    CATEGORY = "Sana"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        native = {"default": 0, "min": 0, "max": 8192, "step": 32, "tooltip": "0: the size of the checkpoint"}
        return {
            "required": {
                **_common_inputs(),
                "width": ("INT", native),
                "height": ("INT", native),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    def sample(self, model: SanaModel, width: int, height: int, batch_size: int, **common: Any) -> tuple[Tensor]:
        """Images `[B, H, W, 3]` in [0, 1]."""
        return _drawn(
            model, model.pipe, width=width or None, height=height or None, num_images_per_prompt=batch_size, **common
        )


class SanaImageToImage:
    """Changes images."""

    CATEGORY = "Sana"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "change"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        strength = {"default": 0.6, "min": 0.05, "max": 1.0, "step": 0.05, "tooltip": "how far from the image"}
        return {"required": {**_common_inputs(), "image": ("IMAGE",), "strength": ("FLOAT", strength)}}

    def change(self, model: SanaModel, image: Tensor, strength: float, **common: Any) -> tuple[Tensor]:
        """Images `[B, H, W, 3]` in [0, 1] of as many."""
        pipe = IMAGE_TO_IMAGE[type(model.pipe)].from_pipe(model.pipe)
        return _drawn(model, pipe, image=image[..., :3].movedim(-1, 1), strength=strength, **common)


def _common_inputs() -> dict[str, Any]:
    return {
        "model": ("SANA_MODEL",),
        "prompt": TEXT,
        "negative_prompt": TEXT,
        "steps": ("INT", {"default": 20, "min": 1, "max": 200}),
        "guidance_scale": ("FLOAT", {"default": 4.5, "min": 1.0, "max": 30.0, "step": 0.1}),
        "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED}),
    }


def _drawn(model: SanaModel, pipe: Any, negative_prompt: str, steps: int, seed: int, **options: Any) -> tuple[Tensor]:
    """What a pipeline draws, `[B, H, W, 3]` in [0, 1] on the CPU."""
    if not isinstance(pipe, SanaSprintPipeline | SanaSprintImg2ImgPipeline):
        options["negative_prompt"] = negative_prompt
    elif negative_prompt:
        raise ValueError("`negative_prompt` must be empty for SANA-Sprint, which does not use it.")
    model.prepare()
    images = pipe(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),  # of the CPU: the same noise on every device
        output_type="pt",
        callback_on_step_end=_progress(steps),
        **options,
    ).images
    return (images.movedim(1, -1).float().cpu(),)


def _progress(steps: int) -> Callable[..., dict] | None:
    if ProgressBar is None:
        return None
    bar = ProgressBar(steps)

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        bar.update_absolute(step + 1)
        return tensors

    return on_step_end


NODE_CLASS_MAPPINGS = {
    "SanaLoad": SanaLoad,
    "SanaLora": SanaLora,
    "SanaSample": SanaSample,
    "SanaImageToImage": SanaImageToImage,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SanaLoad": "Load Sana",
    "SanaLora": "Sana LoRA",
    "SanaSample": "Draw with Sana",
    "SanaImageToImage": "Change images with Sana",
}
