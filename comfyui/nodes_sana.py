"""The nodes of Sana and SANA-Sprint."""

from typing import Any

from torch import Tensor

from .host import DTYPES, SEED, TEXT, Node, dtype_named, put_on_device
from .model import Control, SanaModel
from .places import CONTROLNETS, ELSEWHERE, LORAS, SANA, source, state_of
from .sampling import channels_first, control_options, control_size, generate
from .vae import SanaVae


MODEL = ("SANA_MODEL",)
SIZE = ("INT", {"default": 0, "min": 0, "max": 8192, "step": 32, "tooltip": "0: the size of the checkpoint"})
SIZES = {"width": SIZE, "height": SIZE, "batch_size": ("INT", {"default": 1, "min": 1, "max": 64})}
FRACTION = {"min": 0.0, "max": 1.0, "step": 0.01}
STRENGTH = ("FLOAT", {"default": 0.6, "min": 0.05, "max": 1.0, "step": 0.05, "tooltip": "how far from the image"})
GUIDANCE = ("FLOAT", {"default": 4.5, "min": 1.0, "max": 30.0, "step": 0.1, "tooltip": "weight of the prompt"})
GUIDED = {
    "model": MODEL,
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "steps": ("INT", {"default": 20, "min": 1, "max": 200}),
    "guidance_scale": GUIDANCE,
    "seed": SEED,
}
SPRINT = {
    "model": MODEL,
    "prompt": TEXT,
    "steps": ("INT", {"default": 2, "min": 1, "max": 20, "tooltip": "trained for 1 to 4"}),
    "guidance_scale": GUIDANCE,
    "seed": SEED,
}


class SanaLoad(Node):
    """Loads a Sana, SANA-1.5 or SANA-Sprint, and its autoencoder for ComfyUI's own VAE nodes.

    The list has the bundled models and the folders in models/diffusers.
    """

    DISPLAY_NAME = "Load Sana"
    RETURN_TYPES = ("SANA_MODEL", "VAE")
    RETURN_NAMES = ("model", "vae")
    REQUIRED = {
        "model": (SANA.names, {"tooltip": "folder in models/diffusers, or a bundled model"}),
        "dtype": (DTYPES, {"default": "auto", "tooltip": "auto: bfloat16 on a GPU, float32 on a CPU"}),
        "four_bit": ("BOOLEAN", {"default": False, "tooltip": "quantize the transformer after loading (SVDQuant)"}),
        "cpu_offload": ("BOOLEAN", {"default": False, "tooltip": "keep on the GPU only what runs"}),
    }
    OPTIONAL = {"path": ELSEWHERE}

    @classmethod
    def IS_CHANGED(cls, model: str, path: str = "", **others: Any) -> str:
        """ComfyUI compares the result before it uses an earlier output again."""
        return state_of(SANA.place(model, path))

    def run(
        self, model: str, dtype: str, four_bit: bool, cpu_offload: bool, path: str = ""
    ) -> tuple[SanaModel, SanaVae]:
        """Raises a ValueError if the model is not a Sana."""
        from diffusers_sana import quantize

        pipe = load_pipeline(SANA.place(model, path), dtype_named(dtype))
        pipe.set_progress_bar_config(disable=True)  # ComfyUI shows its own
        if not cpu_offload:
            put_on_device(pipe, cpu_offload)
        if four_bit:
            quantize(pipe)
        if cpu_offload:
            put_on_device(pipe, cpu_offload)
        return SanaModel(pipe), SanaVae(pipe.vae)


class ModelNode(Node):
    """Changes a model."""

    RETURN_TYPES = ("SANA_MODEL",)
    RETURN_NAMES = ("model",)


class SanaLora(ModelNode):
    """Adds a LoRA, in the format of one of many trainers, to this branch of the graph. LoRA nodes in a row add up.

    The list has the files in models/loras. A file that was replaced is read again at the next run.
    """

    DISPLAY_NAME = "Sana LoRA"
    REQUIRED = {
        "model": MODEL,
        "lora": (LORAS.names, {"tooltip": "file in models/loras, or a bundled LoRA"}),
        "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
    }
    OPTIONAL = {"path": ELSEWHERE}

    @classmethod
    def IS_CHANGED(cls, lora: str, path: str = "", **others: Any) -> str:
        """ComfyUI compares the result before it uses an earlier output again."""
        return state_of(LORAS.place(lora, path))

    def run(self, model: SanaModel, lora: str, strength: float, path: str = "") -> tuple[SanaModel]:
        """The file is read when the model first generates with it, and again after it has changed."""
        return (model.with_lora(LORAS.place(lora, path), strength),)


class SanaControlNet(ModelNode):
    """Adds a ControlNet and the image that it follows to this branch of the graph. Nodes in a row steer together.

    It acts in all nodes that generate images but "Change images with SANA-Sprint"; a SANA-Sprint takes the ControlNet
    of its teacher. The list has what is in models/controlnet: folders in diffusers' format, and files of NVlabs.
    """

    DISPLAY_NAME = "Sana ControlNet"
    REQUIRED = {
        "model": MODEL,
        "control_net": (CONTROLNETS.names, {"tooltip": "in models/controlnet, or a bundled ControlNet"}),
        "image": ("IMAGE", {"tooltip": "what the ControlNet was trained to follow, such as edges"}),
        "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}),
        "start_percent": ("FLOAT", {"default": 0.0, **FRACTION, "tooltip": "fraction of the steps before it begins"}),
        "end_percent": ("FLOAT", {"default": 1.0, **FRACTION, "tooltip": "fraction of the steps after which it ends"}),
    }
    OPTIONAL = {"path": ELSEWHERE}

    @classmethod
    def IS_CHANGED(cls, control_net: str, path: str = "", **others: Any) -> str:
        """ComfyUI compares the result before it uses an earlier output again."""
        return state_of(CONTROLNETS.place(control_net, path))

    def run(
        self,
        model: SanaModel,
        control_net: str,
        image: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        path: str = "",
    ) -> tuple[SanaModel]:
        """The file is read when the model first generates with it, and again after it has changed."""
        place = CONTROLNETS.place(control_net, path)
        return (model.with_control(Control(place, image, strength, start_percent, end_percent)),)


class SanaEdges(Node):
    """The edges of images by Sobel's filters, white on black: what the bundled ControlNet follows."""

    DISPLAY_NAME = "Sana edges"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("edges",)
    REQUIRED = {"image": ("IMAGE",)}

    def run(self, image: Tensor) -> tuple[Tensor]:
        """Images `[B, H, W, 3]` in [0, 1]."""
        from diffusers_sana import sobel_edges

        return ((sobel_edges(channels_first(image) * 2 - 1) / 2 + 0.5).movedim(1, -1).contiguous(),)


class ImageNode(Node):
    """Base of the nodes that generate images."""

    RETURN_TYPES = ("IMAGE", "LATENT")
    RETURN_NAMES = ("images", "latents")


class SanaSample(ImageNode):
    """Generates images from a prompt, with Sana or SANA-1.5.

    With ControlNet nodes before it the images follow theirs, and have the proportions of the first unless a size is
    set.
    """

    DISPLAY_NAME = "Generate with Sana"
    REQUIRED = GUIDED | SIZES
    OPTIONAL = {
        "pag_scale": (
            "FLOAT",
            {"default": 0.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": "perturbed-attention guidance; 0: off"},
        )
    }

    def run(
        self, model: SanaModel, width: int, height: int, batch_size: int, pag_scale: float = 0.0, **sampling: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images `[B, H, W, 3]` in [0, 1] and their latents.

        Raises:
            ValueError: the model is a SANA-Sprint, or `pag_scale` comes together with a ControlNet.
        """
        from diffusers_sana import SanaControlNetPipeline, SanaPAGPipeline

        check_sprint(model, False, "Generate with SANA-Sprint")
        options = sampling | {"num_images_per_prompt": batch_size, "width": width or None, "height": height or None}
        pipe, controlnet = model.pipe, model.controlnet()
        if controlnet is not None:
            if pag_scale:
                raise ValueError(f"`pag_scale` must be 0 with a ControlNet, got {pag_scale}.")
            return generate_controlled(model, SanaControlNetPipeline, controlnet, options)
        if pag_scale:
            pipe = SanaPAGPipeline.from_pipe(pipe)
            options["pag_scale"] = pag_scale
        return generate(model, pipe, **options)


class SanaImageToImage(ImageNode):
    """Changes images, or latents, as a prompt says, with Sana or SANA-1.5; along a ControlNet if there is one."""

    DISPLAY_NAME = "Change images with Sana"
    REQUIRED = GUIDED | {"strength": STRENGTH}
    OPTIONAL = {"image": ("IMAGE",), "latent": ("LATENT", {"tooltip": "in place of `image`, without loss"})}

    def run(
        self, model: SanaModel, image: Tensor | None = None, latent: dict | None = None, **sampling: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As many images `[B, H, W, 3]` in [0, 1] as were given, and their latents.

        Raises:
            ValueError: the model is a SANA-Sprint, or there is not one of `image` and `latent`.
        """
        from diffusers_sana import SanaControlNetImg2ImgPipeline, SanaImg2ImgPipeline

        check_sprint(model, False, "Change images with SANA-Sprint")
        options = sampling | {"image": start_images(model, image, latent)}
        controlnet = model.controlnet()
        if controlnet is None:
            return generate(model, SanaImg2ImgPipeline.from_pipe(model.pipe), **options)
        options |= control_options(model, sampling["prompt"], options["image"])
        return generate(model, SanaControlNetImg2ImgPipeline.from_pipe(model.pipe, controlnet=controlnet), **options)


class SanaInpaint(ImageNode):
    """Repaints the masked part of images; the rest stays as it is, pixel by pixel."""

    DISPLAY_NAME = "Inpaint with Sana"
    REQUIRED = GUIDED | {
        "image": ("IMAGE",),
        "mask": ("MASK", {"tooltip": "white is repainted"}),
        "strength": ("FLOAT", {"default": 1.0, "min": 0.05, "max": 1.0, "step": 0.05}),
        "whole_image": (
            "BOOLEAN",
            {"default": True, "tooltip": "off: generate only around the mask, at full size; for small parts"},
        ),
        "padding": (
            "INT",
            {"default": 32, "min": 0, "max": 2048, "tooltip": "pixels around it, with whole_image off"},
        ),
    }

    def run(
        self, model: SanaModel, image: Tensor, mask: Tensor, whole_image: bool, padding: int, **sampling: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As many images `[B, H, W, 3]` in [0, 1] as were given, and the latents of what was generated.

        Raises:
            ValueError: the model is a SANA-Sprint, or nothing is masked.
        """
        from diffusers_sana import SanaControlNetInpaintPipeline, SanaInpaintPipeline

        check_sprint(model, False, "Change images with SANA-Sprint")
        if not bool((mask >= 0.5).any()):
            raise ValueError("`mask` must mark something, but is black. Paint it in the mask editor of Load Image.")
        options = sampling | {"image": channels_first(image), "mask_image": mask}
        options["padding_mask_crop"] = None if whole_image else padding
        controlnet = model.controlnet()
        if controlnet is None:
            return generate(model, SanaInpaintPipeline.from_pipe(model.pipe), **options)
        options |= control_options(model, sampling["prompt"], options["image"])
        return generate(model, SanaControlNetInpaintPipeline.from_pipe(model.pipe, controlnet=controlnet), **options)


class SanaSprintSample(ImageNode):
    """Generates images from a prompt in one to four steps, with SANA-Sprint; along ControlNets as with Sana."""

    DISPLAY_NAME = "Generate with SANA-Sprint"
    REQUIRED = SPRINT | SIZES

    def run(
        self, model: SanaModel, width: int, height: int, batch_size: int, **sampling: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images `[B, H, W, 3]` in [0, 1] and their latents. Raises a ValueError if the model is not a Sprint."""
        from diffusers_sana import SanaSprintControlNetPipeline

        check_sprint(model, True, "Generate with Sana")
        options = sampling | {"num_images_per_prompt": batch_size, "width": width or None, "height": height or None}
        controlnet = model.controlnet()
        if controlnet is not None:
            return generate_controlled(model, SanaSprintControlNetPipeline, controlnet, options)
        return generate(model, model.pipe, **options)


class SanaSprintImageToImage(ImageNode):
    """Changes images, or latents, as a prompt says, in one to four steps, with SANA-Sprint."""

    DISPLAY_NAME = "Change images with SANA-Sprint"
    REQUIRED = SPRINT | {"strength": STRENGTH}
    OPTIONAL = SanaImageToImage.OPTIONAL

    def run(
        self, model: SanaModel, image: Tensor | None = None, latent: dict | None = None, **sampling: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As many images `[B, H, W, 3]` in [0, 1] as were given, and their latents.

        Raises:
            ValueError: the model is not a Sprint or has a ControlNet, or there is not one of `image` and `latent`.
        """
        from diffusers_sana import SanaSprintImg2ImgPipeline

        check_sprint(model, True, "Change images with Sana")
        if model.controls:
            raise ValueError("`model` must have no ControlNet: a SANA-Sprint has none for changing images.")
        pipe = SanaSprintImg2ImgPipeline.from_pipe(model.pipe)
        return generate(model, pipe, image=start_images(model, image, latent), **sampling)


def generate_controlled(
    model: SanaModel, pipeline_class: Any, controlnet: Any, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`generate` with the ControlNets of a model, in the proportions of the first image unless a size is set."""
    if not options["width"] and not options["height"]:
        options["height"], options["width"] = control_size(model)
    pipe = pipeline_class.from_pipe(model.pipe, controlnet=controlnet)
    return generate(model, pipe, **options | control_options(model, options["prompt"]))


def load_pipeline(place: str, dtype: Any) -> Any:
    """A pipeline of Sana or SANA-Sprint. Raises a ValueError if it is another."""
    from diffusers_sana import SANA_EMOJI, SanaPipeline, SanaSprintPipeline, find_pipeline_class

    folder = source(place)
    if place == "sana-emoji-sprint":  # the bundled one is a LoRA of its teacher
        return SanaSprintPipeline.from_teacher(SanaPipeline.from_pretrained(SANA_EMOJI, dtype=dtype), folder)
    found = find_pipeline_class(folder)
    if found not in (SanaPipeline, SanaSprintPipeline):
        raise ValueError(f"`model` must be a Sana or a SANA-Sprint, but {place!r} is a {found.__name__}.")
    return found.from_pretrained(folder, dtype=dtype)


def check_sprint(model: SanaModel, wanted: bool, node: str) -> None:
    """Raises a ValueError, naming the node to use, unless the model is a Sprint, or is none, as wanted."""
    if model.is_sprint != wanted:
        kinds = ("a Sana or SANA-1.5", "a SANA-Sprint")
        raise ValueError(f"`model` must be {kinds[wanted]}, but is {kinds[not wanted]}. Use {node!r}.")


def start_images(model: SanaModel, image: Tensor | None, latent: dict | None) -> Tensor:
    """What image-to-image begins with: images `[B, 3, H, W]` or the pipeline's latents.

    Raises:
        ValueError: not one of the two, or latents of another model.
    """
    if (image is None) == (latent is None):
        raise ValueError(
            f"one of `image` and `latent` must be connected, but {'none' if image is None else 'both'} is."
        )
    if image is not None:
        return channels_first(image)
    samples, channels = latent["samples"], model.pipe.vae.config.latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"`latent` must be of this model's autoencoder, [images, {channels}, height, width], got"
            f" {list(samples.shape)}."
        )
    return samples * model.scaling_factor


NODES = (
    SanaLoad,
    SanaLora,
    SanaControlNet,
    SanaEdges,
    SanaSample,
    SanaImageToImage,
    SanaInpaint,
    SanaSprintSample,
    SanaSprintImageToImage,
)
