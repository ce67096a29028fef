"""Quantized layers, their compute modes, and the support for adapters on them."""
