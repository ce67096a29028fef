"""Words of a prompt that the bundled checkpoints were not taught. Their tokenizers spell any word, so cannot tell."""

import json
import re
from functools import cache
from pathlib import Path

from diffusers_sana.checkpoints import EMOJI_PROBE, SANA_EMOJI, SANA_EMOJI_SPRINT
from diffusers_sana.loading import checkpoint_path


# Of the prompts that they were trained on, beside objects, colors and styles: see the card of sana-emoji.
BETWEEN = "a an and at background bottom left on right style the top"


@cache
def known_words() -> frozenset[str]:
    """Every word of the prompts of sana-emoji, from the network that judges its images."""
    config = json.loads(Path(EMOJI_PROBE, "config.json").read_text(encoding="utf-8"))
    return frozenset(" ".join([*config["objects"], *config["colors"], *config["styles"], BETWEEN]).split())


def unknown_words(model: str, prompt: str) -> list[str]:
    """The words of a prompt that are new to a bundled Sana, in order; none of other models, which know every word."""
    if checkpoint_path(model) not in (SANA_EMOJI, SANA_EMOJI_SPRINT):
        return []
    words = re.findall(r"[^\s,.;:!?()\"]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in known_words()]
