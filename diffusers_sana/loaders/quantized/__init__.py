"""Quantized checkpoints of all runtimes, read and written; `hub.py` has the user's functions and a table of files."""
