"""How the models with Sana's blocks take in the text.

Legend: B batch, N image tokens, L text tokens, D inner width.
"""

import os
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_sana.models.layers import takes_adapter_scale
from diffusers_sana.models.transformers.attention_sana import SanaTextState
from diffusers_sana.saving import check_saveable


@dataclass(frozen=True)
class SanaTextContext:
    """What the blocks need of the prompts, computed once by `encode_text` of the model.

    A snapshot of the weights: make a new one after loading, scaling or removing an adapter, changing an attention
    processor, or a training step.

    Attributes:
        states: one entry a block.
        attention_mask: as in `SanaTransformerBlock.forward`; None when no text token is masked.
        batch_size: B.
    """

    states: tuple[Tensor | SanaTextState, ...]
    attention_mask: Tensor | None
    batch_size: int

    def rows(self, start: int, stop: int) -> "SanaTextContext":
        """The same for some of the prompts, without a copy."""
        state = self.states[0]
        num_single = self.batch_size - len(state.key) if isinstance(state, SanaTextState) else 0
        rest = slice(max(start - num_single, 0), max(stop - num_single, 0))

        def of_state(state: Tensor | SanaTextState) -> Tensor | SanaTextState:
            if isinstance(state, Tensor):
                return state[rest]
            constant = state.constant[start:stop] if state.constant is not None and start < num_single else None
            return SanaTextState(state.key[rest], state.value[rest], constant)

        mask = None if self.attention_mask is None else self.attention_mask[rest]
        return SanaTextContext(tuple(map(of_state, self.states)), mask, stop - start)

    def chunk(self, chunks: int, dim: int = 0) -> tuple["SanaTextContext", ...]:
        """Equal parts of the batch, like `Tensor.chunk`: so FasterCache takes the conditional half of its inputs."""
        size = self.batch_size // chunks
        return tuple(self.rows(start, start + size) for start in range(0, self.batch_size, size))


def attendable_tokens(mask: Tensor) -> Tensor:
    """Boolean text mask `[B, L]` (True: attend) of a 0/1 mask.

    A row without any valid token attends to all of its tokens, as in diffusers: a softmax needs at least one key.
    """
    mask = mask.bool()
    return mask | ~mask.any(dim=1, keepdim=True)


class SanaTextMixin:
    """The text's side of a model with `caption_projection`, `caption_norm` and `transformer_blocks`."""

    caption_projection: Any
    caption_norm: Any
    transformer_blocks: Any
    config: Any
    training: bool

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at the signature for what they may pass
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a folder; the arguments are those of diffusers.

        Raises:
            ValueError: adapters are beside the layers.
        """
        check_saveable(cast(nn.Module, self), type(self).__name__)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @apply_forward_hook
    @takes_adapter_scale
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> SanaTextContext:
        """Does everything that depends on the prompts alone, for `forward(..., text_context=)` over all steps.

        Masked tokens are dropped, wherever they stand. The prompts with a single token at the start of the batch (the
        empty negative prompts of classifier-free guidance) cost no attention at all. Where a block has a
        foreign attention processor or is offloaded as a group, the text is projected here and its keys and values in
        the blocks. Reads the prompt lengths on the host, so call it outside of compiled code.

        Args:
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`.
            encoder_attention_mask: as in `forward`. An additive mask drops nothing.
            attention_kwargs: as in `forward`; must be the same there.

        Returns:
            A snapshot, equal in effect to the arguments it was made of.
        """
        self._check_text(encoder_hidden_states, encoder_attention_mask, attention_kwargs)
        text, mask, num_single = encoder_hidden_states, encoder_attention_mask, 0
        blocks = self.transformer_blocks
        in_full = all(block.can_encode_text() for block in blocks)
        if mask is not None and mask.ndim == 2:
            valid = attendable_tokens(mask)
            lengths = valid.sum(dim=1).tolist()
            if in_full and not self.training:  # in training, dropout may act on the output
                num_single = next((row for row, length in enumerate(lengths) if length != 1), len(lengths))
            rest = lengths[num_single:] or [1]
            order = valid.byte().argsort(dim=1, descending=True, stable=True)[:, : max(rest)]  # valid tokens first
            text = text.take_along_dim(order[..., None], dim=1)
            mask = None if min(rest) == max(rest) else valid.take_along_dim(order, dim=1)[num_single:]

        text = self.caption_norm(self.caption_projection(text))  # [B, L, D]
        states = tuple(
            block.attn2.processor.encode_text(block.attn2, text, num_single) if in_full else text for block in blocks
        )
        return SanaTextContext(states, self._broadcast_mask(mask, text.dtype), text.shape[0])

    def _resolve_text(
        self,
        batch_size: int,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        attention_kwargs: dict[str, Any] | None,
        text_context: SanaTextContext | None,
    ) -> SanaTextContext:
        """What `forward` was told of the text, as a context for `batch_size` images."""
        if text_context is None:
            self._check_text(encoder_hidden_states, encoder_attention_mask, attention_kwargs)
            mask = encoder_attention_mask
            if mask is not None and mask.ndim == 2:
                mask = attendable_tokens(mask)
            text = self.caption_norm(self.caption_projection(encoder_hidden_states))  # [B, L, D]
            text_context = SanaTextContext(
                (text,) * len(self.transformer_blocks), self._broadcast_mask(mask, text.dtype), text.shape[0]
            )
        elif encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError(
                "`text_context` stands for `encoder_hidden_states` and `encoder_attention_mask`, which must then be "
                "None. Pass either the context or the two."
            )
        if text_context.batch_size != batch_size:
            raise ValueError(
                f"`hidden_states` and the text must have one batch size, got {batch_size} and "
                f"{text_context.batch_size}. Repeat the prompts or the latents."
            )
        return text_context

    @staticmethod
    def _broadcast_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A boolean `[B, L]` or additive `[B, 1 or N, L]` mask with an axis for the heads."""
        if mask is None:
            return None
        return mask[:, None, None] if mask.ndim == 2 else mask[:, None].to(dtype)

    def _check_text(
        self, encoder_hidden_states: Tensor | None, mask: Tensor | None, attention_kwargs: dict[str, Any] | None
    ) -> None:
        width = self.config["caption_channels"]
        if encoder_hidden_states is None:
            raise ValueError("`encoder_hidden_states` must be given when `text_context` is not, got None for both.")
        shape = tuple(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[2] != width:
            raise ValueError(
                f"`encoder_hidden_states` must have shape [batch, tokens, {width}], got {shape}. "
                "Use the last hidden state of the text encoder this model was trained with."
            )
        if mask is not None and (mask.ndim not in (2, 3) or mask.shape[0] != shape[0] or mask.shape[-1] != shape[1]):
            raise ValueError(
                f"`encoder_attention_mask` must have shape {shape[:2]}, or ({shape[0]}, 1, {shape[1]}) if additive, "
                f"got {tuple(mask.shape)}. Select the same tokens in the mask as in `encoder_hidden_states`."
            )
        if attention_kwargs:
            raise ValueError(
                "`attention_kwargs` may only hold `scale`, as a keyword argument, got "
                f"{sorted(attention_kwargs)}. Give custom attention processors their options when you make them."
            )
