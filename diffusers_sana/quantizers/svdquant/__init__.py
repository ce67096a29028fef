"""SVDQuant (arXiv 2411.05007): 4-bit weights beside a 16-bit low-rank branch, for any diffusers transformer.

From the outside in: `api.py` quantizes a pipeline in memory, `integrations/` plugs into `from_pretrained`,
`targets.py` says which layers, `algorithm/` makes the numbers, `layers/` computes with them.
"""

# The hosts of our entries (see `_registration.py`) come first: their import calls for the classes below, and could not
# have them if it came about in the middle of this package.
import diffusers.quantizers.auto  # noqa: F401
import transformers.quantizers.auto  # noqa: F401
