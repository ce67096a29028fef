"""What the pipelines of SANA-Video share: sizes and frames, noise, videos.

Legend: B videos (prompts times videos per prompt), C latent channels, F frames, T latent frames, h w latent height and
width, L text tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel as UpstreamTransformer
from diffusers.pipelines.sana_video.pipeline_output import SanaVideoPipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana._compat import upstream_instruction
from diffusers_sana.checks import check_frames
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from diffusers_sana.pipelines.loading import CAUSAL_TRANSFORMER
from diffusers_sana.pipelines.pipeline_sana_base import GuidedSanaPipeline, Size, given_or_sampled
from diffusers_sana.pipelines.request import Request, VideoRequest
from diffusers_sana.pipelines.resolution import bin_video_size, native_video_size, resize_and_crop
from diffusers_sana.pipelines.video_decoding import compression, decode_videos


logger = logging.get_logger(__name__)

# The lines of the default instruction before a prompt, as the installed diffusers has them.
VIDEO_INSTRUCTION = upstream_instruction("diffusers.pipelines.sana_video.pipeline_sana_video:SanaVideoPipeline")


class SanaVideoPipelineBase(GuidedSanaPipeline):
    """Base of the pipelines of SANA-Video; they add what the video begins with.

    Args: the components, see `SanaVideoPipeline`.
    """

    _output_class = SanaVideoPipelineOutput
    _default_frames = 81  # five seconds at 16 frames per second, of the released models
    _is_for_whole_videos = True  # False for the pipeline of LongSANA

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderKLWan | AutoencoderKLLTX2Video | AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaVideoTransformer3DModel | UpstreamTransformer,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(tokenizer, text_encoder, cast(Any, vae), cast(Any, transformer), scheduler)
        self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = compression(vae)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in all pipelines; tells of a LongSANA transformer, which this pipeline would run as a whole."""
        if CAUSAL_TRANSFORMER in (config_dict.get("transformer") or ()) and cls._is_for_whole_videos:
            logger.warning(
                "The folder has LongSANA's transformer, which was trained to generate chunk by chunk, but"
                f" {cls.__name__} generates a video as a whole. Use `LongSanaVideoPipeline.from_pretrained`."
            )
        return super().extract_init_dict(config_dict, **kwargs)

    @staticmethod
    def _pixels_per_latent(vae: Any) -> int:
        return compression(vae)[1]

    @property
    def _patch_sides(self) -> tuple[int, int]:
        return tuple(self.transformer.config.patch_size[1:])

    @property
    def _native_video_size(self) -> Size:
        """Height and width in pixels that the checkpoint was trained on."""
        return native_video_size(self.transformer.config.sample_size, self.vae_scale_factor * max(self._patch_sides))

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_videos_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As `SanaPipeline.encode_prompt`, with rows for videos in place of images."""
        return super().encode_prompt(
            prompt,
            do_classifier_free_guidance,
            negative_prompt,
            num_videos_per_prompt,
            device,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            clean_caption,
            max_sequence_length,
            complex_human_instruction,
            lora_scale,
        )

    def prepare_latents(  # type: ignore[override]
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise to begin with, sampled with `generator` or as given.

        Args:
            batch_size: B.
            num_channels_latents: C.
            height, width: of the videos, in pixels.
            num_frames: F.
            dtype, device: of the result.
            generator: one for all videos or one per video.
            latents: noise to be used as it is.

        Returns:
            `[B, C, T, h, w]`.
        """
        scale, frames = self.vae_scale_factor, self.vae_scale_factor_temporal
        grid = (num_frames - 1) // frames + 1, height // scale, width // scale
        meaning = f"videos, channels, frames over {frames}, height and width over {scale}"
        shape = (batch_size, num_channels_latents, *grid)
        return given_or_sampled(latents, shape, meaning, generator, device, dtype)

    def _with_frames(self, request: VideoRequest, most: int | None = None, advice: str = "") -> VideoRequest:
        """The request with its number of frames, by default that of `latents`.

        Args:
            request: of a call.
            most: latent frames; None for as many as the transformer was made for.
            advice: of what to do if there are more.

        Raises:
            ValueError: a number that the autoencoder or the transformer cannot have.
        """
        step, patch = self.vae_scale_factor_temporal, self.transformer.config.patch_size[0]
        frames = request.frames
        if frames is None:
            frames = self._default_frames if request.latents is None else (request.latents.shape[2] - 1) * step + 1
        trained = self.transformer.config.rope_max_seq_len * patch
        limit = trained if most is None else most
        reason = "`rope_max_seq_len` of the transformer" if most is None else f"{most} latent"
        check_frames(frames, step, patch, limit, reason + advice)
        return replace(request, frames=frames)

    def _sizes(self, request: Request) -> tuple[Size, Size]:
        """As for images; the native size is 16:9."""
        if request.latents is None or request.is_sized:
            height, width = self._native_video_size
            sides = (
                height if request.height is None else request.height,
                width if request.width is None else request.width,
            )
            request = replace(request, height=sides[0], width=sides[1])
        return super()._sizes(request)

    def _bin(self, height: int, width: int) -> Size:
        return bin_video_size(height, width, self.transformer.config.sample_size)

    def _noise(self, request: Request, num_images: int, size: Size) -> Tensor:
        """`prepare_latents` for a request: `[B, C, T, h, w]` in fp32."""
        channels, device = self.transformer.config.in_channels, self._execution_device
        frames: Any = cast(VideoRequest, request).frames
        noise = request.generator, request.latents
        return self.prepare_latents(num_images, channels, *size, frames, torch.float32, device, *noise)

    def _scheduler_of_call(self) -> Any:
        """A copy of the scheduler, with the shift of the checkpoint.

        `FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)` names it `shift` where the checkpoint's
        DPM-Solver has `flow_shift`, so the shift is lost and becomes 1. Its config still has the other.
        """
        scheduler = vars(self)["scheduler"]
        config = scheduler.config
        shift, unset = config.get("flow_shift"), config.get("_use_default_values", ())
        if shift is None or "shift" not in unset or shift == config.get("shift"):
            return copy.deepcopy(scheduler)
        logger.info(f"The scheduler gets `shift={shift}`, the `flow_shift` of the config that it was made from.")
        return type(scheduler).from_config(config, shift=shift)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T, h, w]` to videos `[B, 3, F, height, width]` in [-1, 1]."""
        return decode_videos(self.vae, latents, self.vae_scale_factor, self._shown_tiles)

    def _postprocess(self, images: Tensor, size: Size, output_type: str) -> Any:
        frames = resize_and_crop(images.transpose(1, 2).flatten(0, 1), *size)
        videos = frames.unflatten(0, (len(images), -1)).transpose(1, 2)
        return self.video_processor.postprocess_video(videos, output_type=output_type)
