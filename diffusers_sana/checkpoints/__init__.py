"""Small checkpoints bundled with the package: ordinary folders beside this file."""

from pathlib import Path


# Generates images of some 350 animals, foods, vehicles and the like, 128 px. See docs/checkpoints.md.
SANA_EMOJI = str(Path(__file__).parent / "sana-emoji")

# Generates the same things, and answers questions about images.
VILA_U_EMOJI = str(Path(__file__).parent / "vila-u-emoji")

# A LoRA for SANA_EMOJI: images of prompts that end in ", pixel art" are made of coarse blocks.
SANA_EMOJI_PIXEL_ART = str(Path(__file__).parent / "sana-emoji-pixel-art")

# A ControlNet for SANA_EMOJI that follows edges.
SANA_EMOJI_EDGES = str(Path(__file__).parent / "sana-emoji-edges")

# Transformer and scheduler of a SANA-Sprint, distilled from SANA_EMOJI, whose other parts it shares.
SANA_EMOJI_SPRINT = str(Path(__file__).parent / "sana-emoji-sprint")

# The classifier behind `diffusers-sana evaluate sana-emoji`.
EMOJI_PROBE = str(Path(__file__).parent / "emoji-probe")

# What a name stands for, on the command line and elsewhere: pipelines, a ControlNet and a LoRA for sana-emoji.
BUNDLED = {"sana-emoji": SANA_EMOJI, "sana-emoji-sprint": SANA_EMOJI_SPRINT, "vila-u-emoji": VILA_U_EMOJI}
BUNDLED_CONTROLNETS = {"sana-emoji-edges": SANA_EMOJI_EDGES}
BUNDLED_LORAS = {"sana-emoji-pixel-art": SANA_EMOJI_PIXEL_ART}
