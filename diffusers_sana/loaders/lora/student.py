"""The transformer of a SANA-Sprint that was distilled as a LoRA of its teacher. Needs no PEFT: the LoRA is added."""

import os
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from diffusers_sana.loaders.lora.changes import weight_change
from diffusers_sana.loaders.lora.files import read_lora
from diffusers_sana.loaders.lora.formats import PREFIX, check_lora_fits, lora_scale
from diffusers_sana.models.transformers.sprint_student import make_student


@torch.no_grad()
def load_student(teacher: Any, lora: str | os.PathLike, **kwargs: Any) -> Any:
    """The student that was distilled as a LoRA of `teacher`, an ordinary transformer.

    Args:
        teacher: a SanaTransformer2DModel, diffusers' or ours, with the weights that the student was distilled from.
        lora: folder or Hub repository of the LoRA.
        kwargs: other arguments of `read_lora`, such as `subfolder` and `revision`.

    Returns:
        A new one of the same class, device and dtype.

    Raises:
        ValueError: `lora` is no LoRA, or one of another model.
    """
    state_dict, metadata = read_lora(str(lora), **{"weight_name": LORA_WEIGHT_NAME_SAFE} | kwargs)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        name, _, factor = key.removeprefix(PREFIX).partition(".lora_")
        factors.setdefault(name, {})[factor] = tensor
    if bad := [name for name, parts in factors.items() if parts.keys() != {"A.weight", "B.weight"}]:
        raise ValueError(f"`lora` must have the two factors of a plain LoRA, which {bad[0]!r} in {lora} has not.")
    student = make_student(teacher)
    check_lora_fits(state_dict, student)
    for name, parts in factors.items():
        weight = student.get_submodule(name).weight
        down, up = (parts[factor].flatten(1).to(weight.device, torch.float32) for factor in ("A.weight", "B.weight"))
        product = {"down": lora_scale(metadata, name, len(down)) * down, "up": up}
        weight.copy_(weight.float() + weight_change(product, weight))  # rounded once, after the sum
    return student
