"""Layer norms with the modulation of adaLN (DiT, arXiv 2212.09748).

The norms are stock `nn.LayerNorm`s, as in diffusers. What a user hooks to one, or puts in its place, sees what it
would see there: it gets the hidden states and returns their norm. Without that, the norm, its modulation and the
addition before it are one operation.

Legend: B batch, N tokens, D width, G groups of neighboring tokens with a modulation each, such as frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.kernels.gated_residual_norm import gated_residual_norm
from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm
from diffusers_sana.models.layers import is_plain


class SanaModulatedNorm(nn.Module):
    """The last norm of a transformer, modulated by the timestep embedding.

    Args:
        dim: D.
        elementwise_affine: weight and bias in the norm.
        eps: of the norm.
    """

    def __init__(self, dim: int, elementwise_affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=elementwise_affine, eps=eps)

    def forward(self, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
        """Maps `[B, N, D]` to the same shape.

        Args:
            hidden_states: `[B, N, D]`.
            temb: timestep embedding `[B or 1, D]`, or `[B or 1, G, D]`.
            scale_shift_table: shift and scale `[2, D]`, to which it is added.
        """
        modulation = scale_shift_table + temb.flatten(0, -2)[:, None].to(scale_shift_table.device)
        shift, scale = modulation.chunk(2, dim=1)  # [B * G or 1, 1, D]
        return modulated_norm(self.norm, hidden_states, shift, scale)


def modulated_norm(norm: Any, hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`norm(hidden_states) * (1 + scale) + shift`.

    Args:
        norm: an `nn.LayerNorm`, or a module that is called like one.
        hidden_states: `[B, N, D]`.
        shift, scale: `[B * G or 1, 1, D]`.

    Returns:
        `[B, N, D]`.
    """
    groups = _grouped(hidden_states, shift)
    if _is_plain(norm, hidden_states):
        out = modulated_layer_norm(groups, *_with_affine(norm, shift, scale), eps=norm.eps)
    else:
        out = torch.addcmul(shift, _grouped(norm(hidden_states), shift), 1 + scale).to(hidden_states.dtype)
    return out.view_as(hidden_states)


def residual_norm(
    norm: Any, residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of `residual` and `gate * branch`, and its `modulated_norm`.

    Args:
        norm, shift, scale: of `modulated_norm`.
        residual, branch: `[B, N, D]`.
        gate: `[B * G or 1, 1, D]`; None for a gate of ones.

    Returns:
        `[B, N, D]` each.
    """
    groups, branches = _grouped(residual, shift), _grouped(branch, shift)
    if _is_plain(norm, residual):
        total, out = gated_residual_norm(groups, branches, gate, *_with_affine(norm, shift, scale), eps=norm.eps)
        return total.view_as(residual), out.view_as(residual)
    total = (groups + branches).to(residual.dtype) if gate is None else gated_residual(groups, branches, gate)
    total = total.view_as(residual)
    return total, modulated_norm(norm, total, shift, scale)


def _is_plain(norm: Any, hidden_states: Tensor) -> bool:
    """Whether the operations that know the norm of the last axis may take the place of a module."""
    return is_plain(norm) and norm.normalized_shape == hidden_states.shape[-1:]


def _grouped(x: Tensor, modulation: Tensor) -> Tensor:
    """`[B, N, D]` to `[B * G, N / G, D]`, a row for each of the modulation if it has more than one."""
    return x.reshape(max(len(x), len(modulation)), -1, x.shape[-1])


def _with_affine(norm: Any, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm without weight and bias that does the same."""
    if norm.bias is not None:
        shift = torch.addcmul(shift, norm.bias, 1 + scale)
    if norm.weight is not None:
        scale = norm.weight * (1 + scale) - 1
    return scale, shift
