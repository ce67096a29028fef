"""From chats, images and videos to the inputs of VILA-U, and from its outputs back."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

from diffusers_sana._compat import MultiModalData, private
from diffusers_sana.checks import check_integer
from diffusers_sana.models.vila_u.configuration_vila_u import NeverCopied
from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessorKwargs
from diffusers_sana.models.vila_u.labels_vila_u import labels_of, token_spans
from diffusers_sana.models.vila_u.media_vila_u import codes_of_images, media_in_order
from diffusers_sana.models.vila_u.prompts_vila_u import (
    ASSISTANT,
    CHAT_TEMPLATE,
    IMAGE,
    IMAGE_START,
    USER,
    VIDEO_START,
    check_tokenizer,
    encode_piece,
    expand_media,
    user_turn,
)


START_TOKENS = {"text": None, "image": IMAGE_START, "video": VIDEO_START}

# The text options of transformers' processors that this one supports. Any other is rejected, not ignored.
TEXT_OPTIONS = (
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_mm_token_type_ids",
    "return_offsets_mapping",
    "return_tensors",
    "return_text_replacement_offsets",
    "truncation",
    "verbose",
)


class VilaUProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments beyond those of all processors.

    Attributes:
        generation_mode: what the model is to generate.
        negative_prompt: the text of the unconditional rows for guidance, by default empty: one text, or one per
            prompt. For modes "image" and "video".
        wrap_image_tokens: put `<im_start>` and `<im_end>` around images in the prompt. Off by default, as in the
            official scripts; the released model was trained with and without.
        do_sample_frames: take `num_video_frames` equally spaced frames of each video, or `num_frames`, which all
            processors have for videos. False for videos that already have that many.
    """

    text_kwargs: TextKwargs
    images_kwargs: VilaUImageProcessorKwargs

    generation_mode: Literal["text", "image", "video"]
    negative_prompt: str | list[str] | None
    wrap_image_tokens: bool
    do_sample_frames: bool


class VilaUProcessor(NeverCopied, ProcessorMixin):
    """Processor of VILA-U: prompts, images and videos.

    Args:
        image_processor: a `VilaUImageProcessor`.
        tokenizer: LLaMA's with `legacy=False`, and with `<im_start>`, `<im_end>`, `<vi_start>`, `<vi_end>`, `<image>`.
        chat_template: by default the official one.
        num_image_tokens: tokens per image, T; `num_image_tokens` of the vision config.
        num_video_frames: frames per video.
        wrap_image_tokens: see `VilaUProcessorKwargs`.

    Raises:
        ValueError: a tokenizer without these tokens, or with another rule for the start of a text.
    """

    valid_processor_kwargs = VilaUProcessorKwargs  # type: ignore[assignment]  # a TypedDict with more fields

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    generation_mode = "text"
    negative_prompt = None
    do_sample_frames = True

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        num_image_tokens: int = 256,
        num_video_frames: int = 8,
        wrap_image_tokens: bool = False,
    ) -> None:
        check_tokenizer(tokenizer)
        self.num_image_tokens = num_image_tokens
        self.num_video_frames = num_video_frames
        self.wrap_image_tokens = wrap_image_tokens
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(  # type: ignore[override]  # no audio
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Makes the inputs of the model.

        Args:
            images: for the placeholders `<image>`: one, a list in the order of the placeholders, or a list for each
                prompt. PIL, array, tensor, path or URL; or codes of the vision tower, an int64 or int32 tensor
                [T, D]: then all must be codes, and `image_codes` [n, T, D] replaces `pixel_values`.
            text: one prompt or a list. In mode "text" it is used unchanged. In the other modes it is the
                output of `apply_chat_template` (it ends in "ASSISTANT:"), or the user's message, which is then put
                into the template.
            videos: for `<video>`, as `images`: a file, a folder of frames, an array [F, H, W, 3] or a list of frames.
            **kwargs: see `VilaUProcessorKwargs` and `TEXT_OPTIONS`; those of the image processor.

        Returns:
            `input_ids` and `attention_mask` [B, L], every image and frame as `num_image_tokens` times `<image>`, and
            `pixel_values` [n, 3, H, W] of all images in order, if any. For modes "image" and "video" also
            `negative_input_ids` and `negative_attention_mask` [B, L'] for guidance: the prompt without its words.
            With `return_mm_token_type_ids` also `mm_token_type_ids` [B, L], 1 at image tokens.

        Raises:
            ValueError: images and placeholders that do not match, an unknown mode, something that is not an image, an
                option of transformers' processors that this one does not support.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError("`audio` must be None: VILA-U does not support audio.")
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r}.")
        if "padding_side" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding_side", "left")  # whatever the tokenizer says: the model generates on the right
        options: dict[str, Any] = private(self, "_merge_kwargs")(
            tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        self._check_options(options)
        mode = options["generation_mode"]
        if mode not in START_TOKENS:
            raise ValueError(f"`generation_mode` must be one of {tuple(START_TOKENS)}, got {mode!r}.")
        negatives = self._negative_texts(texts, options["negative_prompt"], mode)
        if mode != "text":
            texts = [self._open(item, mode) for item in texts]

        data: dict[str, Any] = {}
        if pixels := self._pixels(texts, images, videos, options):
            data |= pixels
        of_text = options["text_kwargs"]

        def is_wanted(name: str) -> bool:
            return bool(of_text.get(name) or options.get(name))

        data |= self._rows(texts, options)
        if of_text.get("return_offsets_mapping"):
            data["offset_mapping"] = self._offsets(texts, data["attention_mask"], options)
        if is_wanted("return_text_replacement_offsets"):
            data["text_replacement_offsets"] = [self._expand(text, options)[1] for text in texts]
        if is_wanted("return_mm_token_type_ids"):
            types = {"mm_token_type_ids": self.create_mm_token_type_ids(data["input_ids"])}
            data |= BatchFeature(types, tensor_type=of_text.get("return_tensors"))
        if negatives:
            data |= {f"negative_{key}": value for key, value in self._rows(negatives, options).items()}
        if of_text.get("return_attention_mask") is False:
            data = {name: value for name, value in data.items() if not name.endswith("attention_mask")}
        return BatchFeature(data)

    def apply_chat_template(  # type: ignore[override]  # two arguments more
        self,
        conversation: Any,
        chat_template: str | None = None,
        generation_mode: str | None = None,
        negative_prompt: str | list[str] | None = None,
        output_labels: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Formats a chat, or a list of chats, as text or (`tokenize=True, return_dict=True`) as inputs of the model.

        Args:
            conversation: messages `{"role": ..., "content": ...}`. Content is a string or a list of parts
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`, `{"type": "video", "video": ...}`.
            chat_template: instead of the processor's.
            generation_mode, negative_prompt: see `VilaUProcessorKwargs`. Modes "image" and "video" open the
                assistant's turn automatically.
            output_labels: also return `labels` [B, L] for training: the assistant tokens, images included, and -100
                elsewhere. `return_assistant_tokens_mask` returns the same as a mask.
            processor_kwargs: for `__call__`.
            **kwargs: those of `ProcessorMixin.apply_chat_template`.

        Raises:
            ValueError: labels for a chat without an answer, or without tokenization.
        """
        options = dict(processor_kwargs or {})
        named = {"generation_mode": generation_mode, "negative_prompt": negative_prompt}
        options |= {key: value for key, value in named.items() if value is not None}
        is_text = options.get("generation_mode", "text") == "text"
        if not is_text:
            kwargs["add_generation_prompt"] = True
        if not output_labels:
            return super().apply_chat_template(conversation, chat_template, processor_kwargs=options, **kwargs)
        if not (is_text and kwargs.get("tokenize") and kwargs.get("return_dict")):
            raise ValueError("`output_labels` needs `tokenize=True, return_dict=True` and no `generation_mode`.")
        has_mask = kwargs.pop("return_assistant_tokens_mask", False)
        batch: Any = super().apply_chat_template(
            conversation, chat_template, processor_kwargs=options, return_assistant_tokens_mask=True, **kwargs
        )
        masks = batch["assistant_masks"] if has_mask else batch.pop("assistant_masks")
        batch["labels"] = labels_of(batch["input_ids"], masks)
        return batch

    def postprocess(self, images: Any, **kwargs: Any) -> Any:
        """Decoded pixels as images, see `VilaUImageProcessor.postprocess`."""
        return self.image_processor.postprocess(images, **kwargs)

    def post_process_multimodal_output(  # type: ignore[override]
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Output of the model as the "any-to-any" pipeline expects it.

        Args:
            generated_outputs: token ids for mode "text" (also None), otherwise pixels from `decode_image_tokens`.
            skip_special_tokens: for text.
            generation_mode: "text", "image" or "video".
            **kwargs: for the tokenizer's `batch_decode`, or for `postprocess`.

        Returns:
            A list of texts, of images, or of lists of frames.

        Raises:
            ValueError: an unknown mode.
        """
        mode = generation_mode or "text"
        if mode not in START_TOKENS:
            raise ValueError(f"`generation_mode` must be one of {tuple(START_TOKENS)}, got {mode!r}.")
        if mode == "text":
            return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return self.postprocess(generated_outputs, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that the processor returns."""
        of_text = ["input_ids", "attention_mask"]
        return [*of_text, *(f"negative_{name}" for name in of_text), "pixel_values", "image_codes"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """The number of placeholders for media of given sizes, which servers request before they have the media.

        Args:
            image_sizes: height and width of each image, which always has `num_image_tokens`.
            video_sizes: frames, height and width of each video, of which `num_video_frames` or `num_frames` are used.
            kwargs: those of `__call__`, of which `num_frames` changes the result.
        """
        counts = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.num_image_tokens] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            counts["num_video_tokens"] = [self._num_frames(kwargs) * self.num_image_tokens] * len(video_sizes)
        return MultiModalData(**counts)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Raises for `options`, as returned by `_merge_kwargs`, that the processor does not support."""
        of_text = options["text_kwargs"]
        ignored = {name for name, value in of_text.items() if name not in TEXT_OPTIONS and value not in (None, False)}
        supported = of_text | options["images_kwargs"]  # which also apply to frames
        for modality in ("videos_kwargs", "audio_kwargs"):
            for name, value in options[modality].items():
                default = options.get(name, getattr(self.image_processor, name, False))
                if name != "num_frames" and value is not None and value != supported.get(name, default):
                    ignored.add(name)
        if ignored:
            raise ValueError(
                f"`{'`, `'.join(sorted(ignored))}` must be left out: this processor does not support it. Text options"
                f" are {TEXT_OPTIONS}; frames use the options of images, `do_sample_frames` and"
                " `num_frames`."
            )

    def _open(self, text: str, mode: str) -> str:
        """The prompt up to the token after which the model generates codes."""
        prompt = text if text.endswith(ASSISTANT) else user_turn(text)
        return f"{prompt} {START_TOKENS[mode]}"

    def _negative_texts(self, texts: list[str], negative: str | list[str] | None, mode: str) -> list[str]:
        if mode == "text":
            if negative is not None:
                raise ValueError("`negative_prompt` must be None in mode 'text', which has no guidance.")
            return []
        negatives = [negative or ""] * len(texts) if negative is None or isinstance(negative, str) else negative
        if len(negatives) != len(texts):
            raise ValueError(f"`negative_prompt` must have one text per prompt ({len(texts)}), got {len(negatives)}.")
        heads = [text.partition(USER)[0] if text.endswith(ASSISTANT) else None for text in texts]
        turns = [
            user_turn(item) if head is None else user_turn(item, head)
            for item, head in zip(negatives, heads, strict=True)
        ]
        return [self._open(turn, mode) for turn in turns]

    def _pixels(self, texts: list[str], images: Any, videos: Any, options: dict[str, Any]) -> dict[str, Any]:
        """`pixel_values` or `image_codes` of all media, in the order of their placeholders."""
        ordered = media_in_order(
            texts, images, videos, self._num_frames(options["videos_kwargs"]), options["do_sample_frames"]
        )
        if not ordered:
            return {}
        if codes := codes_of_images(ordered, self.num_image_tokens):
            return {"image_codes": torch.stack(codes)}
        fetch = self.image_processor.fetch_images
        loaded = [fetch(str(item)) if isinstance(item, str | Path) else item for item in ordered]
        of_images = options["images_kwargs"] | {"return_tensors": options["text_kwargs"].get("return_tensors")}
        return dict(self.image_processor(loaded, **of_images))

    def _rows(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Ids and mask of a batch of prompts."""
        of_text = options["text_kwargs"]
        rows = []
        for text in texts:
            pieces = self._expand(text, options)[0].split(IMAGE)
            first, *others = (encode_piece(self.tokenizer, piece) for piece in pieces)
            row = [self.tokenizer.bos_token_id, *first] if of_text.get("add_special_tokens", True) else first
            for piece in others:
                row += [self.image_token_id] * self.num_image_tokens + piece
            rows.append(row)
        longest, limit = max(map(len, rows)), of_text.get("max_length") or self.tokenizer.model_max_length
        if of_text.get("truncation") not in (None, False, "do_not_truncate") and longest > limit:
            raise ValueError(
                f"`truncation` must be off for a prompt of {longest} positions where {limit} are allowed: it could cut"
                " an image. Shorten the text instead."
            )
        names = ["padding", "pad_to_multiple_of", "padding_side", "return_tensors"]
        names += ["max_length"] if of_text.get("padding") == "max_length" else []
        padding = {name: of_text[name] for name in names if name in of_text}
        return dict(self.tokenizer.pad({"input_ids": rows}, return_attention_mask=True, **padding))

    def _expand(self, text: str, options: dict[str, Any]) -> tuple[str, list[dict[str, tuple[int, int]]]]:
        return expand_media(text, self._num_frames(options["videos_kwargs"]), options["wrap_image_tokens"])

    def _num_frames(self, of_videos: dict[str, Any]) -> int:
        given = of_videos.get("num_frames")
        if given is None:
            return self.num_video_frames
        check_integer("num_frames", given)
        return int(given)

    def _offsets(self, texts: list[str], masks: Any, options: dict[str, Any]) -> list[list[tuple[int, int]]]:
        """The character spans of the tokens of a batch in the expanded texts."""
        expanded = [self._expand(text, options)[0] for text in texts]
        return [
            token_spans(self.tokenizer, text, self.num_image_tokens, mask)
            for text, mask in zip(expanded, masks, strict=True)
        ]
