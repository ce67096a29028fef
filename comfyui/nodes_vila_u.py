"""The nodes of VILA-U: images from prompts, and answers to questions about images."""

from typing import Any

from torch import Tensor

from . import host
from .host import DTYPES, SEED, TEXT, Node, dtype_named, put_on_device
from .places import ELSEWHERE, VILA_U, source, state_of
from .sampling import run_pipeline, to_pil


PREVIEWS = 8  # per image; each decodes an image


class VilaULoad(Node):
    """Loads a VILA-U, which generates images and answers questions about them.

    The list has the bundled model and the folders in models/diffusers.
    """

    CATEGORY = "Sana/VILA-U"
    DISPLAY_NAME = "Load VILA-U"
    RETURN_TYPES = ("VILA_U_MODEL",)
    RETURN_NAMES = ("model",)
    REQUIRED = {
        "model": (VILA_U.names, {"tooltip": "folder in models/diffusers, or a bundled model"}),
        "dtype": (DTYPES, {"default": "auto", "tooltip": "auto: bfloat16 on a GPU, float32 on a CPU"}),
        "cpu_offload": ("BOOLEAN", {"default": False, "tooltip": "keep it on the GPU only while it runs"}),
    }
    OPTIONAL = {"path": ELSEWHERE}

    @classmethod
    def IS_CHANGED(cls, model: str, path: str = "", **others: Any) -> str:
        """ComfyUI compares the result before it uses an earlier output again."""
        return state_of(VILA_U.place(model, path))

    def run(self, model: str, dtype: str, cpu_offload: bool, path: str = "") -> tuple[Any]:
        """Raises a ValueError if the model is not a VILA-U."""
        from diffusers_sana import VilaUPipeline

        pipe = VilaUPipeline.from_pretrained(source(VILA_U.place(model, path)), dtype=dtype_named(dtype))
        pipe.set_progress_bar_config(disable=True)  # ComfyUI shows its own
        put_on_device(pipe, cpu_offload)
        return (pipe,)


class VilaUGenerate(Node):
    """Generates images from a prompt, token by token."""

    CATEGORY = "Sana/VILA-U"
    DISPLAY_NAME = "Generate with VILA-U"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    REQUIRED = {
        "model": ("VILA_U_MODEL",),
        "prompt": TEXT,
        "negative_prompt": TEXT,
        "guidance_scale": ("FLOAT", {"default": 3.0, "min": 1.0, "max": 30.0, "step": 0.1}),
        "seed": SEED,
        "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
    }

    def run(self, model: Any, seed: int, batch_size: int, **options: Any) -> tuple[Tensor]:
        """Images `[B, H, W, 3]` in [0, 1]."""
        bar = host.progress_bar(1)

        def on_token(pipe: Any, token: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if bar is not None:
                message, done = None, token + 1
                if host.wants_previews() and done % max(1, pipe.num_timesteps // PREVIEWS) == 0:
                    message = host.preview_message(pipe.decode(tensors["codes"][:1])[0])
                bar.update_absolute(done, pipe.num_timesteps, message)
            return {}

        return (run_pipeline(model, seed, on_token, offloaded=model, num_images_per_prompt=batch_size, **options),)


class VilaUAsk(Node):
    """Answers a question about an image. Connect the answer to Preview Any, or to a prompt."""

    CATEGORY = "Sana/VILA-U"
    DISPLAY_NAME = "Ask VILA-U"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("answer",)
    REQUIRED = {
        "model": ("VILA_U_MODEL",),
        "image": ("IMAGE", {"tooltip": "several are asked about together"}),
        "question": ("STRING", {"multiline": True, "default": "What is this?"}),
        "max_new_tokens": ("INT", {"default": 256, "min": 1, "max": 4096}),
    }

    def run(self, model: Any, image: Tensor, question: str, max_new_tokens: int) -> tuple[str]:
        """One answer, to all images together."""
        return (model.chat([to_pil(image)], question, max_new_tokens=max_new_tokens)[0],)


NODES = (VilaULoad, VilaUGenerate, VilaUAsk)
