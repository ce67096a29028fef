"""`generate` of VILA-U: text as in any model of transformers, images and videos in a separate loop.

The loop has one round per image token. In each, the depth transformer generates the D codes of the token, with
guidance at every code, and the language model reads the token. Nothing is read on the host in between, so the rounds
can be queued ahead of an accelerator and captured in CUDA graphs.

Legend: N samples, R rows (2N with guidance: conditional, then unconditional), P prompt length, T tokens per image,
D codes per image token, K codebook entries, H width of the language model.
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
from diffusers_sana.checks import NotFiniteError
from diffusers_sana.models.vila_u.batching_vila_u import (
    CandidatesWithoutPlaceholder,
    LogitsProcessorsWithoutPlaceholder,
    cache_for,
    heal_last_tokens,
    repeat_features,
    rows_of_samples,
    scales_of_samples,
    scales_of_tokens,
    stack_rows,
    without_placeholder,
)
from diffusers_sana.models.vila_u.depth_vila_u import VilaUDepthCache
from diffusers_sana.models.vila_u.sampling_vila_u import CodeNoise, VisualSampling, guide, visual_option


logger = logging.get_logger(__name__)

GUIDANCE_SCALE = 3.0  # the best value in the paper, table 9
Generators = torch.Generator | Sequence[torch.Generator] | None


class VilaUGenerationMixin(GenerationMixin):
    """`generate` of `VilaUForConditionalGeneration`."""

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
        """Generates text, images or videos.

        Args:
            inputs: `[B, P]`, the same as `input_ids`: prompts, padded on the left.
            generation_config: for text as in transformers. For images, its entries `visual_guidance_scale`,
                `visual_guidance_interval`, `visual_do_sample`, `visual_temperature`, `visual_top_k` and `visual_top_p`
                are the defaults of the arguments without "visual_"; the other entries do not affect images.
            generation_mode: "text", "image" or "video".
            image_codes: `[n, T, D]`, codes of the images in the prompts, instead of `pixel_values`.
            kwargs: for "text", those of `transformers.GenerationMixin.generate`; else those of `generate_codes`, for
                "video" `num_frames`, and `return_dict_in_generate`.

        Returns:
            For "text", what transformers returns. For "image" codes `[N, T, D]`, for "video" `[N, F, T, D]`, which
            `decode_image_tokens` turns into pixels; with `return_dict_in_generate` they are its `sequences`.

        Raises:
            ValueError: an unknown mode, an option that is not supported for prompts with images, or see
                `generate_codes`.
        """
        if image_codes is not None:
            kwargs["mm_encoder_outputs"] = {
                "image": self.get_image_features(image_codes=image_codes, return_dict=True)
            }
        if generation_mode == "text":
            inputs = self._prepare_images(inputs, generation_config or self.generation_config, kwargs)
            return super().generate(inputs, generation_config=generation_config, **kwargs)
        if generation_mode not in ("image", "video"):
            raise ValueError(f'`generation_mode` must be "text", "image" or "video", got {generation_mode!r}')
        if inputs is not None:
            kwargs["input_ids"] = inputs
        kwargs.pop(
            "max_new_tokens", None
        )  # the grid determines the length, but the "any-to-any" pipeline always passes it
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
        """As in transformers, but an assistant model, which gets no images there, reads the prompt first."""
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
        """Applies token healing to prompts with images, which transformers would decode to text and encode again.

        Args:
            inputs: `[B, P]`, or None where `kwargs` have `input_ids`.
            config: gives `token_healing` where `kwargs` do not.
            kwargs: of `generate`; modified.

        Returns:
            `inputs`.

        Raises:
            ValueError: an option that is only supported for prompts without images.
        """
        negative = kwargs.get("negative_prompt_ids")
        if negative is not None and self.model.is_placeholder(negative).any():
            raise ValueError("`negative_prompt_ids` must be text only, got an image")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is None or not self.model.is_placeholder(ids).any():
            return inputs
        if kwargs.get("assistant_tokenizer") is not None:
            raise ValueError(
                "`assistant_tokenizer` must be None for prompts with images, which cannot be encoded again as text."
                " Use an `assistant_model` with the same tokenizer."
            )
        if not kwargs.get("token_healing", config.token_healing):
            return inputs
        tokenizer = kwargs.get("tokenizer")
        if tokenizer is None:
            raise ValueError("`token_healing` needs `tokenizer`: pass that of the processor")
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
        num_images: int,
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
        """Generates the codes of `num_images` images, one after the other, after each prompt.

        Args:
            num_images: images per sample; a video is several images with nothing between them.
            input_ids, attention_mask: `[B, P]`, prompts that end with the start token, padded on the left. Without a
                mask, leading pad tokens are padding.
            negative_input_ids, negative_attention_mask: `[B or 1, P']`, the unconditional prompt: the prompt without
                its words, or with others, as returned by the processor. Not needed if all scales are 1.
            pixel_values: `[n, 3, H, W]`, images in the prompts.
            mm_encoder_outputs: instead of pixels, {"image": result of `get_image_features`}.
            guidance_scale: one, or one per prompt; 1 for no guidance. Default 3.
            guidance_interval: start and end of guidance, as fractions of the tokens of an image. Default (0, 1), all.
            do_sample, temperature, top_k, top_p: see `VisualSampling`; for their defaults also `generate`.
            num_return_sequences: samples per prompt, adjacent in the result.
            generator: None, one, or one per sample. In the last case a sample's noise does not depend on the rest of
                the batch. If it is on another device than the model, the noise is copied.
            past_key_values: an empty cache to use.
            cache_implementation: "static" or "dynamic", without `past_key_values`.
            compile_config: compile the rounds with it; the result is kept for later calls with the same config.
            callback_on_cell: called with the index of each image token and its codes `[N, D]`.
            progress_bar: whether to show one.

        Returns:
            Codes `[N, num_images, T, D]`, N = B * num_return_sequences.

        Raises:
            ValueError: naming the argument.
        """
        if num_images < 1 or num_return_sequences < 1:
            counts = f"{num_images} and {num_return_sequences}"
            raise ValueError(f"`num_frames` and `num_return_sequences` must be at least 1, got {counts}")
        configs = (generation_config, self.generation_config)
        sampling = VisualSampling.from_options(
            configs, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p
        )
        guidance_scale = visual_option("guidance_scale", guidance_scale, configs, GUIDANCE_SCALE)
        interval = visual_option("guidance_interval", guidance_interval, configs, (0, 1))
        vision, depth = self.config.vision_config, self.config.depth_config
        scales = scales_of_samples(guidance_scale, len(input_ids), num_return_sequences)
        scales_by_token = scales_of_tokens(scales, interval, num_images, vision.num_image_tokens)
        pad, num_samples = self._pad, len(scales)
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, return_dict=True)}
        if mm_encoder_outputs and num_return_sequences > 1:
            mm_encoder_outputs = private(self, "_expand_multimodal_outputs")(
                input_ids, mm_encoder_outputs, num_return_sequences
            )  # type: ignore[arg-type]
        ids, mask = rows_of_samples("input_ids", input_ids, attention_mask, pad, num_samples)
        is_guided = bool((scales_by_token != 1).any())
        if is_guided:
            negative = rows_of_samples(
                "negative_input_ids", negative_input_ids, negative_attention_mask, pad, num_samples
            )
            if mm_encoder_outputs and self.model.is_placeholder(negative[0]).any():
                mm_encoder_outputs = {"image": repeat_features(mm_encoder_outputs["image"])}
            ids, mask = stack_rows(ids, negative[0], pad), stack_rows(mask, negative[1], 0)

        num_tokens = len(scales_by_token)
        cache = cache_for(past_key_values, cache_implementation, self.config, ids.shape[1] + num_tokens - 1)
        noise = CodeNoise(
            generator, (num_samples, vision.grid_size, depth.num_codebooks, depth.codebook_size), ids.device
        )
        generated = self._generate_tokens(
            ids,
            mask,
            num_tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            noise=noise if sampling.do_sample else None,
            scales_by_token=scales_by_token.to(ids.device) if is_guided else None,
            sampling=sampling,
            compile_config=compile_config,
        )
        codes = ids.new_empty(num_samples, num_tokens, depth.num_codebooks)
        for token, token_codes in enumerate(logging.tqdm(generated, total=num_tokens, disable=not progress_bar)):
            codes[:, token] = token_codes
            if callback_on_cell is not None:
                callback_on_cell(token, token_codes)
        return codes.unflatten(1, (num_images, -1))

    def _generate_tokens(
        self,
        ids: Tensor,
        mask: Tensor,
        num_tokens: int,
        mm_encoder_outputs: dict[str, Any] | None,
        cache: Cache,
        noise: CodeNoise | None,
        scales_by_token: Tensor | None,
        sampling: VisualSampling,
        compile_config: CompileConfig | None,
    ) -> Iterator[Tensor]:
        """The loop: yields the codes `[N, D]` of each image token in order. Prompts and mask are `[R, P]`.

        Raises:
            ValueError: after the last token, if logits were NaN or infinite.
        """
        positions = mask.cumsum(-1) - 1
        hidden_states = self._read(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp_min(0),
            past_key_values=cache,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        prompt, position = ids.shape[1], positions[:, -1:]
        mask = F.pad(mask, (0, num_tokens - 1))
        read_and_generate = self._compiled_round(compile_config)
        row = self.config.vision_config.grid_size  # noise is sampled for one row of image tokens at a time
        for token in range(num_tokens):
            if noise is not None and token % row == 0:
                row_noise = noise.sample()
            token_noise = None if noise is None else row_noise[:, token % row]
            scales = None if scales_by_token is None else scales_by_token[token]
            if token == 0:
                codes, inputs = self.generate_token(hidden_states, token_noise, scales, sampling)
            else:
                length = prompt + token
                mask[:, length - 1] = 1
                # A static cache has the length of the whole mask, in which future image tokens are masked.
                current_mask = mask if cache.is_compileable else mask[:, :length]
                position = position + 1
                codes, inputs = read_and_generate(inputs, current_mask, position, cache, token_noise, scales, sampling)
            yield codes
        if not bool(inputs.isfinite().all()):
            raise NotFiniteError(
                f"the model produced NaN or infinite logits in {inputs.dtype}. If that is float16, load it in "
                "bfloat16; otherwise its weights are damaged, or `guidance_scale` is too large."
            )

    def read_and_generate_token(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        noise: Tensor | None,
        scales: Tensor | None,
        sampling: VisualSampling,
    ) -> tuple[Tensor, Tensor]:
        """One round of the loop: the language model reads an image token `[R, 1, H]`, then `generate_token`."""
        hidden_states = self._read(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        return self.generate_token(hidden_states, noise, scales, sampling)

    def _read(self, **inputs: Any) -> Tensor:
        """The state of the language model at the last position, `[R, H]`."""
        return self.model(**inputs, use_cache=True).last_hidden_state[:, -1]

    def generate_token(
        self, hidden_states: Tensor, noise: Tensor | None, scales: Tensor | None, sampling: VisualSampling
    ) -> tuple[Tensor, Tensor]:
        """Generates the codes of the next image token.

        Args:
            hidden_states: `[R, H]`, of the language model, at the last position.
            noise: `[N, D, K]`, see `CodeNoise`.
            scales: `[N, 1]` if the rows are conditional and unconditional, else None.
            sampling: how to choose codes.

        Returns:
            Codes `[N, D]`, and the next input of the language model, `[R, 1, H]`. The input is NaN after logits that
            were not finite, so that a single check at the end of the loop finds them.
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
            return self.read_and_generate_token
        if getattr(self, "_compiled_for", None) != config:
            self._compiled_for = config
            self._compiled_round_function = torch.compile(self.read_and_generate_token, **config.to_dict())

        def run(*args: Any) -> tuple[Tensor, Tensor]:
            codes, inputs = self._compiled_round_function(*args)
            return codes.clone(), inputs.clone()  # the next replay of a CUDA graph overwrites them

        return run
