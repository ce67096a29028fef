"""Emoji that move: a tiny SANA-Video over the bundled autoencoder, and a rule that judges the motion."""
