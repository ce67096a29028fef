"""What processors compute otherwise than the PyTorch reference: in 8 bits, or in pieces that stay in the cache."""
