"""Triton kernels: one file an operation, with its jit kernels and their launchers, nothing else.

A launcher trusts the operation's public function (`kernels/<operation>.py`) to have checked shapes and dtypes. Launch
configurations are pure functions of the shape: no autotuning at run time, so no stall at the first call and the same
bits at every run. Nothing here uses atomics.
"""
