"""The pipelines of Sana as sets of blocks for Modular Diffusers, made of the steps in `steps.py`.

A set runs what the pipeline of the same name runs, with the same arguments and bits:
`modular_pipeline(pipe)(prompt="a cat", output="images")` equals `pipe("a cat").images`.
"""

from typing import Any

from diffusers.modular_pipelines.modular_pipeline import (
    ConditionalPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from diffusers_sana.modular.steps import (
    SanaControlNetInputStep,
    SanaControlNetStep,
    SanaDecodeStep,
    SanaDenoiseStep,
    SanaImageInputStep,
    SanaInpaintDecodeStep,
    SanaInpaintInputStep,
    SanaInputStep,
    SanaPrepareImageLatentsStep,
    SanaPrepareInpaintLatentsStep,
    SanaPrepareLatentsStep,
    SanaSetTimestepsStep,
    SanaSetTimestepsWithStrengthStep,
    SanaSprintControlNetInputStep,
    SanaSprintDenoiseStep,
    SanaSprintImageInputStep,
    SanaSprintInputStep,
    SanaSprintPrepareImageLatentsStep,
    SanaSprintPrepareLatentsStep,
    SanaSprintSetTimestepsStep,
    SanaSprintTextEncoderStep,
    SanaTextEncoderStep,
)


STEPS = ["input", "text_encoder", "set_timesteps", "prepare_latents", "denoise", "decode"]
CONTROLLED_STEPS = [*STEPS[:2], "controlnet", *STEPS[2:]]


class SanaBlocks(SequentialPipelineBlocks):
    """Text to image, as `SanaPipeline`."""

    block_classes = [
        SanaInputStep,
        SanaTextEncoderStep,
        SanaSetTimestepsStep,
        SanaPrepareLatentsStep,
        SanaDenoiseStep,
        SanaDecodeStep,
    ]
    block_names = STEPS


class SanaImg2ImgBlocks(SequentialPipelineBlocks):
    """Image to image, as `SanaImg2ImgPipeline`."""

    block_classes = [
        SanaImageInputStep,
        SanaTextEncoderStep,
        SanaSetTimestepsWithStrengthStep,
        SanaPrepareImageLatentsStep,
        SanaDenoiseStep,
        SanaDecodeStep,
    ]
    block_names = STEPS


class SanaInpaintBlocks(SequentialPipelineBlocks):
    """Inpainting, as `SanaInpaintPipeline`."""

    block_classes = [
        SanaInpaintInputStep,
        SanaTextEncoderStep,
        SanaSetTimestepsWithStrengthStep,
        SanaPrepareInpaintLatentsStep,
        SanaDenoiseStep,
        SanaInpaintDecodeStep,
    ]
    block_names = STEPS


class SanaSprintBlocks(SequentialPipelineBlocks):
    """Text to image in one to four steps, as `SanaSprintPipeline`."""

    block_classes = [
        SanaSprintInputStep,
        SanaSprintTextEncoderStep,
        SanaSprintSetTimestepsStep,
        SanaSprintPrepareLatentsStep,
        SanaSprintDenoiseStep,
        SanaDecodeStep,
    ]
    block_names = STEPS


class SanaSprintImg2ImgBlocks(SequentialPipelineBlocks):
    """Image to image in one to four steps, as `SanaSprintImg2ImgPipeline`."""

    block_classes = [
        SanaSprintImageInputStep,
        SanaSprintTextEncoderStep,
        SanaSprintSetTimestepsStep,
        SanaSprintPrepareImageLatentsStep,
        SanaSprintDenoiseStep,
        SanaDecodeStep,
    ]
    block_names = STEPS


def _controlled(blocks: type[SequentialPipelineBlocks], input_step: type | None = None) -> list[type]:
    """The steps of a set, with ControlNets between text and schedule."""
    first, text, *others = blocks.block_classes
    return [input_step or first, text, SanaControlNetStep, *others]


class SanaControlNetBlocks(SequentialPipelineBlocks):
    """Text to image with control images, as `SanaControlNetPipeline`."""

    block_classes = _controlled(SanaBlocks, SanaControlNetInputStep)
    block_names = CONTROLLED_STEPS


class SanaControlNetImg2ImgBlocks(SequentialPipelineBlocks):
    """Image to image with control images, as `SanaControlNetImg2ImgPipeline`."""

    block_classes = _controlled(SanaImg2ImgBlocks)
    block_names = CONTROLLED_STEPS


class SanaControlNetInpaintBlocks(SequentialPipelineBlocks):
    """Inpainting with control images, as `SanaControlNetInpaintPipeline`."""

    block_classes = _controlled(SanaInpaintBlocks)
    block_names = CONTROLLED_STEPS


class SanaSprintControlNetBlocks(SequentialPipelineBlocks):
    """Text to image in one to four steps with control images, as `SanaSprintControlNetPipeline`."""

    block_classes = _controlled(SanaSprintBlocks, SanaSprintControlNetInputStep)
    block_names = CONTROLLED_STEPS


class SanaAutoBlocks(ConditionalPipelineBlocks):
    """All of Sana but SANA-Sprint: what is given beside the prompt chooses the set of blocks."""

    model_name = "sana"
    block_classes = [
        SanaBlocks,
        SanaImg2ImgBlocks,
        SanaInpaintBlocks,
        SanaControlNetBlocks,
        SanaControlNetImg2ImgBlocks,
        SanaControlNetInpaintBlocks,
    ]
    block_names = [
        "text2image",
        "image2image",
        "inpaint",
        "controlnet_text2image",
        "controlnet_image2image",
        "controlnet_inpaint",
    ]
    block_trigger_inputs = ["image", "mask_image", "control_image"]

    @property
    def description(self) -> str:
        """What it is for."""
        return "Text to image, image to image and inpainting with Sana, each with or without ControlNets."

    def select_block(self, image: Any = None, mask_image: Any = None, control_image: Any = None) -> str:
        """The set of blocks for the arguments that are given."""
        task = "inpaint" if mask_image is not None else "text2image" if image is None else "image2image"
        return task if control_image is None else f"controlnet_{task}"


# Pipeline -> its blocks.
BLOCKS = {
    "SanaPipeline": SanaBlocks,
    "SanaImg2ImgPipeline": SanaImg2ImgBlocks,
    "SanaInpaintPipeline": SanaInpaintBlocks,
    "SanaControlNetPipeline": SanaControlNetBlocks,
    "SanaControlNetImg2ImgPipeline": SanaControlNetImg2ImgBlocks,
    "SanaControlNetInpaintPipeline": SanaControlNetInpaintBlocks,
    "SanaSprintPipeline": SanaSprintBlocks,
    "SanaSprintImg2ImgPipeline": SanaSprintImg2ImgBlocks,
    "SanaSprintControlNetPipeline": SanaSprintControlNetBlocks,
}


def modular_pipeline(pipe: DiffusionPipeline, blocks: ModularPipelineBlocks | None = None) -> ModularPipeline:
    """A modular pipeline around the components of another; nothing is copied, moved or cast.

    Args:
        pipe: a pipeline of Sana, of this package or diffusers.
        blocks: what it runs; by default the set that runs what `pipe` runs.

    Returns:
        A `diffusers.ModularPipeline`; components that the blocks expect and `pipe` lacks are None.

    Raises:
        ValueError: there are no blocks for this pipeline.
    """
    name = type(pipe).__name__
    if blocks is None and name not in BLOCKS:
        raise ValueError(f"`pipe` must be one of {sorted(BLOCKS)}, got {name}. Give `blocks`.")
    made = (BLOCKS[name]() if blocks is None else blocks).init_pipeline()
    made.update_components(**{key: part for key, part in pipe.components.items() if key in made.component_names})
    return made
