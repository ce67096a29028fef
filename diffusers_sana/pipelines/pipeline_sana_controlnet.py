"""Text-to-image with Sana and a control image.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.controlnets.controlnet_sana import SanaControlNetModel as UpstreamControlNet
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.schedulers import SchedulerMixin
from torch import Tensor
from transformers import BaseImageProcessor, Gemma2PreTrainedModel, GemmaTokenizer, PreTrainedModel

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel
from diffusers_sana.models.controlnets.multicontrolnet_sana import SanaMultiControlNetModel
from diffusers_sana.models.ip_adapter_sana import SanaIPAdapterModel
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.controlnet_conditioning import (
    Control,
    as_one,
    check_control_image,
    check_no_graphs,
    encode_control,
    size_of_tensors,
    warn_of_unused_outputs,
)
from diffusers_sana.pipelines.image_prompts import ImagePromptPipeline
from diffusers_sana.pipelines.pipeline_sana_base import GuidedSanaPipeline, Size
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class ControlledSanaPipeline(ImagePromptPipeline):
    """Base of the pipelines with ControlNets.

    Args: the components, see `SanaControlNetPipeline`.
    """

    model_cpu_offload_seq = "text_encoder->controlnet->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "control_image", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        controlnet: SanaControlNetModel
        | UpstreamControlNet
        | SanaMultiControlNetModel
        | list[SanaControlNetModel]
        | tuple[SanaControlNetModel],
        scheduler: SchedulerMixin,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        ip_adapter: SanaIPAdapterModel | None = None,
    ) -> None:
        image_prompts = image_encoder, feature_extractor, ip_adapter
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler, *image_prompts)
        controlnet = as_one(controlnet)
        self.register_modules(controlnet=controlnet)
        warn_of_unused_outputs(controlnet, transformer)

    def _control(self, control_image: Any, scale: Any, start: Any, end: Any) -> Control:
        """The arguments that concern the ControlNets, checked."""
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        check_control_image(control_image, self.controlnet, multiple, has_vae=self.vae is not None)
        check_no_graphs(self.controlnet, self._cuda_graphs)
        return Control.of(self.controlnet, self.transformer, scale, start, end)

    def _encode_control(
        self, control_image: Any, size: Size, num_prompts: int, num_images_per_prompt: int
    ) -> Tensor | list[Tensor]:
        """Control latents `[B, C, h, w]` in fp32; of several ControlNets a list of them."""
        components = self.vae, self.image_processor, self.controlnet
        return encode_control(
            *components, control_image, size, num_prompts, num_images_per_prompt, self._execution_device
        )

    def _controlled_sizes(self, control_image: Any, request: Request) -> tuple[Size, Size]:
        """The size asked for and the size to generate at, which is that of a control image that is a tensor."""
        size = size_of_tensors(control_image, self.controlnet)
        if size is None:
            return self._sizes(request)
        asked = request.height or size[0], request.width or size[1]
        return asked if request.use_resolution_binning else size, size


class SanaControlNetPipeline(ControlledSanaPipeline, GuidedSanaPipeline):
    """Text to image with Sana (arXiv 2410.10629) and a ControlNet (arXiv 2302.05543) that sees a control image.

    A drop-in for `diffusers.SanaControlNetPipeline`: the same components, arguments, seeds and folders. Beyond it,
    ControlNets may have `wiring="nvlabs"`, may be compiled, may steer only some of the steps, and may be several.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32; encodes the control image too.
        transformer: denoiser.
        controlnet: trained for this transformer; or a list of several, which steer together.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        control_image: PipelineImageInput | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        *,
        guider: Any = None,
        share_prompt_mask: bool = False,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Generates images that follow a control image.

        Args:
            control_image: what the ControlNet was trained to follow, such as edges: one for all prompts, or one each.
                PIL images and arrays are resized to the size of generation. A tensor `[images, 3, height, width]` in
                [-1, 1] is used as it is, and images of its size are generated. For several ControlNets, a list with
                such an entry for each.
            controlnet_conditioning_scale: strength of the control; for several ControlNets of all, or a list.
            control_guidance_start, control_guidance_end: the fractions of the steps after which the control begins
                and ends; for several ControlNets of all, or lists.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `SanaPipeline`, and `control_image`, the
                latents `[B, C, h, w]` of the control image; for several ControlNets a list.
            the others: as in `SanaPipeline`; `attention_kwargs` also reach the ControlNet.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the control image, checked; the size asked for and the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        control = self._control(
            control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        )
        requested_size, size = self._controlled_sizes(control_image, request)
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], image prompts, and control latents, [B, C, h, w]
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images = len(texts["prompt_embeds"])
            texts["image_states"] = self._image_states(request, num_images)
            counts = num_images // num_images_per_prompt, num_images_per_prompt
            texts["control_image"] = self._encode_control(control_image, size, *counts)

            # 3. Schedule and noise, [B, C, h, w] in fp32
            steps = request.lay_out(call.scheduler, device)
            latents = self._noise(request, num_images, size)

            # 4. Denoising; in each step the transformer also gets the outputs of the ControlNet
            predict = control.predictor(texts, len(steps))
            latents = denoise(self.transformer, latents, steps, texts, call, predict=predict)

            # 5. Images
            return self._output(latents, requested_size, request)
