"""Text-to-image with Sana and SANA-1.5.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.image_prompts import ImagePromptPipeline
from diffusers_sana.pipelines.pipeline_sana_base import GuidedSanaPipeline
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaPipeline(ImagePromptPipeline, GuidedSanaPipeline):
    """Text to image with Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427).

    A drop-in for `diffusers.SanaPipeline`: the same components, arguments, seeds and folders. `from_pretrained` reads
    folders that name diffusers' transformer, autoencoder and DPM-Solver and loads this package's in their place;
    `save_pretrained` writes folders that name diffusers' again. Components passed to either pipeline are used as they
    are, whichever package they come from.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
        image_encoder, feature_extractor, ip_adapter: for image prompts, see `load_ip_adapter`.
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
        """Generates images.

        Args:
            prompt: one or several texts.
            negative_prompt: what to steer away from: one for all prompts, or one each; None is the empty text.
            num_inference_steps: evaluations of the transformer.
            timesteps, sigmas: custom schedule, descending, in place of `num_inference_steps`; one of the two.
            guidance_scale: weight of the prompt against the negative prompt; at most 1 turns guidance off and halves
                the work.
            num_images_per_prompt: images per prompt; they are neighbors in the result.
            height, width: pixels; the native size of the checkpoint by default, or that of `latents`.
            eta: for schedulers that take it.
            generator: source of the noise: one for all images, or a list with one per image.
            latents: noise to begin with, `[B, C, h, w]`.
            prompt_embeds, negative_prompt_embeds: text features `[prompts, L, width]` in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks `[prompts, L]`, 1 for a token.
            output_type: "pil", "np", "pt" (`[B, 3, height, width]` in [0, 1]), or "latent" (fp32, `[B, C, h, w]`).
            return_dict: False for a tuple.
            clean_caption: clean the texts as captions from the web; needs beautifulsoup4 and ftfy.
            use_resolution_binning: generate at the trained size of the nearest aspect ratio and scale the images to
                `height` and `width`. Checkpoints without a table of trained sizes generate at the size asked for.
            attention_kwargs: for the attention processors; `{"scale": s}` sets the strength of LoRA adapters.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; what it
                returns replaces the tensors. `pipeline._interrupt = True` ends the loop. The texts are projected once
                for all steps: a callback that changes weights or adapters must return `prompt_embeds` as well.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds`, `negative_prompt_embeds` it gets.
            max_sequence_length: tokens per text; a warning tells what is cut off longer ones.
            complex_human_instruction: text, or its lines, put before each prompt; None for none.
            guider: a guider of diffusers (`diffusers.guiders`) in place of `guidance_scale`, which then must not be
                given: other formulas, guidance at some steps only, skipped layers. It is copied, not changed.
            share_prompt_mask: mask the negative prompt like the prompt, padding included, as the authors' code does.
            ip_adapter_image: image prompts for all prompts: a PIL image, an array or a tensor (in [0, 1]) for the
                IP-Adapter, or a list with an entry for each IP-Adapter, which may be a list of several images.
                Negative prompts have no image.
            ip_adapter_image_embeds: their features, a list with a tensor `[prompts or 1, images, ...]` for each
                IP-Adapter, from `prepare_ip_adapter_image_embeds`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request, checked; the size asked for and the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        requested_size, size = self._sizes(request)
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], of prompts and negative prompts; keys and values of image prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            texts["image_states"] = self._image_states(request, len(texts["prompt_embeds"]))

            # 3. Schedule and noise, [B, C, h, w] in fp32
            steps = request.lay_out(call.scheduler, device)
            latents = self._noise(request, len(texts["prompt_embeds"]), size)

            # 4. Denoising: the transformer predicts, the scheduler steps
            latents = denoise(self.transformer, latents, steps, texts, call)

            # 5. Images
            return self._output(latents, requested_size, request)
