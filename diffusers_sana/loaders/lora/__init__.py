"""LoRA files of all trainers: `formats.py` reads them, `comfyui.py` writes for ComfyUI."""
