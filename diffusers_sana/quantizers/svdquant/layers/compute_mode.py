"""The fastest compute mode of quantized layers on a device."""

from functools import cache

import torch
from diffusers.utils import logging

from diffusers_sana._compat import triton_refusal
from diffusers_sana.kernels import float8_linear
from diffusers_sana.kernels.cpu import int8_linear
from diffusers_sana.quantizers.svdquant.config import mode_for


logger = logging.get_logger(__name__)

# Tensor cores there multiply e2m1 with block scales; elsewhere Triton would emulate it in 16 bit.
NVFP4_CAPABILITIES = ((10, 0), (10, 3), (12, 0), (12, 1))


@torch.compiler.assume_constant_result  # it asks libraries and drivers, which cannot be traced
def best_mode(device: torch.device, precision: str) -> str:
    """The fastest mode that is implemented on a device for a format: one of `LAYER_MODES` or "w4a8"."""
    return _best_mode(device.type, device.index, precision)[0]


def best_mode_reason(device: torch.device, precision: str) -> str:
    """Why that mode is the fastest on the device."""
    return _best_mode(device.type, device.index, precision)[1]


@cache
def _best_mode(device_type: str, index: int | None, precision: str) -> tuple[str, str]:
    if precision == "float8":
        has_product = float8_linear.has_product(
            torch.device(device_type if index is None else f"{device_type}:{index}")
        )
        mode, reason = ("f8a8", "float8 tensor cores") if has_product else ("f8a16", "no float8 tensor cores")
    elif device_type == "cpu":
        mode, reason = ("w4a8", "8-bit products") if int8_linear.is_supported() else ("w4a16", "no 8-bit products")
    elif device_type != "cuda" or triton_refusal() is not None:
        mode, reason = "w4a16", "no Triton kernels there"
    elif torch.version.hip is not None:
        mode, reason = "w4a8", "8-bit matrix cores"
    else:
        capability = torch.cuda.get_device_capability(index)
        if capability in NVFP4_CAPABILITIES and precision == "nvfp4":
            mode, reason = "w4a4", "NVFP4 tensor cores"
        elif capability >= (8, 0):
            mode, reason = "w4a8", "8-bit tensor cores"
        else:
            mode, reason = "w4a16", f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    mode = mode_for(precision, mode)
    logger.info(f"SVDQuant layers in {precision} compute in {mode} on {device_type}: {reason}.")
    return mode, reason
