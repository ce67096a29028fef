"""What the nodes take from ComfyUI, and what serves outside of it, where they are plain Python."""

import inspect
import logging
from typing import Any, ClassVar

import torch


try:
    import comfy.cli_args
    import comfy.model_management
    import comfy.utils
except ImportError:
    comfy = None

try:
    import folder_paths
except ImportError:
    folder_paths = None

logger = logging.getLogger(__name__)

DTYPES = ["auto", "bfloat16", "float32", "float16"]
# Inputs of nodes, in ComfyUI's form.
TEXT = ("STRING", {"multiline": True, "default": "", "dynamicPrompts": True})
SEED = ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True})


class Node:
    """What ComfyUI reads of a node. The description is the docstring of its class.

    A node declares `REQUIRED` and `OPTIONAL` inputs in ComfyUI's form, and works in `run`.
    """

    CATEGORY = "Sana"
    DESCRIPTION: ClassVar[str]
    DISPLAY_NAME: ClassVar[str]
    FUNCTION = "run"
    REQUIRED: ClassVar[dict[str, tuple]] = {}
    OPTIONAL: ClassVar[dict[str, tuple]] = {}
    RETURN_TYPES: ClassVar[tuple[str, ...]]
    RETURN_NAMES: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls.DESCRIPTION = " ".join((inspect.getdoc(cls) or "").split())

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, in ComfyUI's form; the drop-down lists are made again at each call."""
        groups = {"required": cls.REQUIRED, "optional": cls.OPTIONAL}
        return {
            group: {name: (kind() if callable(kind) else kind, *rest) for name, (kind, *rest) in inputs.items()}
            for group, inputs in groups.items()
        }


def device() -> torch.device:
    """Where models run: as ComfyUI's options say."""
    if comfy is not None:
        return comfy.model_management.get_torch_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_named(name: str) -> torch.dtype:
    """One of `DTYPES`; "auto" is bfloat16 on a GPU that computes with it, and else float32."""
    if name != "auto":
        return getattr(torch, name)
    place = device()
    is_fast = place.type == "xpu" or (place.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.bfloat16 if is_fast else torch.float32


def put_on_device(pipe: Any, cpu_offload: bool) -> None:
    """Moves a pipeline to the device; with `cpu_offload`, models follow when they run.

    ComfyUI is asked to free the memory first. A CPU has nothing to offload to: there `cpu_offload` is ignored with a
    warning, so that a workflow from a machine with a GPU runs.
    """
    place = device()
    if cpu_offload and place.type == "cpu":
        logger.warning("`cpu_offload` has no effect: the models run on the CPU.")
        cpu_offload = False
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    sizes = [sum(tensor.nbytes for tensor in model.state_dict().values()) for model in models]
    if comfy is not None and place.type != "cpu":
        comfy.model_management.free_memory(max(sizes) if cpu_offload else sum(sizes), place)
    if cpu_offload:
        pipe.enable_model_cpu_offload(device=place)
    else:
        pipe.to(place)


def progress_bar(total: int) -> Any:
    """ComfyUI's bar of the node that runs, whose updates also raise when the user interrupts; None outside."""
    return None if comfy is None else comfy.utils.ProgressBar(total)


def wants_previews() -> bool:
    """Whether the user has turned previews on. Any method means ours: there is no TAESD for these latents."""
    return comfy is not None and comfy.cli_args.args.preview_method.value != "none"


def preview_message(image: Any) -> tuple[str, Any, int]:
    """A preview as ComfyUI's bar takes it; the server scales it up to the user's size."""
    return ("JPEG", image, comfy.cli_args.args.preview_size)
