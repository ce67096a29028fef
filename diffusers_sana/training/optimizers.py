"""The optimisers of the training examples."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffusers_sana.training.config import check_choice


OPTIMIZERS = ("adamw", "adamw8bit")


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser of a name; each decays matrices and kernels only.

    Args:
        name: "adamw", or "adamw8bit", that of bitsandbytes, on GPUs and CPUs: its two moments take a byte each in
            place of four, in blocks of 256 numbers with a common scale (arXiv 2110.02861). Tensors of less than 4096
            numbers keep theirs in fp32.
        parameters: what to train.
        learning_rate, betas, weight_decay: of AdamW.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if name == "adamw":
        return make_adamw(parameters, learning_rate, betas, weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"`optimizer` 'adamw8bit' needs bitsandbytes ({error}). `pip install bitsandbytes`, or use 'adamw'."
        ) from error
    return AdamW8bit(decay_groups(parameters, weight_decay), lr=learning_rate, betas=betas)


def make_adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only: norm weights, biases and tables of one dimension are left alone."""
    return torch.optim.AdamW(decay_groups(parameters, weight_decay), lr=learning_rate, betas=betas, fused=True)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The groups of an optimiser: what is decayed, and what has one dimension or none and is not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
