"""SVDQuant (arXiv 2411.05007): 4-bit weights beside a 16-bit low-rank branch, for any diffusers transformer.

From the outside in: `quantizer.py` (diffusers) and `transformers_quantizer.py` plug into `from_pretrained`,
`targets.py` says which layers, `decompose.py` makes the numbers, `linear.py` computes with them.
"""
