"""LoRA files: `formats.py` reads those of all trainers, `comfyui.py` writes for ComfyUI.

What no LoRA can hold is a change: `changes.py` has the formula, `products.py` and `rotations.py` read it from files,
and `layers.py` puts it beside a layer.
"""
