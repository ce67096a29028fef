"""Third-party checkpoints, read and written: one folder per origin.

`nvlabs/`: original files of Sana, SANA-Video, ControlNets, DC-AE. `vila_u/`: the original VILA-U. `nunchaku/`: 4-bit
files of Nunchaku and Nunchaku-Lite. `quantized/`: quantized files of all runtimes. `lora/`: LoRA files of all
trainers. `single_file.py` and `weight_files.py` read files without running what is in them and without loading what
nobody asked for.
"""
