"""A few pictures of one thing or style, and pictures of its class beside them (DreamBooth, arXiv 2208.12242)."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.utils.data import Dataset

from diffusers_sana._compat import warn_if_untested
from diffusers_sana.training.data.images import ImageFolder, Images


warn_if_untested("peft")


class WithPrior(Dataset):
    """As many items of the class as of the instance, each with its `loss_weight`; the fewer ones are repeated.

    Args:
        instance: items to learn, with `sizes_of_items`.
        prior: items of what is not to be forgotten.
        weight: of the loss on `prior`; that on `instance` has 1.
    """

    def __init__(self, instance: Any, prior: Any, weight: float):
        self.parts = ((instance, 1.0), (prior, weight))
        self.sizes_of_items = [self._find(index)[0].sizes_of_items[self._find(index)[1]] for index in range(len(self))]

    def _find(self, index: int) -> tuple[Any, int, float]:
        items, weight = self.parts[index % 2]
        return items, index // 2 % len(items), weight

    def __len__(self) -> int:
        return 2 * max(len(items) for items, _ in self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        items, at, weight = self._find(index)
        return items[at] | {"loss_weight": torch.tensor(weight)}


def captioned_folder(folder: str, sizes: list[tuple[int, int]], prompt: str) -> Images:
    """The images of a folder, with captions from its files, or `prompt` where there is none."""
    return with_prompt(ImageFolder(folder, sizes, captions="optional"), prompt)


def with_prompt(images: Images, prompt: str) -> Images:
    """The images, of which those without a caption have `prompt`.

    Raises:
        ValueError: there are such images, and `prompt` is empty.
    """
    for index, name in enumerate(images.names):
        images.captions[index] = images.captions[index] or prompt
        if not images.captions[index]:
            raise ValueError(f"`instance_prompt` must be given for images without a caption, such as {name}, got ''.")
    return images


def add_adapter(transformer: ModelMixin, target_modules: Sequence[str], **lora_config: Any) -> None:
    """Freeze `transformer` and put a LoRA that trains, in fp32, beside its layers.

    Args:
        transformer: a diffusers model, dense or quantized.
        target_modules: names of layers, or their ends.
        **lora_config: further arguments of PEFT's `LoraConfig`.

    Raises:
        ValueError: a target names no layer.
    """
    names = [name for name, _ in transformer.named_modules()]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names if "attn" in name or ".ff." in name})
            raise ValueError(f"`target_modules` must name layers, got {target!r}. Layers of the blocks: {ends}.")
    transformer.requires_grad_(False)
    adapter = LoraConfig(init_lora_weights="gaussian", target_modules=list(target_modules), **lora_config)
    transformer.add_adapter(adapter)
    cast_training_params(transformer, torch.float32)  # in bf16 small steps would be rounded away
