"""Self-attention that is switched off for some of the images, for perturbed-attention guidance (arXiv 2403.17377)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SanaPAGAttnProcessor:
    """Runs a processor on most of the batch; for the rest, each token attends to itself alone.

    What is then left of attention is `to_out(to_v(x))`. Queries and keys, their norms too, are not computed. Equal
    processors and numbers make equal objects, so that recorded or compiled code can tell whether it still applies.

    Attributes:
        processor: of a self-attention with `to_v` and `to_out`, ours or diffusers'.
        num_perturbed: images at the end of the batch that are perturbed.
    """

    processor: Any
    num_perturbed: int

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to the same shape; `kwargs` are those of `processor`."""
        intact, perturbed = hidden_states.tensor_split([-self.num_perturbed])
        out = attn.to_out[1](attn.to_out[0](attn.to_v(perturbed)))
        if out.dtype == torch.float16:  # as in `SanaLinearAttnProcessor`
            out = out.clamp(-65504, 65504)
        return torch.cat([self.processor(attn, intact, **kwargs), out])
