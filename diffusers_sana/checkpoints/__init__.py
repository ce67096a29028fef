"""Small checkpoints that come with the package: ordinary diffusers folders beside this file."""

from pathlib import Path


# Draws what its prompt names among some 350 animals, foods, vehicles and the like; 128 px. See docs/checkpoints.md.
SANA_EMOJI = str(Path(__file__).parent / "sana-emoji")
