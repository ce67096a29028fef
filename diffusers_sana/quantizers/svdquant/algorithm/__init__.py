"""From 16-bit weights to 4-bit weights with a low-rank branch."""
