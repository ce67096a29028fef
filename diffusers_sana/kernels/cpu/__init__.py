"""Implementations for processors: 8-bit products, and operations in blocks that stay in the cache."""
