"""Structured latents of DC-AE 1.5 (arXiv 2508.00413): early channels carry the object, later ones the detail.

Each step keeps only a random number of leading latent channels before the decoder; the loss does not change. It pays
for many channels (128); with 32 the paper finds the plain autoencoder slightly better.
"""

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


def mask_latents(model: ModelMixin) -> None:
    """Make an autoencoder's decoder multiply its latents with its new buffer `latent_mask`, all ones `[1, C, 1, 1]`.

    The buffer stays outside the state dict; the saved model is an ordinary one.
    """
    mask = torch.ones(1, model.config.latent_channels, 1, 1)
    model.decoder.register_buffer("latent_mask", mask, persistent=False)
    model.decoder.register_forward_pre_hook(lambda decoder, arguments: (arguments[0] * decoder.latent_mask,))


def draw_latent_prefix(mask: Tensor, step: int) -> None:
    """Let `mask` keep the first c' channels, c' drawn uniformly from step, 2 step, ..., all channels."""
    channels = mask.shape[1]
    kept = min(step * int(torch.randint(1, -(-channels // step) + 1, ())), channels)
    mask[:, :kept], mask[:, kept:] = 1, 0
