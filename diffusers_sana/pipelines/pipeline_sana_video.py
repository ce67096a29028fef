"""Text-to-video with SANA-Video.

Legend: B videos (prompts times videos per prompt), C latent channels, F frames, T latent frames, h w latent height and
width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana_video.pipeline_output import SanaVideoPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.pipeline_sana_video_base import VIDEO_INSTRUCTION, SanaVideoPipelineBase
from diffusers_sana.pipelines.request import VideoRequest
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts


class SanaVideoPipeline(SanaVideoPipelineBase):
    """Text to video with SANA-Video (arXiv 2509.24695).

    A drop-in for `diffusers.SanaVideoPipeline`: the same components, arguments, seeds and folders. `from_pretrained`
    reads folders that name diffusers' transformer and DPM-Solver and loads this package's in their place. Components
    passed to either pipeline are used as they are, whichever package they come from.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: `AutoencoderKLWan` in fp32, `AutoencoderKLLTX2Video`, or `AutoencoderDC`, which has each frame alone.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 6.0,
        num_videos_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
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
        complex_human_instruction: str | Sequence[str] | None = VIDEO_INSTRUCTION,
        motion_score: int | None = None,
        guider: Any = None,
    ) -> SanaVideoPipelineOutput | tuple:
        """Generates videos.

        Args:
            prompt: one or several texts.
            negative_prompt: what to steer away from: one for all prompts, or one each; None is the empty text.
            num_inference_steps: evaluations of the transformer.
            timesteps, sigmas: custom schedule, descending, in place of `num_inference_steps`; one of the two.
            guidance_scale: weight of the prompt against the negative prompt; at most 1 turns guidance off and halves
                the work.
            num_videos_per_prompt: videos per prompt; they are neighbors in the result.
            height, width: pixels; by default those of `latents`, or 16:9 at the native size of the checkpoint.
            frames: F; by default those of `latents`, or 81. One more than a multiple of the frames that the
                autoencoder makes of a latent frame, 4 for Wan's and 8 for LTX-2's.
            eta: for schedulers that take it.
            generator: source of the noise: one for all videos, or a list with one per video.
            latents: noise to begin with, `[B, C, T, h, w]`.
            prompt_embeds, negative_prompt_embeds: text features `[prompts, L, width]` in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks `[prompts, L]`, 1 for a token.
            output_type: "pil" (a list of images per video), "np" (`[B, F, height, width, 3]`), "pt"
                (`[B, F, 3, height, width]`), both in [0, 1], or "latent" (fp32, `[B, C, T, h, w]`).
            return_dict: False for a tuple.
            clean_caption: clean the texts as captions from the web; needs beautifulsoup4 and ftfy.
            use_resolution_binning: generate at the trained size of the nearest aspect ratio and scale the videos to
                `height` and `width`. Checkpoints without a table of trained sizes generate at the size asked for.
            attention_kwargs: `{"scale": s}` sets the strength of LoRA adapters.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `SanaPipeline`.
            max_sequence_length: tokens per text; a warning tells what is cut off longer ones.
            complex_human_instruction: text, or its lines, put before each prompt; None for none.
            motion_score: how much moves: the text " motion score: 30." after each prompt, which the model was trained
                with. More is more; the authors' code uses 10 by default and recommends 30.
            guider: a guider of diffusers (`diffusers.guiders`) in place of `guidance_scale`, as in `SanaPipeline`.

        Returns:
            `SanaVideoPipelineOutput` with `frames`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request, checked; the size asked for and the size that is generated
        request = self._with_frames(VideoRequest.collect(locals(), has_vae=self.vae is not None))
        requested_size, size = self._sizes(request)
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], of the prompts and the negative prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)

            # 3. Schedule and noise, [B, C, T, h, w] in fp32
            steps = request.lay_out(call.scheduler, device)
            latents = self._noise(request, len(texts["prompt_embeds"]), size)

            # 4. Denoising: the transformer predicts, the scheduler steps
            latents = denoise(self.transformer, latents, steps, texts, call)

            # 5. Videos
            return self._output(latents, requested_size, request)
