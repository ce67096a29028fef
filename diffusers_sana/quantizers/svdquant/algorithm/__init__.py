"""The numbers: 16-bit weights to 4-bit ones and their low-rank branch."""
