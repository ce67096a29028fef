"""What all pipelines of Sana share: components and folders, texts, noise, images; and the state of a call.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.checks import check_integer, check_size
from diffusers_sana.locks import exclusive
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.acceleration.cuda_graphs import AutomaticGraphs, CudaGraphs
from diffusers_sana.pipelines.call import Call, CallAttribute, current_call, read_only, running
from diffusers_sana.pipelines.conditioning import StartImage
from diffusers_sana.pipelines.decoding import decode_latents
from diffusers_sana.pipelines.guidance import Guidance
from diffusers_sana.pipelines.loading import ComponentLoading
from diffusers_sana.pipelines.lora_loading import LoraLoading
from diffusers_sana.pipelines.request import Request, check_prompts
from diffusers_sana.pipelines.resolution import bin_size, resize_and_crop
from diffusers_sana.prompts.encoding import Prompts, encode_prompts


logger = logging.get_logger(__name__)

Size = tuple[int, int]  # height and width in pixels


class SanaPipelineBase(ComponentLoading, DiffusionPipeline, LoraLoading):
    """Base of the pipelines of Sana; they add what they begin with and what they do to each step.

    A call copies the scheduler and keeps its state in a `Call`, so several threads may call one pipeline.

    Args: the components, see `SanaPipeline`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    # Without one, guidance is an input of the transformer.
    _has_negative_prompt = True
    _output_class: type[BaseOutput] = SanaPipelineOutput

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    _cuda_graphs: CudaGraphs | None = None  # that the user has asked for
    _automatic_graphs: AutomaticGraphs | None = None
    _uses_automatic_graphs = True

    # Callbacks read and set these, as in diffusers.
    _guidance_scale = CallAttribute()
    _is_guided = CallAttribute()
    _attention_kwargs = CallAttribute()
    _num_timesteps = CallAttribute()
    _current_timestep = CallAttribute()
    _interrupt = CallAttribute()

    # Of the call in this thread; outside of calls, of the last one.
    guidance_scale: float = read_only("_guidance_scale", "Weight of the prompt.")
    attention_kwargs: dict[str, Any] | None = read_only("_attention_kwargs", "Arguments of the attention processors.")
    num_timesteps: int = read_only("_num_timesteps", "Steps of the call.")
    current_timestep: float = read_only("_current_timestep", "Timestep of the step that runs, or ran last.")
    interrupt: bool = read_only("_interrupt", "Whether the call ends before its next step.")

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
        self.vae_scale_factor = self._pixels_per_latent(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @staticmethod
    def _pixels_per_latent(vae: Any) -> int:
        """Along a side."""
        return 32 if vae is None else 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    @property
    def scheduler(self) -> Any:
        """The solver; within a call, also in its callbacks, the copy that the call steps with."""
        call = current_call(self)
        if call is not None:
            return call.scheduler
        if "scheduler" not in vars(self):
            raise AttributeError("The pipeline has no `scheduler` yet.")
        return vars(self)["scheduler"]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """Sets the solver of the calls to come."""
        vars(self)["scheduler"] = scheduler

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call runs negative prompts beside the prompts."""
        return self._has_negative_prompt and self._is_guided

    def enable_cuda_graphs(self) -> None:
        """From now on each step of the transformer is replayed as one CUDA graph: the same numbers, fewer launches.

        On a GPU that is the default where nothing prevents it, from the second step with inputs of a shape on. After
        this method the first step is recorded, too, and what prevents it is an error: offloading, step caches,
        `torch.compile(mode="reduce-overhead")`, or no CUDA device. Each shape of inputs (size, number of images,
        length of the text) has its own graph.
        """
        self._automatic_graphs = None
        self._cuda_graphs = CudaGraphs(self.transformer)

    def disable_cuda_graphs(self) -> None:
        """From now on no step is replayed as a CUDA graph. Frees their memory."""
        self._cuda_graphs = self._automatic_graphs = None
        self._uses_automatic_graphs = False

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers. Graphs that were recorded by default are dropped with the memory that they hold."""
        self._automatic_graphs = None
        return super().to(*args, **kwargs)

    def _graphs_of_call(self, has_guider: bool) -> CudaGraphs | None:
        """What replays the steps of a call."""
        if self._cuda_graphs is not None:
            if self._cuda_graphs.model is not self.transformer:
                self.enable_cuda_graphs()
            return self._cuda_graphs
        # A guider may replace layers for some of its predictions.
        if has_guider or not self._uses_automatic_graphs or not isinstance(self.transformer, torch.nn.Module):
            return None
        if self._automatic_graphs is None or self._automatic_graphs.model is not self.transformer:
            self._automatic_graphs = AutomaticGraphs(self.transformer)
        return self._automatic_graphs

    def maybe_free_model_hooks(self) -> None:
        """As in diffusers: offloads the models if offloading is on, and resets the step cache of the transformer.

        So it waits until no call has its own cache there.
        """
        with exclusive(self.transformer):
            super().maybe_free_model_hooks()

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
        prompts = Prompts.of(locals())
        for name, side, patch in zip(("height", "width"), (height, width), self._patch_sides, strict=True):
            check_size(name, side, self.vae_scale_factor * patch)
        for name in callback_on_step_end_tensor_inputs or ():
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` must be names out of {self._callback_tensor_inputs}, got"
                    f" {name!r}."
                )
        check_prompts(
            prompts,
            channels=self.transformer.config.caption_channels,
            can_encode=self.tokenizer is not None and self.text_encoder is not None,
        )

    @property
    def _patch_sides(self) -> tuple[int, int]:
        """Latent rows and columns per token."""
        return (self.transformer.config.patch_size,) * 2

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
        """Noise to begin with, sampled with `generator` or as given.

        Args:
            batch_size: B.
            num_channels_latents: C.
            height, width: of the images, in pixels.
            dtype, device: of the result.
            generator: one for all images or one per image.
            latents: noise to be used as it is.

        Returns:
            `[B, C, h, w]`.
        """
        scale = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // scale, width // scale)
        meaning = f"images, channels, height and width over {scale}"
        return given_or_sampled(latents, shape, meaning, generator, device, dtype)

    def _sizes(self, request: Request) -> tuple[Size, Size]:
        """The size asked for, by default that of `latents` or the native size, and the size to generate at."""
        height, width, is_binned = request.height, request.width, request.use_resolution_binning
        if request.latents is not None and not request.is_sized:
            height, width = (side * self.vae_scale_factor for side in request.latents.shape[-2:])
            is_binned = False
        native_size = self._native_size
        height = native_size if height is None else height
        width = native_size if width is None else width
        check_integer("height", height)
        check_integer("width", width)
        requested = height, width
        return requested, self._bin(height, width) if is_binned else requested

    def _bin(self, height: int, width: int) -> Size:
        """The trained size that is nearest in aspect ratio."""
        return bin_size(height, width, self._native_size)

    @property
    def _native_size(self) -> int:
        """Side in pixels of the square images that the checkpoint was trained on."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    def _check(self, request: Request, size: Size) -> None:
        """`check_inputs` for the texts and callbacks of a request, and the size that is generated."""
        self.check_inputs(
            request.prompt,
            *size,
            request.callback_on_step_end_tensor_inputs,
            request.negative_prompt,
            request.prompt_embeds,
            request.negative_prompt_embeds,
            request.prompt_attention_mask,
            request.negative_prompt_attention_mask,
        )

    def _begin(self, request: Request, **state: Any) -> AbstractContextManager[Call]:
        """Within the block, the properties of this pipeline tell of a new `Call`, with a copy of the scheduler.

        Args:
            request: its guidance scale, callback and options.
            state: other attributes of the `Call`.
        """
        unknown = sorted((request.attention_kwargs or {}).keys() - {"scale"})
        if unknown and type(self.transformer) is UpstreamTransformer:  # ours refuses them
            logger.warning(
                f"`attention_kwargs` {unknown} are not expected by diffusers' transformer, which ignores them."
            )
        callback, guider = request.callback_on_step_end, request.guider
        call = Call(
            scheduler=self._scheduler_of_call(),
            guidance_scale=request.guidance_scale,
            attention_kwargs=request.attention_kwargs,
            eta=request.eta,
            generator=request.generator,
            has_negative_prompt=self._has_negative_prompt,
            callback=None if callback is None else partial(callback, self),
            callback_inputs=request.callback_on_step_end_tensor_inputs,
            progress_bar=self.progress_bar,
            graphs=self._graphs_of_call(guider is not None),
            guidance=None if guider is None else Guidance(guider, self.transformer, self._cuda_graphs),
            **state,
        )
        return running(self, call)

    def _scheduler_of_call(self) -> Any:
        """A copy of the scheduler, for one call."""
        return copy.deepcopy(vars(self)["scheduler"])

    def _read_start(self, image: Any, request: Request, *, cover: bool = True) -> StartImage:
        """The argument `image` of a call, checked; `cover` cuts images to the size asked for."""
        return StartImage.read(
            image,
            request.height,
            request.width,
            channels=self.transformer.config.in_channels,
            scale=self.vae_scale_factor,
            can_encode=self.vae is not None,
            cover=cover,
            text_to_image="SanaPipeline" if self._has_negative_prompt else "SanaSprintPipeline",
        )

    def _noise(self, request: Request, num_images: int, size: Size) -> Tensor:
        """`prepare_latents` for a request: `[B, C, h, w]` in fp32."""
        channels, device = self.transformer.config.in_channels, self._execution_device
        noise = request.generator, request.latents
        return self.prepare_latents(num_images, channels, *size, torch.float32, device, *noise)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to images `[B, 3, height, width]` in [-1, 1]."""
        return decode_latents(self.vae, latents, self.vae_scale_factor, self._shown_tiles)

    def _shown_tiles(self, tiles: Sequence[Any]) -> Iterable[Any]:
        """A progress bar around the tiles of the autoencoder."""
        bar = self.progress_bar(tiles)
        bar.set_description("tiles")
        return bar

    def _postprocess(self, images: Tensor, size: Size, output_type: str) -> Any:
        """Decoded images at `size`, in the form asked for."""
        return self.image_processor.postprocess(resize_and_crop(images, *size), output_type=output_type)

    def _output(self, latents: Tensor, size: Size, request: Request) -> Any:
        """What `__call__` returns: latents `[B, C, h, w]`, or images of `size`."""
        results: Any = latents
        if request.output_type != "latent":
            results = self._postprocess(self._decode(latents).float(), size, request.output_type)
        self.maybe_free_model_hooks()
        return self._output_class(results) if request.return_dict else (results,)


def given_or_sampled(
    latents: Tensor | None,
    shape: tuple[int, ...],
    meaning: str,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Noise of a shape: `latents` if given, else sampled with `generator`.

    Args:
        meaning: of the axes, for the error.
    """
    if latents is not None:
        if latents.shape != shape:
            raise ValueError(
                f"`latents` must have the shape {list(shape)} ({meaning}), got {list(latents.shape)}. Leave `height`"
                " and `width` out to take the size from `latents`."
            )
        return latents.to(device, dtype)
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(
            f"`generator` must be one generator or a list of {shape[0]}, one per image, got a list of"
            f" {len(generator)}."
        )
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


class GuidedSanaPipeline(SanaPipelineBase):
    """Base of the pipelines with classifier-free guidance: all but those of SANA-Sprint."""

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
        *,
        share_prompt_mask: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Text features of prompts and negative prompts, one row per image; the images of a prompt are neighbors.

        Args:
            prompt: one or several texts; not with `prompt_embeds`.
            do_classifier_free_guidance: whether the negative half is needed.
            negative_prompt: one for all prompts or one each; never gets the instruction.
            num_images_per_prompt: rows per prompt.
            device: of the result; the pipeline's by default.
            prompt_embeds, negative_prompt_embeds: `[prompts, L, width]`, used in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: `[prompts, L]`, 1 for a token.
            clean_caption: clean the texts as captions from the web; needs beautifulsoup4 and ftfy.
            max_sequence_length: tokens per text, the leading special token included.
            complex_human_instruction: text, or its lines, put before each prompt; None here, but not in `__call__`,
                as in diffusers.
            lora_scale: strength of adapters in the text encoder.
            share_prompt_mask: encode the negative prompt with its padding, and mask it like the prompt.

        Returns:
            Features `[B, L, width]`, mask `[B, L]`, and the same of the negative prompts or None twice.
        """
        prompts, is_guided = Prompts.of(locals()), do_classifier_free_guidance
        device = device or self._execution_device
        tensors = encode_prompts(self.tokenizer, self.text_encoder, prompts, is_guided=is_guided, device=device)
        return tuple(tensors.values())  # type: ignore[return-value]


class ImageSanaPipeline(GuidedSanaPipeline):
    """Base of the pipelines that begin with an image."""

    def _generated_size(self, start: StartImage, request: Request, *, is_chosen: bool) -> Size:
        """The size to generate at; `is_chosen` says whether the user has chosen that of the images."""
        return start.generated_size(
            request.latents,
            is_chosen=is_chosen,
            use_resolution_binning=request.use_resolution_binning,
            native_size=self._native_size,
            patch_size=self.transformer.config.patch_size,
        )
