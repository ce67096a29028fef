"""Labels for training on chats: only assistant tokens are targets.

The chat template marks them by characters; this file maps the characters to tokens. The other half is in transformers:
`ProcessorMixin._adjust_assistant_masks_indices`.

Legend: B prompts, L positions.
"""

import copy
import re
from typing import Any

import numpy as np

from diffusers_sana.models.vila_u.loss_vila_u import IGNORED
from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, encode_piece


def token_spans(tokenizer: Any, text: str, num_image_tokens: int, mask: Any) -> list[tuple[int, int]]:
    """The span of characters (start, end) of each token of a row; (0, 0) for padding and `<s>`.

    The "▁" that `encode_piece` adds is not in the text: its span is empty.

    Args:
        tokenizer: a fast tokenizer.
        text: the prompt with expanded media.
        num_image_tokens: tokens per `<image>`.
        mask: `[L]`, 0 at padding.
    """
    spans, begin = [], 0
    for piece in re.split(f"({IMAGE})", text):
        if piece == IMAGE:
            spans += [(begin, begin + len(IMAGE))] * num_image_tokens
        elif piece:
            found = tokenizer(f" {piece}", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            kept = found[-len(encode_piece(tokenizer, piece)) :]
            spans += [(begin + max(start - 1, 0), begin + end - 1) for start, end in kept]
        begin += len(piece)
    is_token = [bool(value) for value in mask]
    remaining = iter([(0, 0)] * (sum(is_token) - len(spans)) + spans)
    return [next(remaining) if value else (0, 0) for value in is_token]


def labels_of(input_ids: Any, masks: list[list[int]]) -> Any:
    """`input_ids` `[B, L]`, with -100 where the assistant mask `[B, L]` is 0.

    Args:
        input_ids: tensor, array or lists; the result has the same type.
        masks: lists.

    Raises:
        ValueError: a chat without assistant tokens.
    """
    for index, mask in enumerate(masks):
        if not any(mask):
            raise ValueError(
                f"`output_labels` needs an answer of the assistant in every chat, but chat {index} has none. A custom "
                "`chat_template` must mark answers with {% generation %} and {% endgeneration %}."
            )
    if isinstance(input_ids, list):
        rows = (zip(row, mask, strict=True) for row, mask in zip(input_ids, masks, strict=True))
        return [[token if is_target else IGNORED for token, is_target in row] for row in rows]
    labels = copy.deepcopy(input_ids)
    labels[np.array(masks) == 0] = IGNORED
    return labels
