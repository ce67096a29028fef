"""Operations of the models: one file each, with the formula, the PyTorch reference and the public function."""
