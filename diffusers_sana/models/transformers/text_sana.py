"""Text conditioning of the models with Sana's blocks.

Legend: B batch, N image tokens, L text tokens, D inner width.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_sana.models.layers import scaled_adapters, split_scale
from diffusers_sana.models.transformers.attention_sana import SanaTextState


@dataclass(frozen=True)
class SanaTextContext:
    """Everything the blocks need to know about the prompts, computed once by `encode_text` of the model.

    A snapshot that depends on the weights: compute a new one after loading, scaling or removing an adapter, changing
    an attention processor, or a training step.

    Attributes:
        states: one entry per block.
        attention_mask: as in `SanaTransformerBlock.forward`; None if no text token is masked.
        batch_size: B.
    """

    states: tuple[Tensor | SanaTextState, ...]
    attention_mask: Tensor | None
    batch_size: int

    def rows(self, start: int, stop: int) -> "SanaTextContext":
        """The context of some of the prompts, without a copy."""
        state = self.states[0]
        num_single = self.batch_size - len(state.key) if isinstance(state, SanaTextState) else 0
        others = slice(max(start - num_single, 0), max(stop - num_single, 0))  # prompts of several tokens

        def of_state(state: Tensor | SanaTextState) -> Tensor | SanaTextState:
            if isinstance(state, Tensor):
                return state[others]
            constant = state.constant[start:stop] if state.constant is not None and start < num_single else None
            return SanaTextState(state.key[others], state.value[others], constant)

        mask = None if self.attention_mask is None else self.attention_mask[others]
        return SanaTextContext(tuple(map(of_state, self.states)), mask, stop - start)

    def chunk(self, chunks: int, dim: int = 0) -> tuple["SanaTextContext", ...]:
        """Equal parts of the batch, like `Tensor.chunk`: FasterCache takes the conditional half of its inputs."""
        size = self.batch_size // chunks
        return tuple(self.rows(start, start + size) for start in range(0, self.batch_size, size))


def attendable_tokens(mask: Tensor) -> Tensor:
    """Boolean text mask `[B, L]` (True: attend) of a 0/1 mask.

    A row without valid tokens attends to all of its tokens, as in diffusers: a softmax needs at least one key.
    """
    mask = mask.bool()
    return mask | ~mask.any(dim=1, keepdim=True)


class SanaTextMixin:
    """Text conditioning for models with `caption_projection`, `caption_norm` and `transformer_blocks`."""

    caption_projection: Any
    caption_norm: Any
    transformer_blocks: Any
    config: Any
    training: bool

    @apply_forward_hook
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> SanaTextContext:
        """Computes everything that depends on the prompts only, for `forward(..., text_context=)` in all steps.

        Masked tokens are dropped, whatever their position. Prompts of a single token at the start of the batch (the
        empty negative prompts of classifier-free guidance) need no attention at all. If a block has a custom attention
        processor or is group-offloaded, the text is projected here, and keys and values are computed in the blocks.
        Reads the prompt lengths on the host, so call it outside of compiled code.

        Args:
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`.
            encoder_attention_mask: as in `forward`. An additive mask drops nothing.
            attention_kwargs: as in `forward`, and must be the same there.

        Returns:
            A context with the same effect as the arguments.
        """
        scale, attention_kwargs = split_scale(attention_kwargs)
        if scale is not None:
            with scaled_adapters(cast(nn.Module, self), scale):
                return SanaTextMixin.encode_text(self, encoder_hidden_states, encoder_attention_mask, attention_kwargs)
        _check_attention_kwargs(attention_kwargs)
        self._check_text(encoder_hidden_states, encoder_attention_mask)
        text, mask, num_single = encoder_hidden_states, encoder_attention_mask, 0
        blocks = self.transformer_blocks
        can_encode = all(block.can_encode_text() for block in blocks)
        if mask is not None and mask.ndim == 2:
            valid = attendable_tokens(mask)
            lengths = valid.sum(dim=1).tolist()
            if can_encode and not self.training:  # in training, dropout may act on the output
                num_single = next((row for row, length in enumerate(lengths) if length != 1), len(lengths))
            remaining = lengths[num_single:] or [1]
            order = valid.byte().argsort(dim=1, descending=True, stable=True)[
                :, : max(remaining)
            ]  # valid tokens first
            text = text.take_along_dim(order[..., None], dim=1)
            mask = None if min(remaining) == max(remaining) else valid.take_along_dim(order, dim=1)[num_single:]

        text = self.caption_norm(self.caption_projection(text))  # [B, L, D]
        states = tuple(
            block.attn2.processor.encode_text(block.attn2, text, num_single) if can_encode else text
            for block in blocks
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
        """The text arguments of `forward` as a context for `batch_size` images."""
        _check_attention_kwargs(attention_kwargs)
        if text_context is None:
            self._check_text(encoder_hidden_states, encoder_attention_mask)
            mask = encoder_attention_mask
            if mask is not None and mask.ndim == 2:
                mask = attendable_tokens(mask)
            text = self.caption_norm(self.caption_projection(encoder_hidden_states))  # [B, L, D]
            text_context = SanaTextContext(
                (text,) * len(self.transformer_blocks), self._broadcast_mask(mask, text.dtype), text.shape[0]
            )
        elif encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError(
                "`text_context` replaces `encoder_hidden_states` and `encoder_attention_mask`, which must then be "
                "None. Pass either the context or the other two."
            )
        if text_context.batch_size != batch_size:
            raise ValueError(
                f"`hidden_states` and the text must have the same batch size, got {batch_size} and "
                f"{text_context.batch_size}. Repeat the prompts or the latents."
            )
        return text_context

    @staticmethod
    def _broadcast_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A boolean `[B, L]` or additive `[B, 1 or N, L]` mask with an axis for the heads."""
        if mask is None:
            return None
        return mask[:, None, None] if mask.ndim == 2 else mask[:, None].to(dtype)

    def _check_text(self, encoder_hidden_states: Tensor | None, mask: Tensor | None) -> None:
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


def _check_attention_kwargs(attention_kwargs: dict[str, Any] | None) -> None:
    """Raises where something is left of `attention_kwargs` after `split_scale`."""
    if attention_kwargs:
        raise ValueError(
            "`attention_kwargs` may only hold `scale`, as a keyword argument, got "
            f"{sorted(attention_kwargs)}. Pass options to custom attention processors when you create them."
        )
