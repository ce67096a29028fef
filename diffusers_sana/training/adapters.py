"""LoRA beside the layers of a model that stays as it is (arXiv 2106.09685), by PEFT."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig


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
