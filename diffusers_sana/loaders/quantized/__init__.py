"""Quantized checkpoints of all runtimes, read and written; `hub.py` has the user's functions and a table of files."""

# What a checkpoint can be converted to; the command line offers it before anything heavy is imported.
TARGETS = (
    "nunchaku",
    "nunchaku-lite",
    "vllm-omni",
    "modelopt",
    "comfy",
    "comfy-convrot",
    "cache-dit",
    "diffusers-sana",
)
