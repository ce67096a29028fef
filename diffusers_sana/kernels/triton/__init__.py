"""Triton kernels: one file per operation, with its jit kernels and their launchers, nothing else.

Launchers do not check shapes and dtypes; the public function of the operation (`kernels/<operation>.py`) does. Launch
configurations are pure functions of the shape. There is no autotuning at run time, so there is no delay at the first
call, and every run gives the same bits. Nothing here uses atomics.
"""
