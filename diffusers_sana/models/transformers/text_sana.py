"""Text conditioning of the models with Sana's blocks, and image prompts beside the text.

Legend: B batch, N image tokens, L text tokens, D inner width; M rows with image prompts.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_sana.models.layers import scaled_adapters, split_scale
from diffusers_sana.models.transformers.attention_sana import (
    SanaAttnProcessor,
    SanaImageState,
    SanaTextState,
)


ImageStates = tuple[tuple[SanaImageState, ...], ...]  # for each block, one state for each adapter


@dataclass(frozen=True)
class SanaTextContext:
    """Everything the blocks need to know about the prompts, computed once by `encode_text` of the model.

    A snapshot that depends on the weights: compute a new one after loading, scaling or removing an adapter, changing
    an attention processor, or a training step.

    Attributes:
        states: one entry per block.
        attention_mask: as in `SanaTransformerBlock.forward`; None if no text token is masked.
        batch_size: B.
        image_states: of the image prompts of the last M rows; empty without image prompts.
    """

    states: tuple[Tensor | SanaTextState, ...]
    attention_mask: Tensor | None
    batch_size: int
    image_states: ImageStates = ()

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
        images = rows_of_images(self.image_states, self.batch_size, start, stop)
        return SanaTextContext(tuple(map(of_state, self.states)), mask, stop - start, images)

    def chunk(self, chunks: int, dim: int = 0) -> tuple["SanaTextContext", ...]:
        """Equal parts of the batch, like `Tensor.chunk`: FasterCache takes the conditional half of its inputs."""
        size = self.batch_size // chunks
        return tuple(self.rows(start, start + size) for start in range(0, self.batch_size, size))


def num_image_rows(image_states: ImageStates) -> int:
    """M, the rows of a batch that have image prompts."""
    return len(image_states[0][0].key) if image_states else 0


def rows_of_images(image_states: ImageStates, batch_size: int, start: int, stop: int) -> ImageStates:
    """The image prompts of some rows of a batch, whose last M rows have them; empty if none of the rows has any."""
    num_without = batch_size - num_image_rows(image_states)
    rows = slice(max(start - num_without, 0), max(stop - num_without, 0))
    if rows.start == rows.stop:
        return ()
    return tuple(
        tuple(SanaImageState(image.key[rows], image.value[rows]) for image in images) for images in image_states
    )


def repeated_rows(image_states: ImageStates, copies: int) -> ImageStates:
    """All rows of image prompts, and then all again, so many times."""
    if copies == 1:
        return image_states
    repeats = copies, 1, 1, 1
    return tuple(
        tuple(SanaImageState(image.key.repeat(repeats), image.value.repeat(repeats)) for image in images)
        for images in image_states
    )


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
    _takes_image_prompts = False

    @apply_forward_hook
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        image_states: ImageStates = (),
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
            image_states: of image prompts for the last M prompts, from `SanaIPAdapterModel`.

        Returns:
            A context with the same effect as the arguments.

        Raises:
            ValueError: wrong shapes, or image prompts that this model or its attention processors do not take.
        """
        scale, attention_kwargs = split_scale(attention_kwargs)
        if scale is not None:
            with scaled_adapters(cast(nn.Module, self), scale):
                inputs = encoder_hidden_states, encoder_attention_mask, attention_kwargs, image_states
                return SanaTextMixin.encode_text(self, *inputs)
        self._check_images(image_states, len(encoder_hidden_states))
        _check_attention_kwargs(attention_kwargs)
        self._check_text(encoder_hidden_states, encoder_attention_mask)
        text, mask, num_single = encoder_hidden_states, encoder_attention_mask, 0
        blocks = self.transformer_blocks
        can_encode = all(block.can_encode_text() for block in blocks)
        if mask is not None and mask.ndim == 2:
            valid = attendable_tokens(mask)
            lengths = valid.sum(dim=1).tolist()
            if can_encode and not self.training:  # in training, dropout may act on the output
                plain = lengths[: len(lengths) - num_image_rows(image_states)]  # the others attend to their images
                num_single = next((row for row, length in enumerate(plain) if length != 1), len(plain))
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
        return SanaTextContext(states, self._broadcast_mask(mask, text.dtype), text.shape[0], image_states)

    def _check_images(self, image_states: ImageStates, batch_size: int) -> None:
        if not image_states:
            return
        blocks = self.transformer_blocks
        if not self._takes_image_prompts:
            raise ValueError(f"`image_states` must be empty: {type(self).__name__} takes no image prompts.")
        for block in blocks:
            if not isinstance(block.attn2.processor, SanaAttnProcessor):
                raise ValueError(
                    "`image_states` need the attention processor SanaAttnProcessor in all cross-attentions, got a"
                    f" {type(block.attn2.processor).__name__}. Restore it, or leave the image prompt out."
                )
        wanted = (blocks[0].attn2.heads, self.config["cross_attention_head_dim"])
        found = {tuple(image.key.shape[-2:]) for images in image_states for image in images}
        if len(image_states) != len(blocks) or found != {wanted}:
            raise ValueError(
                f"`image_states` must be of {len(blocks)} blocks with {wanted[0]} heads of width {wanted[1]}, got"
                f" {len(image_states)} blocks with {sorted(found)}. The IP-Adapter is of another transformer, or this"
                " one is split between processes (tensor parallelism), which image prompts do not support."
            )
        if num_image_rows(image_states) > batch_size:
            raise ValueError(
                f"`image_states` must have at most as many rows as there are prompts, {batch_size}, got"
                f" {num_image_rows(image_states)}."
            )

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
