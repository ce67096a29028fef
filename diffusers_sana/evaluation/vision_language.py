"""Vision-language models of transformers that are asked about images: what VQAScore and captions share."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


class VisionLanguageModel:
    """A vision-language model of transformers and its processor, which has a chat template.

    Args:
        model: folder or Hub id, such as "llava-hf/llava-1.5-7b-hf".
        device, dtype: where it runs, and in what; "auto": the dtype of its files.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: torch.dtype | str = "auto"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        self.model = loaded.to(device).eval()
        self.processor: Any = AutoProcessor.from_pretrained(model)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # answers begin where requests end
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def inputs(self, images: Sequence[Image.Image], requests: Sequence[str]) -> Any:
        """The inputs of `model.generate` for a batch of images, each with its own request."""
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": request}]}]
            for image, request in zip(images, requests, strict=True)
        ]
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)  # changes the dtype of floating-point inputs only
