"""Text-to-image with Sana and SANA-1.5.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana._registration import PACKAGE, UPSTREAM_NAMES
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.cuda_graphs import CudaGraphs, graphed
from diffusers_sana.pipelines.folder_check import check_complete, check_readable
from diffusers_sana.pipelines.prompt_encoding import (
    COMPLEX_HUMAN_INSTRUCTION,
    check_embeds,
    clean_captions,
    encode_captions,
    join_instruction,
    pad_text,
)
from diffusers_sana.pipelines.resolution import bin_size, check_size, resize_and_crop


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TILING_SIZE = 2048  # pixels a side from which decoding in one piece outgrows common GPUs

_OURS = {("diffusers", theirs): (PACKAGE, ours) for ours, theirs in UPSTREAM_NAMES.items()}


class SanaPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Text to image with Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427).

    A drop-in for `diffusers.SanaPipeline`: the same components, arguments, seeds and folders. `from_pretrained` reads
    folders that name diffusers' transformer, autoencoder and DPM-Solver and loads this package's in their place;
    `save_pretrained` writes folders that name diffusers' again. Components passed to either pipeline are used as they
    are, whichever package they come from.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bfloat16 or fp32; Gemma overflows fp16.
        vae: deep compression autoencoder.
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or the Hub; all arguments are those of `DiffusionPipeline.from_pretrained`.

        Raises:
            OSError: naming the file of a local folder that is missing or damaged.
            ValueError: for an argument or a component that does not belong to this pipeline.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_complete(folder, cls._get_init_keys(cls) - kwargs.keys())
        try:
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        except (SafetensorError, ValueError):  # of JSON and of text encodings: kinds of ValueError
            check_readable(folder)  # where a file is damaged, raises with its name, which those errors lack
            raise

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Reads `model_index.json`; where it names a diffusers class that one of ours replaces, ours is loaded.

        Raises:
            ValueError: for components and arguments of `from_pretrained` that this pipeline does not know.
        """
        config_dict = {
            name: _OURS.get(tuple(value), value) if isinstance(value, list) else value
            for name, value in config_dict.items()
        }
        init_dict, unknown, hidden = super().extract_init_dict(config_dict, **kwargs)
        if unknown:
            known = sorted(cls._get_init_keys(cls) - {"self"})
            raise ValueError(
                f"`{'`, `'.join(unknown)}`: neither a component of {cls.__name__} nor an argument of"
                f" `from_pretrained`. The components are {known}."
            )
        return init_dict, unknown, hidden

    def register_to_config(self, **kwargs: Any) -> None:
        """Records a component of ours under the name of the diffusers class it replaces: see `save_pretrained`."""
        for name, value in kwargs.items():
            if isinstance(value, tuple) and str(value[0]).split(".")[0] == PACKAGE and value[1] in UPSTREAM_NAMES:
                kwargs[name] = ("diffusers", UPSTREAM_NAMES[value[1]])
        super().register_to_config(**kwargs)

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

        def encode(texts: Any, instruction: str) -> tuple[Tensor, Tensor]:
            texts = [texts] if isinstance(texts, str) else texts
            return encode_captions(
                self.tokenizer,
                self.text_encoder,
                clean_captions(texts, clean_caption),
                instruction,
                max_sequence_length=max_sequence_length,
                device=device,
            )

        needs_negative = do_classifier_free_guidance and negative_prompt_embeds is None
        if needs_negative and self.text_encoder is None:
            raise ValueError(
                "`negative_prompt_embeds` must be given, because this pipeline was made without a text encoder; or set"
                " `guidance_scale` to 1."
            )
        with _lora_scaled(self.text_encoder, lora_scale):
            if prompt_embeds is None:
                prompt_embeds, prompt_attention_mask = encode(prompt, instruction)
            if needs_negative:
                negative_prompt_embeds, negative_prompt_attention_mask = encode(negative_prompt or "", "")
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

        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(
                "Exactly one of `prompt` and `prompt_embeds` must be given, got "
                + ("neither." if prompt is None else "both.")
            )
        if negative_prompt and negative_prompt_embeds is not None:
            raise ValueError("`negative_prompt` and `negative_prompt_embeds` exclude each other; leave one out.")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = text if isinstance(text, list) else ["" if text is None else text]
            if not all(isinstance(item, str) for item in texts):
                raise TypeError(f"`{name}` must be a string or a list of strings, got {text!r}.")
        if isinstance(prompt, list) and not prompt:
            raise ValueError("`prompt` must have at least one text, got an empty list.")
        if prompt is not None and (self.tokenizer is None or self.text_encoder is None):
            raise ValueError(
                "`prompt` needs a tokenizer and a text encoder, but this pipeline was made without. Give"
                " `prompt_embeds` and `prompt_attention_mask`."
            )

        channels = self.transformer.config.caption_channels
        num_prompts = len(prompt) if isinstance(prompt, list) else 1
        if prompt_embeds is not None:
            check_embeds("prompt_embeds", prompt_embeds, prompt_attention_mask, "prompt_attention_mask", channels)
            num_prompts = len(prompt_embeds)
        if negative_prompt_embeds is not None:
            check_embeds(
                "negative_prompt_embeds",
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                "negative_prompt_attention_mask",
                channels,
            )
        for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
            if isinstance(value, list | Tensor) and len(value) not in (0, num_prompts):
                raise ValueError(
                    f"`{name}` must have one entry for each of the {num_prompts} prompts, got {len(value)}."
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

    def _text_arguments(self, embeds: Tensor, mask: Tensor) -> dict[str, Any]:
        """What the transformer is told of the texts; projected once for all steps where it can do that."""
        embeds = embeds.to(self.transformer.dtype)
        if hasattr(self.transformer, "encode_text"):
            context = self.transformer.encode_text(embeds, mask, attention_kwargs=self.attention_kwargs)
            return {"encoder_hidden_states": None, "text_context": context}
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to images in [-1, 1], in tiles where one piece is or turns out too large."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        by_need = (
            isinstance(self.vae, AutoencoderDC) and max(latents.shape[-2:]) * self.vae_scale_factor >= TILING_SIZE
        )
        try:
            with _tiled(self.vae) if by_need else nullcontext():
                return self.vae.decode(latents, return_dict=False)[0]
        except torch.OutOfMemoryError as error:
            reason = str(error)  # not the error itself: its traceback keeps the tensors alive
        logger.warning(f"Out of memory while decoding; trying again image by image and in tiles. {reason}")
        try:
            with _tiled(self.vae, sliced=True):
                return self.vae.decode(latents, return_dict=False)[0]
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"Decoding latents {list(latents.shape)} does not fit even image by image and in tiles. Free memory"
                " (`enable_model_cpu_offload()`), or take the latents (`output_type='latent'`) and decode elsewhere."
            ) from error

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
    ) -> SanaPipelineOutput | tuple:
        """Generates images.

        Args:
            prompt: one or several texts.
            negative_prompt: what to steer away from: one for all prompts, or one each; None is the empty text.
            num_inference_steps: evaluations of the transformer.
            timesteps, sigmas: schedule of one's own, descending, in place of `num_inference_steps`; one of the two.
            guidance_scale: weight of the prompt against the negative prompt; at most 1 turns guidance off and halves
                the work.
            num_images_per_prompt: images of each prompt; they are neighbours in the result.
            height, width: pixels; the native size of the checkpoint by default, or that of `latents`.
            eta: for schedulers that take it.
            generator: source of the noise: one for all images, or a list with one an image.
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
            max_sequence_length: tokens a text.
            complex_human_instruction: text, or its lines, put before each prompt; None for none.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Sizes, and all that can be wrong
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
            ("max_sequence_length", max_sequence_length),
        ):
            _check_positive_integer(name, count)
        if not isinstance(guidance_scale, Real):
            raise TypeError(f"`guidance_scale` must be a number, got {guidance_scale!r}.")
        if not isinstance(attention_kwargs, dict | None):
            raise TypeError(f"`attention_kwargs` must be a dict such as {{'scale': 0.5}}, got {attention_kwargs!r}.")
        if timesteps is not None and sigmas is not None:
            raise ValueError("`timesteps` and `sigmas` exclude each other; leave one out.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if output_type != "latent" and self.vae is None:
            raise ValueError("`output_type` must be 'latent', because this pipeline was made without an autoencoder.")
        if latents is not None:
            _check_latents(latents)
            if height is None and width is None:
                height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
                use_resolution_binning = False
        native_size = self.transformer.config.sample_size * self.vae_scale_factor
        height = native_size if height is None else height
        width = native_size if width is None else width
        _check_positive_integer("height", height)
        _check_positive_integer("width", width)
        requested_size = (height, width)
        if use_resolution_binning:
            height, width = bin_size(height, width, native_size)
        self.check_inputs(
            prompt,
            height,
            width,
            callback_on_step_end_tensor_inputs,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Texts, [B, L, width]
        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            self.encode_prompt(
                prompt,
                self.do_classifier_free_guidance,
                negative_prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                device=device,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                clean_caption=clean_caption,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=complex_human_instruction,
                lora_scale=(attention_kwargs or {}).get("scale"),
            )
        )

        # 3. Schedule and noise, [B, C, h, w] in fp32
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(
            len(prompt_embeds),
            self.transformer.config.in_channels,
            height,
            width,
            torch.float32,
            device,
            generator,
            latents,
        )
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
        step_guided = getattr(self.scheduler, "step_guided", None)  # guidance and step in one

        # 4. Denoising
        text, is_guided = None, None
        if self._cuda_graphs is not None and self._cuda_graphs.model is not self.transformer:
            self.enable_cuda_graphs()
        with (
            graphed(self.transformer, self._cuda_graphs) as predict,
            self.progress_bar(total=len(timesteps)) as progress_bar,
        ):
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                if text is None or is_guided != self.do_classifier_free_guidance:
                    is_guided = self.do_classifier_free_guidance
                    positive = (prompt_embeds, prompt_attention_mask)
                    negative = (negative_prompt_embeds, negative_prompt_attention_mask)
                    text = self._text_arguments(*(_concatenate(negative, positive) if is_guided else positive))

                model_input = (torch.cat([latents, latents]) if is_guided else latents).to(self.transformer.dtype)
                with _cache_context(self.transformer):
                    prediction = predict(
                        hidden_states=model_input,
                        timestep=t.expand(len(model_input)) * self.transformer.config.timestep_scale,
                        attention_kwargs=attention_kwargs,
                        return_dict=False,
                        **text,
                    )
                if is_guided and step_guided is not None:
                    arguments = (prediction, t, latents, self.guidance_scale)
                    latents = step_guided(*arguments, **step_kwargs, return_dict=False)[0]
                else:
                    prediction = prediction.float()
                    if is_guided:
                        unconditional, conditional = prediction.chunk(2)
                        prediction = unconditional + self.guidance_scale * (conditional - unconditional)
                    latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    replaced = callback_on_step_end(self, i, t, wanted) or {}
                    latents = replaced.get("latents", latents)
                    prompt_embeds = replaced.get("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = replaced.get("negative_prompt_embeds", negative_prompt_embeds)
                    if "prompt_embeds" in replaced or "negative_prompt_embeds" in replaced:
                        text = None
                progress_bar.update()

        # 5. Images
        if output_type == "latent":
            images = latents
        else:
            images = resize_and_crop(self._decode(latents).float(), *requested_size)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=images) if return_dict else (images,)


@contextmanager
def _lora_scaled(model: torch.nn.Module | None, scale: float | None) -> Iterator[None]:
    """Multiplies the strength of adapters in `model` by `scale` for the time of the block."""
    if model is None or scale is None:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


@contextmanager
def _tiled(vae: AutoencoderDC | UpstreamAutoencoderDC, sliced: bool = False) -> Iterator[None]:
    """Decodes in tiles, and with `sliced` image by image, for the time of the block; settings of the user stay."""
    was_tiled, was_sliced = vae.use_tiling, vae.use_slicing
    if not was_tiled:
        vae.enable_tiling()
    vae.use_slicing = was_sliced or sliced
    try:
        yield
    finally:
        vae.use_tiling, vae.use_slicing = was_tiled, was_sliced


def _cache_context(transformer: Any) -> AbstractContextManager:
    """Where step caches (`transformer.enable_cache`) keep their state, if the model can have any."""
    return transformer.cache_context("text") if hasattr(transformer, "cache_context") else nullcontext()


def _concatenate(negative: tuple[Tensor, Tensor], positive: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Features and masks of both halves of the guided batch, lengthened to the longer of the two."""
    length = max(negative[0].shape[1], positive[0].shape[1])
    (embeds, mask), (more_embeds, more_mask) = pad_text(*negative, length), pad_text(*positive, length)
    return torch.cat([embeds, more_embeds]), torch.cat([mask, more_mask])


def _check_positive_integer(name: str, value: int) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _check_latents(latents: Tensor) -> None:
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"`latents` must be a floating point tensor, got {getattr(latents, 'dtype', type(latents))}.")
    if latents.ndim != 4 or not bool(latents.isfinite().all()):
        raise ValueError(f"`latents` must be finite and [images, channels, height, width], got {list(latents.shape)}.")
