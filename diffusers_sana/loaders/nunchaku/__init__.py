"""4-bit checkpoints: Nunchaku (`load.py`) and Nunchaku-Lite (`lite.py`, reading and writing).

`flux.py` and `sana.py` have the tensor names, `layers.py` a layer in natural order, `packing.py` the order in memory;
`assemble.py` builds the model.
"""

from diffusers_sana.loaders.nunchaku.load import load_nunchaku as load_nunchaku
