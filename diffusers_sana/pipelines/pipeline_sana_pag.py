"""Text-to-image with Sana and SANA-1.5 under perturbed-attention guidance.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.schedulers import SchedulerMixin
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.perturbed_attention import DEFAULT_PAG_LAYERS, PAGDenoisingLoop, PAGLayers
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaPAGPipeline(PAGDenoisingLoop, SanaPipeline):
    """Text to image with perturbed-attention guidance (PAG, arXiv 2403.17377).

    A drop-in for `diffusers.SanaPAGPipeline`, but for the names of layers, which are whole names here and patterns
    there. Components are those of `SanaPipeline`: `SanaPAGPipeline.from_pipe(pipe)` shares them.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
        pag_applied_layers: as in `set_pag_applied_layers`.
    """

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        scheduler: SchedulerMixin,
        pag_applied_layers: PAGLayers = DEFAULT_PAG_LAYERS,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.set_pag_applied_layers(pag_applied_layers)

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, pag_applied_layers: PAGLayers = DEFAULT_PAG_LAYERS, **kwargs: Any
    ) -> Self:
        """As `SanaPipeline.from_pipe`, with the layers that are perturbed."""
        made = super().from_pipe(pipeline, **kwargs)
        made.set_pag_applied_layers(pag_applied_layers)
        return made

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
        pag_scale: float = 3.0,
        pag_adaptive_scale: float = 0.0,
        pag_applied_layers: PAGLayers | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Generates images.

        Args:
            pag_scale: weight of perturbed-attention guidance; 0 turns it off, and the result is that of
                `SanaPipeline`. Otherwise each step also runs the transformer on a perturbed batch: half as much work
                more with `guidance_scale` above 1, twice the work without.
            pag_adaptive_scale: how much of `pag_scale` is taken back for each unit of timestep below 1000: of 3, 0.003
                leaves nothing at the end.
            pag_applied_layers: for this call, in place of those of the pipeline; as in `set_pag_applied_layers`.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        self._start_pag(pag_scale, pag_adaptive_scale, pag_applied_layers)
        return super().__call__(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            output_type=output_type,
            return_dict=return_dict,
            clean_caption=clean_caption,
            use_resolution_binning=use_resolution_binning,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )
