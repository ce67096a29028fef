"""Image-to-image with Sana and a control image.

Legend: B outputs (prompts times images per prompt), C latent channels, h w latent height and width.
"""

from typing import Any

from diffusers.image_processor import PipelineImageInput
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.controlnets.controlnet_sana import SanaControlNetModel as UpstreamControlNet
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.schedulers import SchedulerMixin
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.controlnet_conditioning import ControlNetConditioning
from diffusers_sana.pipelines.pipeline_sana_img2img import SanaImg2ImgPipeline


class SanaControlNetImg2ImgPipeline(ControlNetConditioning, SanaImg2ImgPipeline):
    """An image, a prompt and a control image to an image: `SanaImg2ImgPipeline` steered by a ControlNet.

    Args:
        controlnet: trained for this transformer (arXiv 2302.05543).
        the others: as in `SanaImg2ImgPipeline`.
    """

    model_cpu_offload_seq = "text_encoder->controlnet->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "control_image", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        controlnet: SanaControlNetModel | UpstreamControlNet,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=controlnet)
        self._warn_of_unused_outputs()

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        control_image: PipelineImageInput | None = None,
        strength: float = 0.6,
        *,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        num_images_per_prompt: int = 1,
        **others: Any,
    ) -> SanaPipelineOutput | tuple:
        """Changes images along a control image.

        Args:
            prompt, image, strength, num_images_per_prompt, others: as in `SanaImg2ImgPipeline`.
            control_image, controlnet_conditioning_scale: as in `SanaControlNetPipeline`; a tensor must have the size
                of generation.
            control_guidance_start, control_guidance_end: the shares of the steps that are run after which the control
                begins and ends.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        steering = (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
        self._check_control(control_image, *steering)
        self._control = control_image, num_images_per_prompt, steering
        try:
            return super().__call__(prompt, image, strength, num_images_per_prompt=num_images_per_prompt, **others)
        finally:
            del self._control

    def _denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Any], **options: Any) -> Tensor:
        """The loop, with the control image of this call in each step; arguments as in `DenoisingLoop`."""
        control_image, num_images_per_prompt, steering = self._control
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        num_prompts = len(latents) // num_images_per_prompt
        control_latents = self._encode_control(control_image, height, width, num_prompts, num_images_per_prompt)
        tensors["control_image"] = control_latents
        predict = self._controlled(tensors, len(timesteps), *steering)
        return super()._denoise(latents, timesteps, tensors, predict=predict, **options)
