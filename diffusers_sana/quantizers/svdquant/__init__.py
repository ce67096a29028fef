"""SVDQuant (arXiv 2411.05007): 4- or 8-bit weights with a 16-bit low-rank branch, for any diffusers transformer.

`api.py` quantizes a pipeline in memory, and `integrations/` does so during `from_pretrained`. Both use `targets.py` to
select layers, `algorithm/` to quantize their weights, and `layers/` to compute with them.
"""

# The hosts of our entries (see `_registration.py`) must be imported first: their import looks up classes of this
# package, which would fail if it happened while the package itself is being imported.
import diffusers.quantizers.auto  # noqa: F401
import transformers.quantizers.auto  # noqa: F401
