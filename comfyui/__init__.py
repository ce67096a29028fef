"""ComfyUI nodes for Sana; see README.md beside this file.

They pass on a `SanaModel`: a loaded pipeline, which all nodes share, and the LoRAs of one branch of the graph. A node
changes nothing in a pipeline that another node, or a later run of the same graph, could notice.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
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


try:
    from comfy.utils import ProgressBar
except ImportError:  # without ComfyUI the nodes are plain Python
    ProgressBar = None

DTYPES = ["bfloat16", "float32", "float16"]
IMAGE_TO_IMAGE = {SanaPipeline: SanaImg2ImgPipeline, SanaSprintPipeline: SanaSprintImg2ImgPipeline}


@dataclass(frozen=True, eq=False)
class SanaModel:
    """A pipeline, and the LoRAs to generate with.

    Attributes:
        pipe: shared by all nodes behind the one that loaded it.
        loras: pairs of file and strength.
        branches: all models that share the pipeline, as long as ComfyUI keeps them.
    """

    pipe: Any
    loras: tuple[tuple[str, float], ...] = ()
    branches: WeakSet = field(default_factory=WeakSet)

    def __post_init__(self) -> None:
        self.branches.add(self)

    def prepare(self) -> None:
        """Activates exactly `loras`. Files stay loaded while a branch uses them and they do not change."""
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
    """A digest of a file or folder as it is now, from paths, sizes and times; of a Hub id, only of the id."""
    path = Path(place)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()) if place else []
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr((place, states)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Node:
    """What ComfyUI reads of a node: category, outputs, the name of its function, and its inputs."""

    CATEGORY = "Sana"
    RETURN_TYPES: tuple[str, ...] = ("SANA_MODEL",)
    FUNCTION = "run"
    INPUTS: ClassVar[dict[str, tuple]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, in ComfyUI's form."""
        return {"required": cls.INPUTS}


class SanaLoad(Node):
    """Loads a pipeline of Sana or SANA-Sprint."""

    INPUTS = {
        "model": ("STRING", {"default": "sana-emoji", "tooltip": "folder, Hub id, or sana-emoji"}),
        "dtype": (DTYPES, {"default": "bfloat16"}),
        "four_bit": ("BOOLEAN", {"default": False, "tooltip": "quantize the transformer after loading"}),
        "cpu_offload": ("BOOLEAN", {"default": False, "tooltip": "keep on the GPU only what runs"}),
    }

    @classmethod
    def IS_CHANGED(cls, model: str, **others: Any) -> str:
        """ComfyUI compares the result before it uses an earlier output again."""
        return state_of(checkpoint_path(model.strip()))

    def run(self, model: str, dtype: str, four_bit: bool, cpu_offload: bool) -> tuple[SanaModel]:
        """Raises a ValueError if the model is not a Sana."""
        place = checkpoint_path(model.strip())
        found = find_pipeline_class(place)
        if found not in IMAGE_TO_IMAGE:
            raise ValueError(f"`model` must be a Sana or a SANA-Sprint, but {model!r} is a {found.__name__}.")
        pipe = found.from_pretrained(place, dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=ProgressBar is not None)
        if not cpu_offload:
            pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        if four_bit:
            quantize(pipe)
        if cpu_offload:
            pipe.enable_model_cpu_offload()
        return (SanaModel(pipe),)


class SanaLora(Node):
    """Adds a LoRA, in the format of one of many trainers."""

    INPUTS = {
        "model": ("SANA_MODEL",),
        "lora": ("STRING", {"default": "", "tooltip": "file, folder or Hub id"}),
        "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
    }

    @classmethod
    def IS_CHANGED(cls, lora: str, **others: Any) -> str:
        """ComfyUI compares the result before it uses an earlier output again."""
        return state_of(lora.strip())

    def run(self, model: SanaModel, lora: str, strength: float) -> tuple[SanaModel]:
        """The file is read when the model first generates with it, and again after it has changed."""
        return (replace(model, loras=(*model.loras, (lora.strip(), strength))),)


TEXT = ("STRING", {"multiline": True, "default": ""})
SIZE = ("INT", {"default": 0, "min": 0, "max": 8192, "step": 32, "tooltip": "0: the size of the checkpoint"})
SAMPLING = {
    "model": ("SANA_MODEL",),
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "steps": ("INT", {"default": 20, "min": 1, "max": 200}),
    "guidance_scale": ("FLOAT", {"default": 4.5, "min": 1.0, "max": 30.0, "step": 0.1}),
    "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
}


class SanaSample(Node):
    """Generates images from a prompt."""

    RETURN_TYPES = ("IMAGE",)
    INPUTS = {
        **SAMPLING,
        "width": SIZE,
        "height": SIZE,
        "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
    }

    def run(self, model: SanaModel, width: int, height: int, batch_size: int, **sampling: Any) -> tuple[Tensor]:
        """Images `[B, H, W, 3]` in [0, 1]."""
        options = {"width": width or None, "height": height or None, "num_images_per_prompt": batch_size}
        return generate(model, model.pipe, **options, **sampling)


class SanaImageToImage(Node):
    """Changes images as a prompt says."""

    RETURN_TYPES = ("IMAGE",)
    INPUTS = {
        **SAMPLING,
        "image": ("IMAGE",),
        "strength": (
            "FLOAT",
            {"default": 0.6, "min": 0.05, "max": 1.0, "step": 0.05, "tooltip": "how far from the image"},
        ),
    }

    def run(self, model: SanaModel, image: Tensor, strength: float, **sampling: Any) -> tuple[Tensor]:
        """As many images `[B, H, W, 3]` in [0, 1] as `image` has."""
        pipe = IMAGE_TO_IMAGE[type(model.pipe)].from_pipe(model.pipe)
        return generate(model, pipe, image=image[..., :3].movedim(-1, 1), strength=strength, **sampling)


def generate(
    model: SanaModel, pipe: Any, negative_prompt: str, steps: int, seed: int, **options: Any
) -> tuple[Tensor]:
    """The images of a pipeline, `[B, H, W, 3]` in [0, 1] on the CPU."""
    if not isinstance(pipe, SanaSprintPipeline | SanaSprintImg2ImgPipeline):
        options["negative_prompt"] = negative_prompt
    elif negative_prompt:
        raise ValueError("`negative_prompt` must be empty for SANA-Sprint, which does not use it.")
    model.prepare()
    images = pipe(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),  # of the CPU: the same noise on every device
        output_type="pt",
        callback_on_step_end=progress_callback(steps),
        **options,
    ).images
    return (images.movedim(1, -1).float().cpu(),)


def progress_callback(steps: int) -> Callable[..., dict] | None:
    """A callback of a pipeline that moves ComfyUI's progress bar; None without ComfyUI."""
    if ProgressBar is None:
        return None
    bar = ProgressBar(steps)

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        bar.update_absolute(step + 1, pipe.num_timesteps)  # of image-to-image, fewer than `steps`
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
    "SanaSample": "Generate with Sana",
    "SanaImageToImage": "Change images with Sana",
}
