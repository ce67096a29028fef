"""How `from_pretrained` and `save_pretrained` of diffusers and transformers quantize, load and save."""
