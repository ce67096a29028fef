"""Small checkpoints bundled with the package: ordinary folders beside this file."""

from pathlib import Path


# Generates images of 183 animals, foods, vehicles and the like, 256 px. See docs/checkpoints.md.
SANA_EMOJI = str(Path(__file__).parent / "sana-emoji")

# Generates 64 of the same things, 64 px, and answers questions about images; in 4 bits.
VILA_U_EMOJI = str(Path(__file__).parent / "vila-u-emoji")

# A LoRA for SANA_EMOJI: images of prompts that end in ", pixel art" are made of coarse blocks.
SANA_EMOJI_PIXEL_ART = str(Path(__file__).parent / "sana-emoji-pixel-art")

# A ControlNet for SANA_EMOJI that follows edges.
SANA_EMOJI_EDGES = str(Path(__file__).parent / "sana-emoji-edges")

# A LoRA that makes SANA_EMOJI a SANA-Sprint, see `SanaSprintPipeline.from_teacher`, and its scheduler.
SANA_EMOJI_SPRINT = str(Path(__file__).parent / "sana-emoji-sprint")

# The classifier behind `diffusers-sana evaluate sana-emoji`.
EMOJI_PROBE = str(Path(__file__).parent / "emoji-probe")

# What a name stands for, on the command line and elsewhere: pipelines, a ControlNet and a LoRA for sana-emoji.
BUNDLED = {"sana-emoji": SANA_EMOJI, "sana-emoji-sprint": SANA_EMOJI_SPRINT, "vila-u-emoji": VILA_U_EMOJI}
BUNDLED_CONTROLNETS = {"sana-emoji-edges": SANA_EMOJI_EDGES}
BUNDLED_LORAS = {"sana-emoji-pixel-art": SANA_EMOJI_PIXEL_ART}
