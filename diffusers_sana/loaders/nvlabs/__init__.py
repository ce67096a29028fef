"""Original (NVlabs) files of Sana, SANA-Video, ControlNets and DC-AE."""
