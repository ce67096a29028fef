"""LoRA files: `files.py` and `formats.py` read those of all trainers, `comfyui.py` writes for ComfyUI.

`any_model.py` has `load_adapter`, for models other than Sana, and `student.py` reads a SANA-Sprint that is a LoRA.

What no LoRA can hold is a change: `changes.py` has the formula, `products.py` and `rotations.py` read it from files,
and `layers.py` puts it beside a layer.
"""
