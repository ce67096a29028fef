"""Text-to-image with Sana and SANA-1.5 under perturbed-attention guidance.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.schedulers import SchedulerMixin
from torch import Tensor
from transformers import BaseImageProcessor, Gemma2PreTrainedModel, GemmaTokenizer, PreTrainedModel

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.ip_adapter_sana import SanaIPAdapterModel
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.call import CallAttribute, read_only
from diffusers_sana.pipelines.perturbed_attention import (
    DEFAULT_PAG_LAYERS,
    PAGLayers,
    check_no_cfg_parallel,
    check_pag,
    pag_layers_of,
    perturbed_texts,
    predict_perturbed,
    self_attentions,
)
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaPAGPipeline(SanaPipeline):
    """Text to image with perturbed-attention guidance (PAG, arXiv 2403.17377).

    A drop-in for `diffusers.SanaPAGPipeline`, but for the names of layers, which are whole names here and patterns
    there. Components are those of `SanaPipeline`: `SanaPAGPipeline.from_pipe(pipe)` shares them.

    Args:
        pag_applied_layers: as in `set_pag_applied_layers`.
        the others: as in `SanaPipeline`.
    """

    pag_applied_layers: list[str | int]

    # Callbacks read and set these, as in diffusers.
    _pag_scale = CallAttribute()
    _pag_adaptive_scale = CallAttribute()
    _pag_layers = CallAttribute()

    # Of the call in this thread; outside of calls, of the last one.
    pag_scale: float = read_only("_pag_scale", "Weight of perturbed-attention guidance.")
    pag_adaptive_scale: float = read_only("_pag_adaptive_scale", "How fast `pag_scale` falls.")

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        scheduler: SchedulerMixin,
        pag_applied_layers: PAGLayers = DEFAULT_PAG_LAYERS,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        ip_adapter: SanaIPAdapterModel | None = None,
    ) -> None:
        image_prompts = image_encoder, feature_extractor, ip_adapter
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler, *image_prompts)
        self.set_pag_applied_layers(pag_applied_layers)

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, pag_applied_layers: PAGLayers = DEFAULT_PAG_LAYERS, **kwargs: Any
    ) -> Self:
        """As `SanaPipeline.from_pipe`, with the layers that are perturbed."""
        made = super().from_pipe(pipeline, **kwargs)
        made.set_pag_applied_layers(pag_applied_layers)
        return made

    @property
    def do_perturbed_attention_guidance(self) -> bool:
        """Whether the call runs a perturbed batch."""
        return self._pag_scale > 0 and len(self._pag_layers) > 0

    @property
    def do_pag_adaptive_scaling(self) -> bool:
        """Whether `pag_scale` falls from step to step."""
        return self.do_perturbed_attention_guidance and self._pag_adaptive_scale > 0

    def set_pag_applied_layers(self, pag_applied_layers: PAGLayers) -> None:
        """Chooses the layers for the calls that name none.

        Args:
            pag_applied_layers: numbers of transformer blocks, or names of modules such as "transformer_blocks.8", with
                every self-attention in them; one or several. None at all turns perturbed-attention guidance off.

        Raises:
            TypeError: neither names nor numbers.
            ValueError: no self-attention of that name.
        """
        layers = pag_layers_of(pag_applied_layers)
        if self.transformer is not None:
            self_attentions(self.transformer, layers)
        self.pag_applied_layers = layers

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
        *,
        share_prompt_mask: bool = False,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Generates images.

        Args:
            pag_scale: weight of perturbed-attention guidance; 0 turns it off, and the result is that of
                `SanaPipeline`. Otherwise each step also runs the transformer on a perturbed batch: 1.5 times the work
                with `guidance_scale` above 1, twice the work without.
            pag_adaptive_scale: how much of `pag_scale` is taken back for each unit of timestep below 1000: of 3, 0.003
                leaves nothing at the end.
            pag_applied_layers: for this call, in place of those of the pipeline; as in `set_pag_applied_layers`.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the layers, checked; the size asked for and the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        check_pag(pag_scale, pag_adaptive_scale)
        layers = self.pag_applied_layers if pag_applied_layers is None else pag_layers_of(pag_applied_layers)
        attentions = self_attentions(self.transformer, layers)
        requested_size, size = self._sizes(request)
        self._check(request, size)

        device = self._execution_device
        pag = {"pag_scale": pag_scale, "pag_adaptive_scale": pag_adaptive_scale, "pag_layers": layers}
        with self._begin(request, **pag) as call:
            # 2. Text features, [B, L, width], of prompts and negative prompts; keys and values of image prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            texts["image_states"] = self._image_states(request, len(texts["prompt_embeds"]))

            # 3. Schedule and noise, [B, C, h, w] in fp32
            steps = request.lay_out(call.scheduler, device)
            latents = self._noise(request, len(texts["prompt_embeds"]), size)

            # 4. Denoising; each step also predicts with the self-attentions off, and is guided away from that
            guidance: dict[str, Any] = {}
            if self.do_perturbed_attention_guidance:
                check_no_cfg_parallel(self.transformer)
                predict = partial(predict_perturbed, attentions=attentions)
                guidance = {"arrange": perturbed_texts, "predict": predict}
            latents = denoise(self.transformer, latents, steps, texts, call, **guidance)

            # 5. Images
            return self._output(latents, requested_size, request)
