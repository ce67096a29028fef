"""Text to videos of any length with LongSANA, chunk by chunk.

Legend: B videos (prompts times videos per prompt), C latent channels, F frames, T latent frames of a video, t of a
chunk, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers.pipelines.sana_video.pipeline_output import SanaVideoPipelineOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from diffusers_sana.checks import check_computed, check_integer
from diffusers_sana.locks import exclusive
from diffusers_sana.models.transformers.stream_sana_video import SanaVideoState, chunk_lengths
from diffusers_sana.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from diffusers_sana.pipelines.pipeline_sana_base import Size, given_or_sampled
from diffusers_sana.pipelines.pipeline_sana_video_base import SanaVideoPipelineBase
from diffusers_sana.pipelines.request import VideoRequest, check_descending
from diffusers_sana.pipelines.sampling import TextInputs, both_texts, project_texts, sample_by_renoising
from diffusers_sana.pipelines.video_decoding import check_streaming, decode_stream
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


TIMESTEPS = (1000, 960, 889, 727)  # that LongSANA was distilled at: a schedule of shift 8 at 1, 3/4, 1/2 and 1/4
LONGEST_TIME = 1000
# Arguments of the other pipelines that this one has no use for.
NOT_ASKED = {
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "eta": 0.0,
    "return_dict": True,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ("latents",),
}
Text = str | list[str]  # for all videos, or one for each prompt
ChunkPrompts = Sequence[Text] | Mapping[int, Text] | Callable[[int], Text | None]
BEYOND = "; the model was not trained for positions beyond, which `max_latent_frames` allows"


class LongSanaVideoPipeline(SanaVideoPipelineBase):
    """Text to long videos with LongSANA (arXiv 2509.24695): `stream` gives the frames while they are made.

    A video is made in chunks of about ten latent frames, which attend to themselves and to all before them. Of those,
    the transformer keeps sums of constant size, so time per frame and memory do not grow with the length. Each chunk
    takes four steps, without guidance, and one more forward at time 0 that adds it to the sums.

    Components and folders are those of `SanaVideoPipeline`; the weights are LongSANA's, which have the same keys. The
    scheduler is not used. The autoencoder must decode frame after frame: `AutoencoderKLWan` or `AutoencoderDC`.

    Args: see `SanaVideoPipeline`; the transformer must be that of this package.
    """

    _is_for_whole_videos = False

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        timesteps: Sequence[float] = TIMESTEPS,
        num_videos_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        base_chunk_frames: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        motion_score: int | None = None,
        chunk_prompts: ChunkPrompts | None = None,
        max_latent_frames: int | None = None,
    ) -> SanaVideoPipelineOutput | tuple:
        """Generates whole videos: all frames of `stream`, with the same arguments.

        Args:
            return_dict: False for a tuple.
            the others: as in `stream`.

        Returns:
            `SanaVideoPipelineOutput` with `frames` as `SanaVideoPipeline` has them, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        made = list(self.stream(**arguments))
        results: Any
        if output_type == "pil":
            results = [list(video) for video in zip(*made, strict=True)]
        elif output_type == "np":
            results = np.stack(made, axis=1)
        else:
            results = torch.stack(made, dim=2 if output_type == "latent" else 1)
        return SanaVideoPipelineOutput(results) if return_dict else (results,)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        timesteps: Sequence[float] = TIMESTEPS,
        num_videos_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        base_chunk_frames: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        motion_score: int | None = None,
        chunk_prompts: ChunkPrompts | None = None,
        max_latent_frames: int | None = None,
    ) -> Iterator[Any]:
        """Generates videos frame by frame, in memory that does not depend on their length.

        A chunk is made when its first frame is asked for, so whoever stops asking stops the work.

        Args:
            prompt: one or several texts.
            timesteps: at which the transformer is asked, descending, above 0 and at most 1000. The noise level is a
                thousandth of it. A last 0, as the authors' lists have it, is left out.
            num_videos_per_prompt: videos per prompt; they are neighbors in the result.
            height, width: pixels; by default those of `latents`, or 16:9 at the native size of the checkpoint.
            frames: F; by default those of `latents`, or 81. One more than a multiple of the frames that the
                autoencoder makes of a latent frame, 4 for Wan's: 16 times the seconds, and one.
            base_chunk_frames: latent frames of a chunk. The first one also has those that are over.
            generator: source of the noise: one for all videos, or a list with one per video.
            latents: noise to begin with, `[B, C, T, h, w]`; fresh noise is added at each later step.
            prompt_embeds: text features `[prompts, L, width]` in place of the texts.
            prompt_attention_mask: their mask `[prompts, L]`, 1 for a token.
            output_type: "pil", "np", "pt" or "latent".
            clean_caption, use_resolution_binning, max_sequence_length: as in `SanaVideoPipeline`.
            complex_human_instruction: text, or its lines, put before each prompt; None for none. The default is that
                of `SanaPipeline`, as in the authors' code.
            motion_score: as in `SanaVideoPipeline`; the authors' code uses 10.
            attention_kwargs: `{"scale": s}` sets the strength of LoRA adapters.
            chunk_prompts: prompts that change within the videos: a list with that of each chunk, in place of
                `prompt`, as in the authors' code, where the last one holds to the end; a dictionary of chunks,
                counted from 0, and the prompts from there on; or a function, which is called with the number of each
                chunk but the first when it begins, and returns a prompt, or None to leave it as it is. A prompt is a
                text for all videos, or a list with one for each of `prompt`.
            max_latent_frames: most latent frames of the videos; by default `rope_max_seq_len` of the transformer, as
                in the authors' code, 1024 for the released model. With more, positions go on as before, but the model
                was not trained for them.

        Returns:
            An iterator over frames. A frame is what is seen at that time in all videos: a list of B images, an array
            `[B, height, width, 3]` or a tensor `[B, 3, height, width]` in [0, 1], or a latent frame `[B, C, h, w]`.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        arguments = NOT_ASKED | locals()
        if isinstance(chunk_prompts, Sequence) and not isinstance(chunk_prompts, str):
            arguments["prompt"] = first_of(chunk_prompts, prompt, prompt_embeds)
            chunk_prompts = dict(enumerate(chunk_prompts[1:], start=1))
        request = VideoRequest.collect(arguments, has_vae=self.vae is not None)
        if max_latent_frames is not None:
            check_integer("max_latent_frames", max_latent_frames)
        request = self._with_frames(request, max_latent_frames, BEYOND)
        requested_size, size = self._sizes(request)
        self._check(request, size)
        self._check_parts(output_type)
        times = check_descending("timesteps", timesteps, LONGEST_TIME, TIMESTEPS)
        length = (cast(int, request.frames) - 1) // self.vae_scale_factor_temporal + 1
        chunks = self._cut(length, base_chunk_frames)

        def later(prompt: Text) -> VideoRequest:
            """The request with another prompt."""
            number = count(request)
            same = {"prompt": [prompt] * number if isinstance(prompt, str) else prompt, "latents": None}
            none = {"prompt_embeds": None, "prompt_attention_mask": None}
            made = VideoRequest.collect(arguments | same | none, has_vae=self.vae is not None)
            self._check(made, size)
            if count(made) != number:
                raise ValueError(
                    f"`chunk_prompts` must have one text for all videos, or one for each of the {number} prompts, got"
                    f" {prompt!r}."
                )
            return made

        requests = later_requests(chunk_prompts, later, len(chunks))
        made = self._latents(request, requests, size, times, chunks, max_latent_frames)
        return made if output_type == "latent" else self._frames(made, requested_size, output_type)

    def _check_parts(self, output_type: str) -> None:
        """Raises where the components cannot stream."""
        transformer = unwrap_module(self.transformer)  # it may be compiled
        if not isinstance(transformer, SanaVideoTransformer3DModel):
            cls = type(transformer)
            raise TypeError(
                "`transformer` must be a SanaVideoTransformer3DModel of diffusers_sana, which keeps a state of earlier"
                f" frames, got {cls.__module__}.{cls.__name__}. Load with `LongSanaVideoPipeline.from_pretrained`."
            )
        if self._cuda_graphs is not None:
            raise ValueError("CUDA graphs have no state of earlier frames. Call `disable_cuda_graphs()`.")
        if output_type != "latent":
            check_streaming(self.vae)

    def _cut(self, length: int, base_chunk_frames: int) -> list[int]:
        """The lengths of the chunks of `length` latent frames."""
        check_integer("base_chunk_frames", base_chunk_frames)
        if base_chunk_frames % (patch := self.transformer.config.patch_size[0]):
            raise ValueError(
                f"`base_chunk_frames` must be divisible by {patch} (`patch_size` of the transformer), got"
                f" {base_chunk_frames}."
            )
        return chunk_lengths(length, base_chunk_frames)

    @torch.no_grad()
    def _latents(
        self,
        request: VideoRequest,
        later: Callable[[int], VideoRequest | None],
        size: Size,
        times: Sequence[float],
        chunks: list[int],
        most: int | None,
    ) -> Iterator[Tensor]:
        """Denoised latent frames, `[B, C, h, w]` in fp32.

        Args:
            request: of the first chunk.
            later: that of another chunk, if its prompts are others.
            size: in pixels.
            times: of the steps.
            chunks: latent frames of each.
            most: see `max_latent_frames`.
        """
        device, frames = self._execution_device, cast(int, request.frames)
        text = self._text(request, device)
        channels, number = self.transformer.config.in_channels, len(text.mask)
        given = request.latents
        if given is not None:
            given = self.prepare_latents(number, channels, *size, frames, torch.float32, device, None, given)
        grid = [side // self.vae_scale_factor for side in size]
        most = None if most is None else most // self.transformer.config.patch_size[0]
        state, begin = SanaVideoState(most=most), 0
        try:
            with self.progress_bar(total=len(chunks) * len(times)) as bar:
                for index, length in enumerate(chunks):
                    if index and (changed := later(index)) is not None:
                        text = self._text(changed, device)
                    noise = None if given is None else given[:, :, begin : begin + length]
                    shape = (number, channels, length, *grid)
                    noise = given_or_sampled(noise, shape, "of a chunk", request.generator, device, torch.float32)
                    latents = self._denoise(noise, times, text, state, request, bar)
                    yield from latents.unbind(2)
                    begin += length
                    if begin < sum(chunks):
                        _, state = self._run(latents, 0.0, text, state, request)
        finally:  # also where nobody asks for the rest
            self.maybe_free_model_hooks()

    def _text(self, request: VideoRequest, device: torch.device) -> TextInputs:
        """The prompts of some chunks, projected once for all steps."""
        texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=False, device=device)
        return project_texts(self.transformer, *both_texts(texts, False), False, request.attention_kwargs)

    def _denoise(
        self,
        noise: Tensor,
        times: Sequence[float],
        text: TextInputs,
        state: SanaVideoState,
        request: VideoRequest,
        progress_bar: Any,
    ) -> Tensor:
        """A chunk `[B, C, t, h, w]` in fp32, from noise and the state of the chunks before it."""

        def predict(latents: Tensor, time: float) -> Tensor:
            velocity, _ = self._run(latents, time, text, state, request)
            progress_bar.update()
            return velocity.float()

        levels = [time / LONGEST_TIME for time in times]
        latents = sample_by_renoising(predict, noise, times, levels, request.generator)
        advice = "Its weights may be damaged, or its LoRA too large."
        check_computed("transformer", "latents", latents, self.transformer.dtype, advice)
        return latents

    def _run(
        self, latents: Tensor, time: float, text: TextInputs, state: SanaVideoState, request: VideoRequest
    ) -> tuple[Tensor, SanaVideoState]:
        """The velocity of a chunk `[B, C, t, h, w]`, and the state after it."""
        with exclusive(self.transformer):
            return self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                timestep=torch.full((len(latents),), time, device=latents.device),
                attention_kwargs=request.attention_kwargs,
                return_dict=False,
                state=state,
                **text.arguments,
            )

    @torch.no_grad()
    def _frames(self, latents: Iterator[Tensor], size: Size, output_type: str) -> Iterator[Any]:
        """Frames of `size` from latent frames, as `stream` returns them."""
        for videos in decode_stream(self.vae, latents, self.vae_scale_factor):
            shown = self._postprocess(videos.float(), size, output_type)
            for index in range(videos.shape[2]):
                yield [video[index] for video in shown] if output_type == "pil" else shown[:, index]


def count(request: VideoRequest) -> int:
    """The number of prompts."""
    if request.prompt_embeds is not None:
        return len(request.prompt_embeds)
    return len(request.prompt) if isinstance(request.prompt, list) else 1


def first_of(chunk_prompts: Sequence[Text], prompt: Text | None, prompt_embeds: Tensor | None) -> Text:
    """The prompt of the first chunk, of a list that has those of all.

    Raises:
        ValueError: there is none, or another.
    """
    if prompt is not None or prompt_embeds is not None:
        raise ValueError(
            "`prompt` must be left out where `chunk_prompts` is a list, which has the first one. For changes of"
            ' `prompt`, give a dictionary such as {3: "at night"}.'
        )
    if not chunk_prompts:
        raise ValueError("`chunk_prompts` must have a prompt for each chunk, got an empty list.")
    return chunk_prompts[0]


def later_requests(
    chunk_prompts: Any, make: Callable[[Text], VideoRequest], chunks: int
) -> Callable[[int], VideoRequest | None]:
    """The request of a chunk, by its number, if it is another than that of the chunk before.

    Args:
        chunk_prompts: a dictionary, a function or None.
        make: the request with a prompt.
        chunks: how many there are.

    Raises:
        TypeError, ValueError: naming `chunk_prompts`.
    """
    if chunk_prompts is None:
        return lambda index: None
    if callable(chunk_prompts):

        def ask(index: int) -> VideoRequest | None:
            prompt = chunk_prompts(index)
            return None if prompt is None else make(prompt)

        return ask
    if not isinstance(chunk_prompts, Mapping):
        raise TypeError(
            "`chunk_prompts` must be a list of prompts, a dictionary of chunks and prompts, or a function, got"
            f" {chunk_prompts!r}."
        )
    for index in chunk_prompts:
        check_integer("chunk_prompts", index)
        if index >= chunks:
            raise ValueError(
                f"`chunk_prompts` must be for the {chunks} chunks of these videos, 0 to {chunks - 1}, but has one for"
                f" chunk {index}. `base_chunk_frames` is the length of a chunk in latent frames."
            )
    return {index: make(prompt) for index, prompt in chunk_prompts.items()}.get
