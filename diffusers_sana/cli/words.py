"""Words of a prompt that the bundled checkpoints were not taught. Their tokenizers spell any word, so cannot tell."""

import re
from functools import cache
from pathlib import Path

from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_SPRINT
from diffusers_sana.files import read_text
from diffusers_sana.loading import checkpoint_path


@cache
def known_words() -> frozenset[str]:
    """Every word of the captions that sana-emoji was trained on, which its training wrote beside it."""
    return frozenset(read_text(Path(SANA_EMOJI, "words.txt")).split())


def unknown_words(model: str, prompt: str) -> list[str]:
    """The words of a prompt that are new to a bundled Sana, in order; none of other models, which know every word."""
    if checkpoint_path(model) not in (SANA_EMOJI, SANA_EMOJI_SPRINT):
        return []
    return [word for word in words_of(prompt) if word not in known_words()]


def words_of(text: str) -> list[str]:
    """Its words in lower case, each once, in order."""
    return list(dict.fromkeys(re.findall(r"[^\s,.;:!?()\"]+", text.lower())))
