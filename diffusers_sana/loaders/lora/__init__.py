"""LoRA files: `formats.py` reads those of all trainers, `comfyui.py` writes for ComfyUI."""
