"""Quantized layers, and what adapters ask of them."""
