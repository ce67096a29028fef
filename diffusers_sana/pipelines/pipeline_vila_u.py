"""VILA-U as a pipeline of diffusers: prompts to images and videos, images and questions to answers.

Legend: N samples (prompts times images per prompt), F frames, T tokens per image, D codes per image token.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.hooks import CpuOffload
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import has_file

from diffusers_sana._compat import private, warn_if_untested
from diffusers_sana.checkpoint_files import HUB_ARGUMENTS
from diffusers_sana.checks import check_computed, check_integer, check_texts
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.media_vila_u import is_video
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from diffusers_sana.pipelines.loading import check_complete, check_processor, naming_damaged_files
from diffusers_sana.saving import check_components


warn_if_untested("accelerate")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class VilaUPipelineOutput(BaseOutput):
    """What `VilaUPipeline` has generated.

    Attributes:
        images: N images of the output type asked for; None for videos.
        frames: N videos; None for images.
        codes: `[N, T, D]` of images, `[N, F, T, D]` of videos.
    """

    images: Any = None
    frames: Any = None
    codes: Tensor | None = None


class _Interrupted(Exception):
    """Leaves the loop of the model where `pipe._interrupt` was set."""


class VilaUPipeline(DiffusionPipeline):
    """Images, videos and answers from VILA-U (arXiv 2409.04429).

    Args:
        model: writes codes and text, and turns codes into pixels.
        processor: makes its inputs.
    """

    model_cpu_offload_seq = "model"  # type: ignore[assignment]
    _callback_tensor_inputs = ["codes"]

    model: Any
    processor: Any
    _num_timesteps: int
    _interrupt: bool = False

    def __init__(self, model: VilaUForConditionalGeneration, processor: VilaUProcessor) -> None:
        super().__init__()
        self.register_modules(model=model, processor=processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: what `save_pretrained` wrote; or a checkpoint of transformers, with model
                and processor in one folder and no `model_index.json`.
            kwargs: those of `DiffusionPipeline.from_pretrained`; for a checkpoint of transformers `dtype`, the
                components, and those of `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            OSError: naming the file of a local folder that is missing or damaged.
            ValueError: for a checkpoint of another model.
        """
        path, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        of_hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        is_pipeline = has_file(path, cls.config_name, **of_hub) or not has_file(path, CONFIG_NAME, **of_hub)
        if folder.is_dir() and is_pipeline:
            check_complete(folder, private(cls, "_get_init_keys")(cls) - kwargs.keys())
        elif folder.is_dir() and kwargs.get("processor") is None:
            check_processor(folder)
        with naming_damaged_files(folder):
            if is_pipeline:
                return super().from_pretrained(path, **kwargs)
            return cls._from_transformers(path, of_hub, **{name: kwargs[name] for name in kwargs.keys() - of_hub})

    @classmethod
    def _from_transformers(
        cls,
        path: str,
        of_hub: dict[str, Any],
        model: VilaUForConditionalGeneration | None = None,
        processor: VilaUProcessor | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        **kwargs: Any,
    ) -> Self:
        model_type = AutoConfig.from_pretrained(path, **of_hub).model_type
        if model_type != VilaUConfig.model_type:
            raise ValueError(f"`{path}` must hold a model of type {VilaUConfig.model_type!r}, but has {model_type!r}.")
        if model is None:
            dtype: Any = kwargs.pop("dtype", torch_dtype)
            if isinstance(dtype, dict):  # by component, as diffusers has it
                dtype = dtype.get("model", dtype.get("default"))
            model = VilaUForConditionalGeneration.from_pretrained(path, dtype=dtype, **of_hub, **kwargs)
        pipe = cls(model=model, processor=processor or VilaUProcessor.from_pretrained(path, **of_hub))
        pipe.register_to_config(_name_or_path=path)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a folder; the arguments are those of diffusers.

        Raises:
            ValueError: adapters are beside the layers of the model. Nothing is written then.
        """
        check_components(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def num_timesteps(self) -> int:
        """Image tokens of one sample in the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call ends before its next image token."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        num_frames: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises TypeError or ValueError, naming the argument, where the inputs of `__call__` are wrong."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
            _check_texts(name, text)
        count = 1 if isinstance(prompt, str) else len(prompt)
        if not isinstance(negative_prompt, str | None) and len(negative_prompt) != count:
            raise ValueError(f"`negative_prompt` must be one for each of {count} prompts, got {len(negative_prompt)}.")
        check_integer("num_images_per_prompt", num_images_per_prompt)
        if num_frames is not None:
            check_integer("num_frames", num_frames)
        count *= num_images_per_prompt
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"`generator` must be one generator or a list of {count}, one per image, got {len(generator)}."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` must be names out of {self._callback_tensor_inputs}, got"
                    f" {name!r}."
                )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_frames: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> VilaUPipelineOutput | tuple:
        """Generates images or videos.

        Args:
            prompt: one or several texts.
            negative_prompt: what to steer away from: one for all prompts, or one each; None for the empty text.
            num_images_per_prompt: images, or videos, per prompt; they are neighbors in the result.
            num_frames: generate videos of so many frames; None for images.
            guidance_scale: weight of the prompt against the negative prompt, one or one for each prompt; 1 turns
                guidance off and halves the work. None: what the model says, or 3.
            do_sample, temperature, top_k, top_p: see `VisualSampling`; None: what the model says.
            generator: source of the noise: one for all samples, or a list with one each. With a list a sample's noise
                does not depend on the others.
            output_type: "pil", "np" (channels last, in [0, 1]), "pt" (channels first, in [0, 1]), or "latent" for the
                codes.
            return_dict: False for a tuple.
            callback_on_step_end: called as `callback(pipeline, step, step, tensors)` after each image token; other
                pipelines pass a timestep as the third argument. `pipeline._interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: which tensors it gets. There is `codes`, of the shape of the result;
                tokens that are still to come are copies of the last one, so `pipeline.decode(codes)` shows the
                progress. Codes cannot be replaced: the model has read them already.

        Returns:
            `VilaUPipelineOutput`, or a tuple of its images or videos and their codes. After an interruption the
            missing tokens are copies of the last one.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            num_frames,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._interrupt = False
        self._load_onto_device()

        # 1. Prompts
        inputs = self.processor(
            text=prompt,
            negative_prompt=negative_prompt,
            generation_mode="image" if num_frames is None else "video",
        ).to(self._execution_device)

        # 2. Codes, [N, F, T, D], or [N, T, D] of images
        vision, samples = self.model.config.vision_config, len(inputs["input_ids"]) * num_images_per_prompt
        leading = (samples,) if num_frames is None else (samples, num_frames)
        codes = inputs["input_ids"].new_empty(*leading, vision.num_image_tokens, vision.num_codebooks)
        by_token = codes.view(samples, -1, vision.num_codebooks)
        self._num_timesteps = by_token.shape[1]
        with self.progress_bar(total=self._num_timesteps) as progress_bar:

            def after_token(token: int, token_codes: Tensor) -> None:
                by_token[:, token:] = token_codes[:, None]  # also those to come: there is always a whole image
                progress_bar.update()
                if callback_on_step_end is not None:
                    seen = {name: codes.clone() for name in callback_on_step_end_tensor_inputs}
                    replaced = callback_on_step_end(self, token, token, seen) or {}
                    if any(value is not seen.get(name) for name, value in replaced.items()):
                        raise ValueError("`callback_on_step_end` must not replace `codes`: the model has read them.")
                if self.interrupt:
                    raise _Interrupted

            with suppress(_Interrupted):
                self.model.generate_codes(
                    num_frames or 1,
                    **inputs,
                    guidance_scale=guidance_scale,
                    do_sample=do_sample,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    num_return_sequences=num_images_per_prompt,
                    generator=generator,
                    callback_on_cell=after_token,
                )

        # 3. Pixels
        images = codes if output_type == "latent" else self.decode(codes, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, codes
        return VilaUPipelineOutput(**{"images" if num_frames is None else "frames": images}, codes=codes)

    def decode(self, codes: Tensor, output_type: str = "pil") -> Any:
        """Codes `[N, T, D]` or `[N, F, T, D]` as images or videos; `output_type` "pil", "np" or "pt"."""
        self._load_onto_device()
        # One at a time: a convolution may round differently in a batch, and equal codes must give equal images.
        pixels = self.model.decode_image_tokens(codes.to(self._execution_device), chunk_size=1)
        check_computed("model", "pixels", pixels, pixels.dtype)
        return self.processor.postprocess(pixels, output_type=output_type)

    @torch.no_grad()
    def chat(
        self,
        image: Any = None,
        question: str | list[str] | None = None,
        video: Any = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> str | list[str]:
        """Answers questions about images and videos, or text alone.

        A list in one of the first three arguments makes a batch; an argument that is no list then holds for all of it.

        Args:
            image: an image (PIL, array, tensor, path or address), or None. In a batch one, several in a list, or
                None for each question.
            question: comes after the image and the video.
            video: a file, a folder of frames, an array `[F, H, W, 3]` or a list of frames; or None.
            max_new_tokens: longest answer.
            kwargs: for `transformers.GenerationMixin.generate`, such as `do_sample` and `temperature`.

        Returns:
            The answer; of a batch a list.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        columns = {"image": image, "question": question, "video": video}
        sizes = {
            name: len(column)
            for name, column in columns.items()
            if isinstance(column, list | tuple) and not (name == "video" and is_video(column))
        }
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(f"lists must be equally long and not empty, but are {sizes}")
        _check_texts("question", question)
        if kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("`num_return_sequences` must be 1; for several answers, repeat the question.")
        batch = max(sizes.values(), default=1)
        rows = zip(*(column if name in sizes else [column] * batch for name, column in columns.items()), strict=True)
        self._load_onto_device()
        inputs = self.processor.apply_chat_template(
            [_user_message(*row) for row in rows], add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(self._execution_device)
        written = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **kwargs)
        answers = self.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.maybe_free_model_hooks()
        answers = [answer.strip() for answer in answers]
        return answers if sizes else answers[0]

    def _load_onto_device(self) -> None:
        """`enable_model_cpu_offload` expects a call of the whole model's `forward`; here its parts are called."""
        hook = getattr(self.model, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(self.model)


def _user_message(image: Any, question: str, video: Any) -> list[dict[str, Any]]:
    """A chat of one message: images, video, question."""
    images = image if isinstance(image, list | tuple) else [image]
    parts = [{"type": "image", "image": item} for item in images if item is not None]
    if video is not None:
        parts.append({"type": "video", "video": video})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _check_texts(name: str, texts: Any) -> None:
    """One text or a list of texts."""
    items = texts if isinstance(texts, list | tuple) else [texts]
    check_texts(name, items, texts)
    if not items:
        raise ValueError(f"`{name}` must have at least one text, got an empty list.")
