"""Original (NVlabs) files of Sana, its ControlNets and DC-AE."""
