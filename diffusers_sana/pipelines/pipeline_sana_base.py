"""What all pipelines of Sana share: components and folders, texts, the denoising loop, images out.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.checks import check_integer, check_texts
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.layers import scaled_adapters
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.acceleration.cuda_graphs import CudaGraphs
from diffusers_sana.pipelines.decoding import decode_latents
from diffusers_sana.pipelines.loading import ComponentLoading
from diffusers_sana.pipelines.lora_loading import LoraLoading
from diffusers_sana.pipelines.request import check_prompts
from diffusers_sana.pipelines.resolution import bin_size, check_size, resize_and_crop
from diffusers_sana.pipelines.sampling import TEXT_TENSORS, DenoisingLoop
from diffusers_sana.prompts.encoding import clean_captions, encode_captions, join_instruction


class SanaPipelineBase(ComponentLoading, DenoisingLoop, DiffusionPipeline, LoraLoading):
    """Base of the pipelines of Sana; they add what they begin with and what they do to each step.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any
    _guidance_scale: float
    _attention_kwargs: dict[str, Any] | None
    _num_timesteps: int
    _current_timestep: float
    _interrupt: bool
    _cuda_graphs: CudaGraphs | None = None

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor = 32 if vae is None else 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> float:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def enable_cuda_graphs(self) -> None:
        """From now on each step of the transformer is replayed as one CUDA graph: the same numbers, fewer launches.

        Helps where a step's kernels are short: small images, fast GPUs. Each shape of inputs (size, number of images,
        length of the text) is recorded at its first use. Not together with offloading, step caches or
        `torch.compile(mode="reduce-overhead")`; a call then raises RuntimeError, and so it does without a CUDA device.
        """
        self._cuda_graphs = CudaGraphs(self.transformer)

    def disable_cuda_graphs(self) -> None:
        """Undoes `enable_cuda_graphs` and frees its memory."""
        self._cuda_graphs = None

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
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
        """Text features of prompts and negative prompts, one row an image; the images of a prompt are neighbours.

        Args:
            prompt: one or several texts; not with `prompt_embeds`.
            do_classifier_free_guidance: whether the negative half is needed.
            negative_prompt: one for all prompts or one each; never gets the instruction.
            num_images_per_prompt: rows a prompt.
            device: of the result; the pipeline's by default.
            prompt_embeds, negative_prompt_embeds: `[prompts, L, width]`, used in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: `[prompts, L]`, 1 for a token.
            clean_caption: clean the texts as captions from the web; needs beautifulsoup4 and ftfy.
            max_sequence_length: tokens a text, the leading special token included.
            complex_human_instruction: text, or its lines, put before each prompt; None here, but not in `__call__`,
                as in diffusers.
            lora_scale: strength of adapters in the text encoder.

        Returns:
            Features `[B, L, width]`, mask `[B, L]`, and the same of the negative prompts or None twice.
        """
        device = device or self._execution_device
        instruction = join_instruction(complex_human_instruction)

        def encode(name: str, texts: Any, instruction: str) -> tuple[Tensor, Tensor]:
            texts = [texts] if isinstance(texts, str) else texts
            check_texts(name, texts, texts)
            return encode_captions(
                self.tokenizer,
                self.text_encoder,
                clean_captions(texts, clean_caption),
                instruction,
                max_sequence_length=max_sequence_length,
                device=device,
                name=name,
            )

        needs_negative = do_classifier_free_guidance and negative_prompt_embeds is None
        if needs_negative and self.text_encoder is None:
            raise ValueError(
                "`negative_prompt_embeds` must be given, because this pipeline was made without a text encoder; or set"
                " `guidance_scale` to 1."
            )
        with scaled_adapters(self.text_encoder, lora_scale):
            if prompt_embeds is None:
                prompt_embeds, prompt_attention_mask = encode("prompt", prompt, instruction)
            if needs_negative:
                negative_prompt_embeds, negative_prompt_attention_mask = encode(
                    "negative_prompt", negative_prompt or "", ""
                )
                if len(negative_prompt_embeds) == 1:
                    negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
                    negative_prompt_attention_mask = negative_prompt_attention_mask.expand(len(prompt_embeds), -1)

        dtype = prompt_embeds.dtype if self.text_encoder is None else self.text_encoder.dtype

        def per_image(embeds: Any, mask: Any) -> tuple[Tensor, Tensor]:
            embeds = embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
            return embeds, mask.to(device).repeat_interleave(num_images_per_prompt, dim=0)

        positive = per_image(prompt_embeds, prompt_attention_mask)
        if not do_classifier_free_guidance:
            return *positive, None, None
        return *positive, *per_image(negative_prompt_embeds, negative_prompt_attention_mask)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> None:
        """Raises, naming the argument, where the inputs of `__call__` are wrong or contradict each other.

        Args:
            height, width: as generated, after binning.
            the others: as in `__call__`.
        """
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        check_size("height", height, multiple)
        check_size("width", width, multiple)
        for name in callback_on_step_end_tensor_inputs or ():
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` must be names out of {self._callback_tensor_inputs}, got"
                    f" {name!r}."
                )
        check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            channels=self.transformer.config.caption_channels,
            can_encode=self.tokenizer is not None and self.text_encoder is not None,
        )

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise to begin with, drawn from `generator` or as given.

        Args:
            batch_size: B.
            num_channels_latents: C.
            height, width: of the images, in pixels.
            dtype, device: of the result.
            generator: one for all images or one each.
            latents: noise to be used as it is.

        Returns:
            `[B, C, h, w]`.
        """
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(
                    f"`latents` must have the shape {list(shape)} (images, channels, height and width over"
                    f" {self.vae_scale_factor}), got {list(latents.shape)}. Leave `height` and `width` out to take the"
                    " size from `latents`."
                )
            return latents.to(device, dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one generator or a list of {batch_size}, one an image, got a list of"
                f" {len(generator)}."
            )
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def _sizes(
        self, height: int | None, width: int | None, use_resolution_binning: bool
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size asked for, by default the native one of the checkpoint, and the size to generate at, in pixels."""
        native_size = self.transformer.config.sample_size * self.vae_scale_factor
        height = native_size if height is None else height
        width = native_size if width is None else width
        check_integer("height", height)
        check_integer("width", width)
        requested = height, width
        return requested, bin_size(height, width, native_size) if use_resolution_binning else requested

    def _start(
        self,
        prompt: str | list[str] | None,
        size: tuple[int, int],
        callback_inputs: Sequence[str],
        *,
        guidance_scale: float,
        attention_kwargs: dict[str, Any] | None,
        **texts: Any,
    ) -> dict[str, Any]:
        """Checks size and texts, sets what the properties tell of this call, and encodes the texts.

        Args:
            size: height and width of what is generated, in pixels.
            callback_inputs: names of tensors that callbacks want.
            texts: the other arguments of `encode_prompt`.

        Returns:
            The texts under the names of `TEXT_TENSORS`, one row an image.
        """
        given: dict[str, Any] = {name: texts.get(name) for name in (*TEXT_TENSORS, "negative_prompt")}
        self.check_inputs(prompt, *size, callback_inputs, **given)
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        texts |= {"device": self._execution_device, "lora_scale": (attention_kwargs or {}).get("scale")}
        # By its class: Sprint's own returns no negative half.
        encoded = SanaPipelineBase.encode_prompt(self, prompt, self.do_classifier_free_guidance, **texts)
        return dict(zip(TEXT_TENSORS, encoded, strict=True))

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to images `[B, 3, height, width]` in [-1, 1]."""

        def shown(tiles: Sequence[Any]) -> Iterable[Any]:
            bar = self.progress_bar(tiles)
            bar.set_description("tiles")
            return bar

        return decode_latents(self.vae, latents, self.vae_scale_factor, shown)

    def _output(
        self, latents: Tensor, size: tuple[int, int], output_type: str, return_dict: bool
    ) -> SanaPipelineOutput | tuple:
        """What `__call__` returns: latents `[B, C, h, w]`, or images of `size`, height and width in pixels."""
        if output_type == "latent":
            images: Any = latents
        else:
            images = resize_and_crop(self._decode(latents).float(), *size)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=images) if return_dict else (images,)
