"""Image-to-image with Sana and SANA-1.5.

Legend: B outputs (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.conditioning import check_strength_of_steps, lay_out_steps, mix_noise
from diffusers_sana.pipelines.image_prompts import ImagePromptPipeline
from diffusers_sana.pipelines.pipeline_sana_base import ImageSanaPipeline
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaImg2ImgPipeline(ImagePromptPipeline, ImageSanaPipeline):
    """An image and a prompt to an image, with Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427), by SDEdit.

    The image is mixed with noise and denoised under the prompt (arXiv 2108.01073). Components are those of
    `SanaPipeline`: `SanaImg2ImgPipeline.from_pipe(pipe)` shares them.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32; encodes the image too.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
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
        *,
        guider: Any = None,
        share_prompt_mask: bool = False,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Changes images.

        Args:
            prompt: one or several texts; one serves all images.
            image: one for all prompts, or one each: PIL images, arrays `[H, W, 3]` and tensors `[3, H, W]` in [0, 1],
                lists and batches of them; or latents `[images, C, h, w]`, as `output_type="latent"` gives them.
            strength: in (0, 1]: the fraction of the steps that is run, and so how far the result may go from the
                image. At 1 the image has no influence, and the result is that of `SanaPipeline`.
            num_inference_steps: of the whole schedule; `strength` times as many evaluations of the transformer.
            height, width: pixels; those of the image by default. Images of other proportions are cut.
            latents: the noise, `[B, C, h, w]`, in place of what `generator` gives.
            use_resolution_binning: generate at the trained size of the nearest aspect ratio, or without a table of
                trained sizes at the native area, unless `height` or `width` is given; and scale the result to the size
                asked for. The borders of the image are repeated as far as the ratios differ, and cut again.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the images, checked; the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        check_strength_of_steps(strength, num_inference_steps, timesteps, sigmas)
        start = self._read_start(image, request)
        size = self._generated_size(start, request, is_chosen=request.is_sized)
        request = request.for_images(len(start.values))
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], of prompts and negative prompts; keys and values of image prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images = len(texts["prompt_embeds"])
            texts["image_states"] = self._image_states(request, num_images)

            # 3. Schedule, noise and image, [B, C, h, w] in fp32
            steps, levels = lay_out_steps(call.scheduler, strength, num_inference_steps, timesteps, sigmas, device)
            noise = self._noise(request, num_images, size)
            counts = num_images // num_images_per_prompt, num_images_per_prompt
            image_latents = start.encode(self.vae, size, *counts, device)

            # 4. Denoising, from the image under noise
            latents = denoise(self.transformer, mix_noise(image_latents, noise, levels[0]), steps, texts, call)

            # 5. Images
            return self._output(latents, start.size, request)
