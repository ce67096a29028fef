"""What a chat teaches: the labels of what the assistant says.

The chat template marks it, character by character; here it is found again among the tokens. For transformers' own part
of the work see `ProcessorMixin._adjust_assistant_masks_indices`.

Legend: B prompts, L positions.
"""

import copy
import re
from typing import Any

import numpy as np

from diffusers_sana.models.vila_u.loss_vila_u import IGNORED
from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, encode_piece


def places_of_tokens(tokenizer: Any, text: str, num_image_tokens: int, mask: Any) -> list[tuple[int, int]]:
    """From which to which character each token of a row stands; from 0 to 0 for padding and `<s>`.

    Of the "▁" that `encode_piece` adds there is nothing in the text: it stands between two characters.

    Args:
        tokenizer: a fast one.
        text: of the prompt, its media expanded.
        num_image_tokens: tokens of each `<image>`.
        mask: `[L]`, 0 where the row is padded.
    """
    places, begin = [], 0
    for piece in re.split(f"({IMAGE})", text):
        if piece == IMAGE:
            places += [(begin, begin + len(IMAGE))] * num_image_tokens
        elif piece:
            found = tokenizer(f" {piece}", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            kept = found[-len(encode_piece(tokenizer, piece)) :]
            places += [(begin + max(start - 1, 0), begin + end - 1) for start, end in kept]
        begin += len(piece)
    seen = [bool(is_seen) for is_seen in mask]
    remaining = iter([(0, 0)] * (sum(seen) - len(places)) + places)
    return [next(remaining) if is_seen else (0, 0) for is_seen in seen]


def labels_of(input_ids: Any, masks: list[list[int]]) -> Any:
    """`input_ids` `[B, L]`, and -100 where the mask of the assistant's tokens `[B, L]` is 0.

    Args:
        input_ids: tensor, array or lists; so is what is returned.
        masks: lists.

    Raises:
        ValueError: nothing is to be learned from a chat.
    """
    for index, mask in enumerate(masks):
        if not any(mask):
            raise ValueError(
                f"`output_labels` needs what the assistant says in every chat, but in chat {index} it says nothing; "
                "a `chat_template` of your own must mark it by {% generation %} and {% endgeneration %}."
            )
    if isinstance(input_ids, list):
        rows = (zip(row, mask, strict=True) for row, mask in zip(input_ids, masks, strict=True))
        return [[token if is_said else IGNORED for token, is_said in row] for row in rows]
    labels = copy.deepcopy(input_ids)
    labels[np.array(masks) == 0] = IGNORED
    return labels
