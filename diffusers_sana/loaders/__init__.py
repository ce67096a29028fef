"""Checkpoints of other projects, read into this package's layers: dictionaries of tensors to dictionaries of tensors.

`nunchaku.py` and `nunchaku_lite.py` are what a user calls; `nunchaku_packing.py` knows the order in memory,
`nunchaku_layers.py` a layer without that order, `nunchaku_flux.py` and `nunchaku_sana.py` the names.

Sana and DC-AE: `sana_official.py` is what a user calls; the names are beside the models, for their `from_single_file`.

VILA-U: `vila_u_official.py` and `vila_u_export.py` are what a user calls; `vila_u_names.py` knows the names,
`vila_u_config.py` the configs, `weight_files.py` how to read and write tensors one by one.
`vila_u_hub.py` makes a folder of ours a repository of the Hub.
"""
