"""The steps of Sana's pipelines as blocks of Modular Diffusers.

Each block is one numbered part of a `__call__` in `pipelines/`, and runs the same functions. Blocks hand on values by
name: any of them can be replaced by a block, of diffusers or of the user, that gives the same names.

| name | value |
|---|---|
| `request` | the arguments of the call, checked; only the text encoder and the decoder do without |
| `size`, `requested_size` | height and width in pixels that are generated, and that are asked for |
| `start`, `repainting` | the images to begin with, and the part of them that is repainted |
| `num_steps`, `begin` | of SANA-Sprint: all steps, and how many are left out |
| `prompt_embeds`, `prompt_attention_mask`, and both `negative_` | text features `[B, L, width]` and masks `[B, L]` |
| `control`, `control_latents` | what the ControlNets do, and the latents `[B, C, h, w]` of their images |
| `solver`, `remaining_timesteps`, `noise_levels` | a copy of the scheduler, and the steps to be done |
| `noise`, `image_latents`, `repainted` | `[B, C, h, w]`; and which cells are generated, `[B, 1, h, w]` |
| `latents` | `[B, C, h, w]` in fp32, before and after denoising |
| `images` | what the pipelines return |

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

import copy
import inspect
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.call import Call
from diffusers_sana.pipelines.conditioning import (
    check_strength_of_steps,
    for_each_output,
    lay_out_steps,
    mix_noise,
)
from diffusers_sana.pipelines.controlnet_conditioning import cut_control
from diffusers_sana.pipelines.inpainting import keep_the_rest
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.pipelines.pipeline_sana_controlnet import SanaControlNetPipeline
from diffusers_sana.pipelines.pipeline_sana_img2img import SanaImg2ImgPipeline
from diffusers_sana.pipelines.pipeline_sana_inpaint import SanaInpaintPipeline
from diffusers_sana.pipelines.pipeline_sana_sprint import SanaSprintPipeline
from diffusers_sana.pipelines.pipeline_sana_sprint_base import count_steps, denoise_trigflow, lay_out_angles
from diffusers_sana.pipelines.pipeline_sana_sprint_controlnet import SanaSprintControlNetPipeline
from diffusers_sana.pipelines.pipeline_sana_sprint_img2img import SanaSprintImg2ImgPipeline, first_step
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import TEXT_TENSORS, Prompts, encode_prompts
from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler
from diffusers_sana.schedulers.trigflow import mix


Names = tuple[str, ...]

COMPONENTS = {
    "tokenizer": GemmaTokenizer,
    "text_encoder": Gemma2PreTrainedModel,
    "vae": AutoencoderDC,
    "transformer": SanaTransformer2DModel,
    "controlnet": SanaControlNetModel,
    "scheduler": FlowDPMSolverScheduler,
}

# Arguments of the pipelines that the blocks do not have: image prompts belong to the pipelines.
NOT_OF_BLOCKS = {"self", "return_dict", "ip_adapter_image", "ip_adapter_image_embeds"}


def arguments_of(pipeline_class: type, names: Collection[str] | None = None) -> list[InputParam]:
    """The arguments of a pipeline's call as inputs of a block: these, or all that concern more than its result."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    names = parameters.keys() - NOT_OF_BLOCKS if names is None else names
    return [
        InputParam(
            name, type_hint=each.annotation, default=each.default, description=f"As in `{pipeline_class.__name__}`."
        )
        for name, each in parameters.items()
        if name in names
    ]


class SanaStep(ModularPipelineBlocks):
    """Base of the blocks: what a block reads and gives is declared in its class attributes.

    Attributes:
        pipeline_class: whose functions and arguments it has.
        arguments: which arguments of the pipeline's call it takes; None for all.
        uses: components.
        needs, takes: values of earlier blocks, the second if there are any.
        gives: values that it adds or replaces.
    """

    model_name: Any = "sana"

    pipeline_class: ClassVar[type] = SanaPipeline
    arguments: ClassVar[Collection[str] | None] = ()
    uses: ClassVar[Names] = ()
    needs: ClassVar[Names] = ()
    takes: ClassVar[Names] = ()
    gives: ClassVar[Names] = ()

    @property
    def description(self) -> str:
        """The first line of the docstring."""
        return str(inspect.getdoc(type(self))).partition("\n")[0]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """`uses`, as diffusers has it."""
        return [ComponentSpec(name, COMPONENTS[name]) for name in self.uses]

    @property
    def inputs(self) -> list[InputParam]:
        """`arguments`, `needs` and `takes`, as diffusers has them."""
        needed = [InputParam(name, required=True, description="Of an earlier block.") for name in self.needs]
        taken = [InputParam(name, description="Of an earlier block.") for name in self.takes]
        return [*arguments_of(self.pipeline_class, self.arguments), *needed, *taken]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """`gives`, as diffusers has it."""
        kinds: dict[str, Any] = {name: {"kwargs_type": "denoiser_input_fields"} for name in TEXT_TENSORS}
        return [OutputParam(name, **kinds.get(name, {})) for name in self.gives]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """Runs the block on the values of `state`."""
        given: Any = self.get_block_state(state)
        self.run(components, given)
        self.set_block_state(state, given)
        return components, state

    def run(self, components: ModularPipeline, given: Any) -> None:
        """What the block does: reads and sets attributes of `given`."""
        raise NotImplementedError

    def pipeline(self, components: ModularPipeline) -> Any:
        """A pipeline around the components, for its functions; nothing is copied or moved."""
        names = inspect.signature(self.pipeline_class.__init__).parameters.keys() - {"self"}
        return self.pipeline_class(**{name: getattr(components, name, None) for name in names})


def counts_of(given: Any) -> tuple[int, int]:
    """Prompts, and images per prompt."""
    count = given.request.num_images_per_prompt
    return len(given.prompt_embeds) // count, count


# 1. The request, checked; the size asked for and the size that is generated


class SanaInputStep(SanaStep):
    """Checks the arguments of a call, and decides the size that is generated."""

    arguments: ClassVar[Collection[str] | None] = None
    uses: ClassVar[Names] = ("tokenizer", "text_encoder", "vae", "transformer")
    gives: ClassVar[Names] = ("request", "size", "requested_size")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`, and repeats a single prompt for several images."""
        pipe = self.pipeline(components)
        request = Request.collect(given.as_dict() | {"return_dict": False}, has_vae=pipe.vae is not None)
        given.request = self.read(pipe, request, given)
        pipe._check(given.request, given.size)
        given.prompt = given.request.prompt

    def read(self, pipe: Any, request: Request, given: Any) -> Request:
        """Sets the sizes and what else `gives` names; returns the request, for as many images as there are."""
        given.requested_size, given.size = pipe._sizes(request)
        return request


class SanaImageInputStep(SanaInputStep):
    """Checks the arguments of a call that begins with an image, and decides the size that is generated."""

    pipeline_class: ClassVar[type] = SanaImg2ImgPipeline
    gives: ClassVar[Names] = (*SanaInputStep.gives, "start")

    def read(self, pipe: Any, request: Request, given: Any) -> Request:
        """As in the base class."""
        check_strength_of_steps(given.strength, request.num_inference_steps, request.timesteps, request.sigmas)
        given.start = pipe._read_start(given.image, request)
        given.requested_size = given.start.size
        given.size = pipe._generated_size(given.start, request, is_chosen=request.is_sized)
        return request.for_images(len(given.start.values))


class SanaInpaintInputStep(SanaInputStep):
    """Checks the arguments of a call that repaints an image, and decides part and size that are generated."""

    pipeline_class: ClassVar[type] = SanaInpaintPipeline
    gives: ClassVar[Names] = (*SanaInputStep.gives, "start", "repainting")

    def read(self, pipe: Any, request: Request, given: Any) -> Request:
        """As in the base class."""
        check_strength_of_steps(given.strength, request.num_inference_steps, request.timesteps, request.sigmas)
        given.repainting = pipe._read_repainting(given.image, given.mask_image, given.padding_mask_crop, request)
        given.start, given.requested_size = given.repainting.part, given.repainting.start.size
        is_chosen = request.is_sized and given.padding_mask_crop is None
        given.size = pipe._generated_size(given.start, request, is_chosen=is_chosen)
        return request.for_images(given.repainting.num_images)


class SanaControlNetInputStep(SanaInputStep):
    """Checks the arguments of a call with a control image, and decides the size that is generated."""

    pipeline_class: ClassVar[type] = SanaControlNetPipeline
    uses: ClassVar[Names] = (*SanaInputStep.uses, "controlnet")

    def read(self, pipe: Any, request: Request, given: Any) -> Request:
        """As in the base class."""
        pipe._control(given.control_image, 1.0, 0.0, 1.0)
        given.requested_size, given.size = pipe._controlled_sizes(given.control_image, request)
        return request


class SanaSprintInputStep(SanaInputStep):
    """Checks the arguments of a call of SANA-Sprint, and decides the size that is generated."""

    pipeline_class: ClassVar[type] = SanaSprintPipeline
    uses: ClassVar[Names] = (*SanaInputStep.uses, "scheduler")
    gives: ClassVar[Names] = (*SanaInputStep.gives, "num_steps")

    def read(self, pipe: Any, request: Request, given: Any) -> Request:
        """As in the base class."""
        angles = request.timesteps, given.max_timesteps, given.intermediate_timesteps
        given.num_steps = count_steps(pipe.transformer, pipe.scheduler, request.num_inference_steps, *angles)
        return super().read(pipe, request, given)


class SanaSprintImageInputStep(SanaSprintInputStep):
    """Checks the arguments of a call of SANA-Sprint that begins with an image, and decides the size."""

    pipeline_class: ClassVar[type] = SanaSprintImg2ImgPipeline
    gives: ClassVar[Names] = (*SanaSprintInputStep.gives, "start", "begin")

    def read(self, pipe: Any, request: Request, given: Any) -> Request:
        """As in the base class."""
        request = super().read(pipe, request, given)
        given.begin = first_step(given.strength, given.num_steps)
        given.start = pipe._read_start(given.image, request, cover=False)
        given.requested_size, given.size = pipe._sizes_with_image(request, given.start)
        return request.for_images(len(given.start.values))


class SanaSprintControlNetInputStep(SanaSprintInputStep, SanaControlNetInputStep):
    """Checks the arguments of a call of SANA-Sprint with a control image, and decides the size."""

    pipeline_class: ClassVar[type] = SanaSprintControlNetPipeline
    uses: ClassVar[Names] = (*SanaSprintInputStep.uses, "controlnet")


# 2. Text features, and control latents


class SanaTextEncoderStep(SanaStep):
    """Encodes prompts and negative prompts, one row per image."""

    arguments: ClassVar[Collection[str] | None] = (
        *Prompts.__dataclass_fields__,
        "guidance_scale",
        "guider",
        "attention_kwargs",
    )
    uses: ClassVar[Names] = ("tokenizer", "text_encoder")
    gives: ClassVar[Names] = TEXT_TENSORS

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets the text features; those of negative prompts are None without guidance."""
        scale = (given.attention_kwargs or {}).get("scale")
        prompts = Prompts.of(given.as_dict() | {"lora_scale": scale})
        encoders, device = (components.tokenizer, components.text_encoder), components._execution_device
        texts = encode_prompts(*encoders, prompts, is_guided=self.is_guided(given), device=device)
        for name, value in texts.items():
            setattr(given, name, value)

    def is_guided(self, given: Any) -> bool:
        """Whether negative prompts are needed."""
        return given.guider is not None or given.guidance_scale > 1.0


class SanaSprintTextEncoderStep(SanaTextEncoderStep):
    """Encodes prompts for SANA-Sprint, which has no negative prompts, one row per image."""

    pipeline_class: ClassVar[type] = SanaSprintPipeline

    def is_guided(self, given: Any) -> bool:
        """Never: the guidance scale is an input of the transformer."""
        return False


class SanaControlNetStep(SanaStep):
    """Encodes control images, and says how the ControlNets steer."""

    pipeline_class: ClassVar[type] = SanaControlNetPipeline
    arguments: ClassVar[Collection[str] | None] = (
        "control_image",
        "controlnet_conditioning_scale",
        "control_guidance_start",
        "control_guidance_end",
    )
    uses: ClassVar[Names] = ("vae", "transformer", "controlnet")
    needs: ClassVar[Names] = ("request", "size", "prompt_embeds")
    takes: ClassVar[Names] = ("repainting",)
    gives: ClassVar[Names] = ("control", "control_latents")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`."""
        pipe, image = self.pipeline(components), given.control_image
        span = given.control_guidance_start, given.control_guidance_end
        given.control = pipe._control(image, given.controlnet_conditioning_scale, *span)
        if given.repainting is not None:
            image = cut_control(pipe.controlnet, image, given.repainting, given.size)
        given.control_latents = pipe._encode_control(image, given.size, *counts_of(given))


# 3. Schedule and latents


class SanaSetTimestepsStep(SanaStep):
    """Sets the steps of a copy of the scheduler."""

    uses: ClassVar[Names] = ("scheduler",)
    needs: ClassVar[Names] = ("request",)
    gives: ClassVar[Names] = ("solver", "remaining_timesteps")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`."""
        given.solver = copy.deepcopy(components.scheduler)
        given.remaining_timesteps = given.request.lay_out(given.solver, components._execution_device)


class SanaSetTimestepsWithStrengthStep(SanaStep):
    """Sets the last steps of a copy of the scheduler, as many as the strength says."""

    uses: ClassVar[Names] = ("scheduler",)
    needs: ClassVar[Names] = ("request", "strength")
    gives: ClassVar[Names] = ("solver", "remaining_timesteps", "noise_levels")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`."""
        request, given.solver = given.request, copy.deepcopy(components.scheduler)
        grids = request.num_inference_steps, request.timesteps, request.sigmas
        given.remaining_timesteps, given.noise_levels = lay_out_steps(
            given.solver, given.strength, *grids, components._execution_device
        )


class SanaSprintSetTimestepsStep(SanaStep):
    """Sets the steps of a copy of the scheduler of SANA-Sprint."""

    pipeline_class: ClassVar[type] = SanaSprintPipeline
    arguments: ClassVar[Collection[str] | None] = ("max_timesteps", "intermediate_timesteps")
    uses: ClassVar[Names] = ("scheduler",)
    needs: ClassVar[Names] = ("request", "num_steps")
    takes: ClassVar[Names] = ("begin",)
    gives: ClassVar[Names] = ("solver", "remaining_timesteps")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`."""
        given.solver = copy.deepcopy(components.scheduler)
        angles = given.request.timesteps, given.max_timesteps, given.intermediate_timesteps
        given.remaining_timesteps = lay_out_angles(
            given.solver, given.num_steps, *angles, components._execution_device, given.begin or 0
        )


class SanaPrepareLatentsStep(SanaStep):
    """Samples the noise to begin with."""

    uses: ClassVar[Names] = ("vae", "transformer")
    needs: ClassVar[Names] = ("request", "size", "prompt_embeds")
    gives: ClassVar[Names] = ("latents",)

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `latents`."""
        given.latents = self.pipeline(components)._noise(given.request, len(given.prompt_embeds), given.size)


class SanaPrepareImageLatentsStep(SanaPrepareLatentsStep):
    """Samples noise and mixes it with the encoded image."""

    needs: ClassVar[Names] = (*SanaPrepareLatentsStep.needs, "start", "noise_levels")
    gives: ClassVar[Names] = ("latents", "noise", "image_latents")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`."""
        super().run(components, given)
        given.noise, counts = given.latents, counts_of(given)
        given.image_latents = given.start.encode(components.vae, given.size, *counts, given.noise.device)
        given.latents = mix_noise(given.image_latents, given.noise, given.noise_levels[0])


class SanaPrepareInpaintLatentsStep(SanaPrepareImageLatentsStep):
    """Samples noise, mixes it with the encoded image, and says which latent cells are generated."""

    needs: ClassVar[Names] = (*SanaPrepareImageLatentsStep.needs, "repainting")
    gives: ClassVar[Names] = (*SanaPrepareImageLatentsStep.gives, "repainted")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `gives`."""
        super().run(components, given)
        cells = given.noise.shape[-2], given.noise.shape[-1]
        given.repainted = given.repainting.cells(given.size, cells, counts_of(given), given.noise.device)


class SanaSprintPrepareLatentsStep(SanaPrepareLatentsStep):
    """Samples the noise to begin with, in the standard deviation of SANA-Sprint's scheduler."""

    pipeline_class: ClassVar[type] = SanaSprintPipeline
    needs: ClassVar[Names] = (*SanaPrepareLatentsStep.needs, "solver")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `latents`."""
        super().run(components, given)
        given.latents = given.latents * given.solver.config.sigma_data


class SanaSprintPrepareImageLatentsStep(SanaPrepareLatentsStep):
    """Samples noise and mixes it with the encoded image, in the standard deviation of SANA-Sprint's scheduler."""

    pipeline_class: ClassVar[type] = SanaSprintImg2ImgPipeline
    arguments: ClassVar[Collection[str] | None] = ("image",)
    needs: ClassVar[Names] = (*SanaPrepareLatentsStep.needs, "solver", "remaining_timesteps", "start")

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `latents`; those that the call was given are mixed already."""
        super().run(components, given)
        if given.request.latents is None:
            pipe, sigma = self.pipeline(components), given.solver.config.sigma_data
            clean = pipe._encode_start(given.start, given.image, given.size) * sigma
            clean = for_each_output("image", clean, *counts_of(given))
            given.latents = mix(clean, given.latents * sigma, given.remaining_timesteps[:1])


# 4. Denoising


class SanaDenoiseStep(SanaStep):
    """Denoises: the transformer predicts, the scheduler steps; with ControlNets and a mask if there are any."""

    uses: ClassVar[Names] = ("transformer", "scheduler")
    needs: ClassVar[Names] = (
        "request",
        "solver",
        "remaining_timesteps",
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
    )
    takes: ClassVar[Names] = (
        *TEXT_TENSORS[2:],
        *("control", "control_latents"),
        *("repainted", "image_latents", "noise", "noise_levels"),
    )
    gives: ClassVar[Names] = ("latents",)

    def __init__(self) -> None:
        super().__init__()
        self.progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """How the bar of the loop is shown; the arguments are those of `tqdm`."""
        self.progress_bar_config = kwargs

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Replaces `latents`."""
        pipe = self.pipeline(components)
        pipe.set_progress_bar_config(**self.progress_bar_config)
        texts = {name: getattr(given, name) for name in TEXT_TENSORS}
        if given.control is not None:
            texts["control_image"] = given.control_latents
        with pipe._begin(given.request) as call:
            call.scheduler = copy.deepcopy(given.solver)  # which another run of this block begins with
            given.latents = self.denoise(pipe.transformer, given, texts, call)
        pipe.maybe_free_model_hooks()

    def denoise(self, transformer: Any, given: Any, texts: dict[str, Any], call: Call) -> Tensor:
        """The latents `[B, C, h, w]` at the end of the loop."""
        steps, hooks = given.remaining_timesteps, {}
        if given.control is not None:
            hooks["predict"] = given.control.predictor(texts, len(steps))
        if given.repainted is not None:
            rest: Callable[[int, Tensor], Tensor] = keep_the_rest(
                given.repainted, given.image_latents, given.noise, given.noise_levels
            )
            hooks["after_step"] = rest
        return denoise(transformer, given.latents, steps, texts, call, **hooks)


class SanaSprintDenoiseStep(SanaDenoiseStep):
    """Denoises with SANA-Sprint; with ControlNets if there are any."""

    pipeline_class: ClassVar[type] = SanaSprintPipeline
    takes: ClassVar[Names] = ("control", "control_latents", *TEXT_TENSORS[2:])

    def denoise(self, transformer: Any, given: Any, texts: dict[str, Any], call: Call) -> Tensor:
        """The latents `[B, C, h, w]` at the end of the loop."""
        steps, control = given.remaining_timesteps, given.control
        residuals = None if control is None else control.residuals(texts, len(steps))
        return denoise_trigflow(transformer, given.latents, steps, texts, call, residuals)


# 5. Images


class SanaDecodeStep(SanaStep):
    """Decodes latents to images, at the size asked for."""

    arguments: ClassVar[Collection[str] | None] = ("output_type",)
    uses: ClassVar[Names] = ("vae",)
    needs: ClassVar[Names] = ("latents",)
    takes: ClassVar[Names] = ("requested_size",)
    gives: ClassVar[Names] = ("images",)

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `images`."""
        if given.output_type == "latent":
            given.images = given.latents
            return
        pipe = self.pipeline(components)
        images = pipe._decode(given.latents).float()
        size = given.requested_size or (images.shape[-2], images.shape[-1])
        given.images = pipe._postprocess(images, size, given.output_type)


class SanaInpaintDecodeStep(SanaStep):
    """Decodes the part that was generated, and puts it into the images as they were."""

    pipeline_class: ClassVar[type] = SanaInpaintPipeline
    arguments: ClassVar[Collection[str] | None] = ("preserve_unmasked",)
    uses: ClassVar[Names] = ("vae",)
    needs: ClassVar[Names] = ("request", "repainting", "latents", "prompt_embeds")
    gives: ClassVar[Names] = ("images",)

    def run(self, components: ModularPipeline, given: Any) -> None:
        """Sets `images`."""
        parts = given.latents, given.repainting, counts_of(given), given.preserve_unmasked
        given.images = self.pipeline(components)._repainted(*parts, given.request)[0]
