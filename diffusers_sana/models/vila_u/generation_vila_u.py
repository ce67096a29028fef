"""`generate` of VILA-U: text as in any model of transformers, pictures and videos by a loop of their own.

The loop has as many rounds as there are cells. In each, the depth transformer writes the D codes of a cell, guided at
every code, and the language model reads the cell. Nothing is read on the host in between, so that the rounds can be
queued ahead of an accelerator and captured in CUDA graphs.

Legend: N samples, R rows (2N with guidance: conditional, then unconditional), P prompt length, T cells of a picture, D
codes a cell, K codebook entries, H width of the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig, GenerateDecoderOnlyOutput, GenerationConfig, GenerationMixin
from transformers.utils import logging

from diffusers_sana._compat import private
from diffusers_sana.models.vila_u.batching_vila_u import (
    CandidatesWithoutPlaceholder,
    LogitsProcessorsWithoutPlaceholder,
    cache_for,
    heal_last_tokens,
    rows_of_samples,
    scales_of_cells,
    scales_of_samples,
    stack_rows,
    twice,
    without_placeholder,
)
from diffusers_sana.models.vila_u.depth_vila_u import VilaUDepthCache
from diffusers_sana.models.vila_u.sampling_vila_u import CodeNoise, VisualSampling, guide, visual_option


logger = logging.get_logger(__name__)

GUIDANCE_SCALE = 3.0  # the best of the paper, table 9
Generators = torch.Generator | Sequence[torch.Generator] | None


class VilaUGenerationMixin(GenerationMixin):
    """What `VilaUForConditionalGeneration` can write."""

    config: Any
    model: Any
    depth_transformer: Any
    get_image_features: Any
    forward: Any

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generation_mode: str = "text",
        image_codes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Writes text, pictures or videos.

        Args:
            inputs: `[B, P]`, the same as `input_ids`; prompts, padded on the left.
            generation_config: for text as in transformers. For pictures, its entries `visual_guidance_scale`,
                `visual_guidance_interval`, `visual_do_sample`, `visual_temperature`, `visual_top_k` and `visual_top_p`
                are the defaults of the arguments without "visual_"; the other entries say nothing about pictures.
            generation_mode: "text", "image" or "video".
            image_codes: `[n, T, D]`, codes of the pictures in the prompts, in place of `pixel_values`.
            kwargs: for "text", those of `transformers.GenerationMixin.generate`; else those of `generate_codes`, for
                "video" `num_frames`, and `return_dict_in_generate`.

        Returns:
            For "text", what transformers returns. For "image" codes `[N, T, D]`, for "video" `[N, F, T, D]`, which
            `decode_image_tokens` turns into pixels; with `return_dict_in_generate` they are its `sequences`.

        Raises:
            ValueError: an unknown mode; an option that prompts with images cannot have; or see `generate_codes`.
        """
        if image_codes is not None:
            kwargs["mm_encoder_outputs"] = {
                "image": self.get_image_features(image_codes=image_codes, return_dict=True)
            }
        if generation_mode == "text":
            inputs = self._prepare_images(inputs, generation_config or self.generation_config, kwargs)
            return super().generate(inputs, generation_config=generation_config, **kwargs)
        if generation_mode not in ("image", "video"):
            raise ValueError(f'`generation_mode` must be "text", "image" or "video", but is {generation_mode!r}')
        if inputs is not None:
            kwargs["input_ids"] = inputs
        kwargs.pop("max_new_tokens", None)  # the grid decides, and the pipeline "any-to-any" always passes it
        frames = kwargs.pop("num_frames", None)
        if generation_mode == "image" and frames is not None:
            raise ValueError('`num_frames` is for generation_mode="video"')
        frames = (1 if generation_mode == "image" else self.config.num_video_frames) if frames is None else frames
        is_dict = kwargs.pop("return_dict_in_generate", False)
        codes: Any = self.generate_codes(frames, generation_config=generation_config, **kwargs)
        codes = codes[:, 0] if generation_mode == "image" else codes
        return GenerateDecoderOnlyOutput(sequences=codes) if is_dict else codes

    def prepare_inputs_for_generation(  # type: ignore[override]  # transformers looks for `inputs_embeds` by name
        self,
        input_ids: Any,
        past_key_values: Cache | None = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, which never shows the images to an assistant model: here it reads the prompt first."""
        is_unread = past_key_values is not None and int(past_key_values.get_seq_length()) == 0
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration or is_unread,
            **kwargs,
        )

    def _prepare_images(
        self, inputs: Tensor | None, config: GenerationConfig, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Heals prompts with images, which transformers would decode to text and encode again.

        Args:
            inputs: `[B, P]`, or None where `kwargs` have `input_ids`; changed in the one place where they are.
            config: says `token_healing` where `kwargs` do not.
            kwargs: of `generate`; changed.

        Returns:
            `inputs`.

        Raises:
            ValueError: an option that can only be had for prompts without images.
        """
        negative = kwargs.get("negative_prompt_ids")
        if negative is not None and self.model.is_placeholder(negative).any():
            raise ValueError("`negative_prompt_ids` must be text alone, but hold an image")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is None or not self.model.is_placeholder(ids).any():
            return inputs
        if kwargs.get("assistant_tokenizer") is not None:
            raise ValueError(
                "`assistant_tokenizer` must be None where the prompt has images, which are no text to encode again."
                " Take an `assistant_model` with the same tokenizer."
            )
        if not kwargs.get("token_healing", config.token_healing):
            return inputs
        tokenizer = kwargs.get("tokenizer")
        if tokenizer is None:
            raise ValueError("`token_healing` needs `tokenizer`, the processor's")
        if (pixel_values := kwargs.pop("pixel_values", None)) is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values, return_dict=True)}
        _, mask = rows_of_samples("input_ids", ids, kwargs.get("attention_mask"), self._pad, len(ids))
        read = self.forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            mm_encoder_outputs=kwargs.get("mm_encoder_outputs"),
            use_cache=False,
            logits_to_keep=2,
        )
        healed = heal_last_tokens(ids, read.logits[:, 0], tokenizer, self.config.image_token_id)
        kwargs["token_healing"] = False
        if inputs is None:
            kwargs["input_ids"] = healed
        return None if inputs is None else healed

    def _get_logits_processor(
        self, *args: Any, encoder_input_ids: Any = None, **kwargs: Any
    ) -> LogitsProcessorsWithoutPlaceholder:
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:  # else embeddings
            encoder_input_ids = without_placeholder(encoder_input_ids, self.config.image_token_id, self._pad)
        processors = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        return LogitsProcessorsWithoutPlaceholder(processors, self.config.image_token_id, self._pad)

    def _get_candidate_generator(self, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        if generation_config.prompt_lookup_num_tokens is None:
            return generator
        return CandidatesWithoutPlaceholder(generator, self.config.image_token_id, self._pad)

    @property
    def _pad(self) -> int:
        return self.config.text_config.pad_token_id or 0

    @torch.no_grad()
    def generate_codes(
        self,
        num_pictures: int,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        guidance_interval: Sequence[float] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_return_sequences: int = 1,
        generator: Generators = None,
        past_key_values: Cache | None = None,
        cache_implementation: str = "static",
        compile_config: CompileConfig | None = None,
        callback_on_cell: Callable[[int, Tensor], Any] | None = None,
        progress_bar: bool = False,
    ) -> Tensor:
        """Writes the codes of `num_pictures` pictures, one after the other, after each prompt.

        Args:
            num_pictures: a video is several, without anything between them.
            input_ids, attention_mask: `[B, P]`, prompts that end with the start token, padded on the left. Without a
                mask, leading pad tokens are padding.
            negative_input_ids, negative_attention_mask: `[B or 1, P']`, what to guide away from: the prompt without
                its words, or with others. The processor makes them. Not needed where no scale differs from 1.
            pixel_values: `[n, 3, H, W]`, pictures in the prompts.
            mm_encoder_outputs: the same as `get_image_features` returns it, {"image": ...}.
            guidance_scale: one, or one for each prompt: 1 for none. Default 3.
            guidance_interval: from which to which share of its cells a picture is guided. Default (0, 1), all.
            do_sample, temperature, top_k, top_p: see `VisualSampling`; for their defaults also `generate`.
            num_return_sequences: samples of each prompt, beside each other in the result.
            generator: None, one, or one for each sample. With the latter a sample's noise does not depend on which
                others are made with it. On another device than the model, the noise is copied, which waits.
            past_key_values: an empty cache to use, instead of
            cache_implementation: "static" or "dynamic".
            compile_config: compile the rounds with it; kept for later calls with the same one.
            callback_on_cell: called with the number of each cell and its codes `[N, D]`.
            progress_bar: show one.

        Returns:
            Codes `[N, num_pictures, T, D]`, N = B * num_return_sequences.

        Raises:
            ValueError: naming the argument.
        """
        if num_pictures < 1 or num_return_sequences < 1:
            counts = f"{num_pictures} and {num_return_sequences}"
            raise ValueError(f"`num_frames` and `num_return_sequences` must be 1 or more, but are {counts}")
        configs = (generation_config, self.generation_config)
        sampling = VisualSampling.from_options(
            configs, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p
        )
        guidance_scale = visual_option("guidance_scale", guidance_scale, configs, GUIDANCE_SCALE)
        interval = visual_option("guidance_interval", guidance_interval, configs, (0, 1))
        vision, depth = self.config.vision_config, self.config.depth_config
        scales = scales_of_samples(guidance_scale, len(input_ids), num_return_sequences)
        scales_by_cell = scales_of_cells(scales, interval, num_pictures, vision.num_image_tokens)
        pad, samples = self._pad, len(scales)
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, return_dict=True)}
        if mm_encoder_outputs and num_return_sequences > 1:
            mm_encoder_outputs = private(self, "_expand_multimodal_outputs")(
                input_ids, mm_encoder_outputs, num_return_sequences
            )  # type: ignore[arg-type]
        ids, mask = rows_of_samples("input_ids", input_ids, attention_mask, pad, samples)
        is_guided = bool((scales_by_cell != 1).any())
        if is_guided:
            others = rows_of_samples("negative_input_ids", negative_input_ids, negative_attention_mask, pad, samples)
            if mm_encoder_outputs and self.model.is_placeholder(others[0]).any():
                mm_encoder_outputs = {"image": twice(mm_encoder_outputs["image"])}
            ids, mask = stack_rows(ids, others[0], pad), stack_rows(mask, others[1], 0)

        cells = len(scales_by_cell)
        cache = cache_for(past_key_values, cache_implementation, self.config, ids.shape[1] + cells - 1)
        noise = CodeNoise(generator, (samples, vision.grid_size, depth.num_codebooks, depth.codebook_size), ids.device)
        written = self._write_cells(
            ids,
            mask,
            cells,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            noise=noise if sampling.do_sample else None,
            scales_by_cell=scales_by_cell.to(ids.device) if is_guided else None,
            sampling=sampling,
            compile_config=compile_config,
        )
        codes = ids.new_empty(samples, cells, depth.num_codebooks)
        for cell, of_cell in enumerate(logging.tqdm(written, total=cells, disable=not progress_bar)):
            codes[:, cell] = of_cell
            if callback_on_cell is not None:
                callback_on_cell(cell, of_cell)
        return codes.unflatten(1, (num_pictures, -1))

    def _write_cells(
        self,
        ids: Tensor,
        mask: Tensor,
        cells: int,
        mm_encoder_outputs: dict[str, Any] | None,
        cache: Cache,
        noise: CodeNoise | None,
        scales_by_cell: Tensor | None,
        sampling: VisualSampling,
        compile_config: CompileConfig | None,
    ) -> Iterator[Tensor]:
        """The loop: yields the codes `[N, D]` of cell after cell. Prompts and mask are `[R, P]`.

        Raises:
            ValueError: after the last cell, where logits were NaN or infinite.
        """
        positions = mask.cumsum(-1) - 1
        hidden_states = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            mm_encoder_outputs=mm_encoder_outputs,
        ).last_hidden_state[:, -1]
        prompt, position = ids.shape[1], positions[:, -1:]
        mask = F.pad(mask, (0, cells - 1))
        read_and_write = self._compiled_round(compile_config)
        row = self.config.vision_config.grid_size  # of cells: for so many at once noise is drawn
        for cell in range(cells):
            if noise is not None and cell % row == 0:
                row_noise = noise.draw()
            cell_noise = None if noise is None else row_noise[:, cell % row]
            scales = None if scales_by_cell is None else scales_by_cell[cell]
            if cell == 0:
                codes, inputs = self.write_cell(hidden_states, cell_noise, scales, sampling)
            else:
                seen = prompt + cell
                mask[:, seen - 1] = 1
                # A static cache is as long as the whole mask, in which the cells to come are masked.
                mask_seen = mask if cache.is_compileable else mask[:, :seen]
                position = position + 1
                codes, inputs = read_and_write(inputs, mask_seen, position, cache, cell_noise, scales, sampling)
            yield codes
        if not bool(inputs.isfinite().all()):
            raise ValueError(
                f"the model gave NaN or infinite logits in {inputs.dtype}. If that is float16, load it in bfloat16;"
                " else its weights are damaged, or `guidance_scale` is too large."
            )

    def read_and_write_cell(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        noise: Tensor | None,
        scales: Tensor | None,
        sampling: VisualSampling,
    ) -> tuple[Tensor, Tensor]:
        """One round of the loop: the language model reads a cell `[R, 1, H]`, then `write_cell`."""
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )
        return self.write_cell(outputs.last_hidden_state[:, -1], noise, scales, sampling)

    def write_cell(
        self, hidden_states: Tensor, noise: Tensor | None, scales: Tensor | None, sampling: VisualSampling
    ) -> tuple[Tensor, Tensor]:
        """The codes of the next cell.

        Args:
            hidden_states: `[R, H]`, of the language model, at the last position.
            noise: `[N, D, K]`, see `CodeNoise`.
            scales: `[N, 1]` where the rows are conditional and unconditional ones.
            sampling: how to choose.

        Returns:
            Codes `[N, D]`, and what the language model is to read next, `[R, 1, H]`; NaN after logits that were not
            finite, so that one look at the end of the loop finds them.
        """
        cache = VilaUDepthCache(self.config.depth_config)
        inputs, codes, entries = hidden_states, [], 0.0
        for slot in range(self.config.depth_config.num_codebooks):
            logits = guide(self.depth_transformer.step(inputs, slot, cache), scales)
            codes.append(sampling.choose(logits, None if noise is None else noise[:, slot]))
            entries = entries + self.model.vision_tower.embed_code(codes[-1]).float()
            entries = entries + 0 * logits.float().sum(-1, keepdim=True)
            inputs = (entries if scales is None else entries.repeat(2, 1)).to(hidden_states.dtype)
        return torch.stack(codes, 1), self.model.project(inputs)[:, None]

    def _compiled_round(self, config: CompileConfig | None) -> Callable[..., tuple[Tensor, Tensor]]:
        if config is None:
            return self.read_and_write_cell
        if getattr(self, "_compiled_for", None) != config:
            self._compiled_for = config
            self._compiled_read_and_write = torch.compile(self.read_and_write_cell, **config.to_dict())

        def run(*args: Any) -> tuple[Tensor, Tensor]:
            codes, inputs = self._compiled_read_and_write(*args)
            return codes.clone(), inputs.clone()  # the next run of a CUDA graph writes over them

        return run
