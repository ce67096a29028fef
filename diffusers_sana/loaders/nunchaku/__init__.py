"""4-bit checkpoints of Nunchaku (`load.py`) and Nunchaku-Lite (`lite.py`, both ways).

`flux.py` and `sana.py` know the names, `layers.py` a layer in natural order, `packing.py` the order in memory;
`assemble.py` builds the model.
"""

from diffusers_sana.loaders.nunchaku.load import load_nunchaku as load_nunchaku
