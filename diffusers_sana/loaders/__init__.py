"""Checkpoints of other projects, read into this package's layers: dictionaries of tensors to dictionaries of tensors.

`nunchaku.py` and `nunchaku_lite.py` are what a user calls; `nunchaku_packing.py` knows the order in memory,
`nunchaku_layers.py` a layer without that order, `nunchaku_flux.py` and `nunchaku_sana.py` the names.
"""
