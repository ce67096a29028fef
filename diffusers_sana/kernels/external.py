"""Products of other packages in place of our kernels, where a package is chosen, installed and right.

    comfy-kitchen   int4 (NVIDIA from Ampere on, AMD) and nvfp4 (NVIDIA Blackwell)
    flashinfer      nvfp4 (NVIDIA Blackwell); the package is called flashinfer-python

The kernel mode chooses the package, see `dispatch.py`. The first product of each signature, which is device, shapes
and dtypes, is compared with our reference. Where that fails, a warning gives the reason and our own path runs.

These products read two neighbours along K from a byte; our bytes hold elements that are half a group apart. Weight and
activations are in the same order, and a permutation within a group changes no product, so they go there as they are.

Legend: M tokens, Kp = K padded, N output features, r rank.
"""

import logging
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import PACKAGES
from diffusers_sana.kernels.low_bit import GROUP_SIZES, pack_nibbles, swizzled


logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # relative error per token: a few 16-bit roundings, far less than any wrong order of codes or scales
TOKENS = 256  # comfy-kitchen's int4 product takes multiples of it


def _int4_by_comfy_kitchen(
    package: Any, codes: Tensor, scales: Tensor, low: Tensor,
    qweight: Tensor, wscales: Tensor, wtscale: None, proj_up: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """`scaled_mm_svdquant_w4a4`, which adds the low-rank branch and the bias."""
    packed = pack_nibbles(codes.bitwise_and(15).view(torch.uint8), GROUP_SIZES["int4"]).view(torch.int8)
    parts = (packed, scales.to(proj_up.dtype), low.to(proj_up.dtype))
    packed, scales, low = (F.pad(part, (0, 0, 0, -len(codes) % TOKENS)) for part in parts)
    weight, wscales = qweight.view(torch.int8), wscales.t().contiguous()
    out = package.scaled_mm_svdquant_w4a4(packed, weight, scales.t().contiguous(), wscales, low, proj_up, bias)
    return out[: len(codes)]


def _nvfp4_by_comfy_kitchen(
    package: Any, codes: Tensor, scales: Tensor, low: Tensor, qweight: Tensor, *rest: Any
) -> Tensor:
    """`scaled_mm_nvfp4`."""

    def product(wscales: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        one = torch.ones_like(factor)
        return package.scaled_mm_nvfp4(
            codes, qweight, one, factor, swizzled(scales), swizzled(wscales), out_dtype=dtype
        )

    return _with_rows_and_branch(product, low, *rest)


def _nvfp4_by_flashinfer(
    package: Any, codes: Tensor, scales: Tensor, low: Tensor, qweight: Tensor, *rest: Any
) -> Tensor:
    """`mm_fp4`."""

    def product(wscales: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        ours, theirs = (swizzled(item).view(torch.uint8) for item in (scales, wscales))
        return package.mm_fp4(codes, qweight.t(), ours, theirs.t(), factor, dtype)

    return _with_rows_and_branch(product, low, *rest)


def _with_rows_and_branch(
    product: Callable[[Tensor, Tensor, torch.dtype], Tensor],
    low: Tensor, wscales: Tensor, wtscale: Tensor, proj_up: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Ours has a factor per row, those have one factor: the largest, by which no output leaves the range of fp16."""
    dtype = proj_up.dtype
    factor = wtscale.float().amax().reshape(1)
    branch = F.linear(low.to(dtype), proj_up, bias)
    return torch.addcmul(branch, product(wscales, factor, dtype), (wtscale.float() / factor).to(dtype))


# By package and format of the activations: from its module and the arguments of `lowbit_linear` to the result.
PRODUCTS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("comfy-kitchen", "int4"): _int4_by_comfy_kitchen,
    ("comfy-kitchen", "nvfp4"): _nvfp4_by_comfy_kitchen,
    ("flashinfer", "nvfp4"): _nvfp4_by_flashinfer,
}
INSTALL = {"comfy-kitchen": "comfy-kitchen", "flashinfer": "flashinfer-python"}  # names for pip
_REFUSALS: dict[Any, str | None] = {}  # by signature: why the package is not used, None where it is


def is_found(package: str) -> bool:
    """Whether a package, a key of `PACKAGES`, is there to be imported; it may still fail."""
    return PACKAGES[package] in sys.modules or find_spec(PACKAGES[package]) is not None


def products_described(mode: str) -> str:
    """Whose products layers in w4a4 try first in a kernel mode, and whether the packages for that are found."""
    found = {package: is_found(package) for package in PACKAGES}
    if mode not in PACKAGES:
        others = ", ".join(f"{package} is {'' if there else 'not '}found" for package, there in found.items())
        return f"ours; {others}"
    if not found[mode]:
        return f"ours, as {mode} is not found: pip install {INSTALL[mode]}"
    formats = " and ".join(sorted(kind for package, kind in PRODUCTS if package == mode))
    return f"{mode}, which is found, for {formats} where its first result is right, else ours"


def external_product(
    package: str, activation_format: str, reference: Callable[..., Tensor], codes: Tensor, *parts: Tensor | None
) -> Tensor | None:
    """The result of another package.

    Args:
        package, activation_format: a key of `PRODUCTS`.
        reference: of the same arguments; called for new signatures only.
        codes, parts: arguments of `lowbit_linear`, in its order.

    Returns:
        `[M, N]`, or None where ours has to run.
    """
    arguments = (codes, *parts)
    kinds = tuple(None if part is None else (part.device, part.shape, part.dtype) for part in arguments)
    signature = package, activation_format, kinds
    if signature not in _REFUSALS:
        if _is_recorded(codes.device):  # a comparison waits for the GPU, which graphs cannot record
            return None
        _REFUSALS[signature] = reason = _refusal(package, activation_format, reference, arguments)
        if reason is not None:
            _warn_once(package, activation_format, reason)
    if _REFUSALS[signature] is not None:
        return None
    return PRODUCTS[package, activation_format](import_module(PACKAGES[package]), *arguments)


def _is_recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refusal(
    package: str, activation_format: str, reference: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]
) -> str | None:
    """Why the package cannot be used for these arguments, or None if its result is right."""
    try:
        module = import_module(PACKAGES[package])
    except ImportError as error:
        return f"it cannot be imported ({error})"
    try:
        actual = PRODUCTS[package, activation_format](module, *arguments)
    except Exception as error:  # its own classes, and those of the compilers that it uses
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    expected = reference(*arguments)
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"its result is {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
    difference = (actual.float() - expected.float()).norm(dim=1)
    error = (difference / expected.float().norm(dim=1).clamp_min(1e-20)).max().item()
    return None if error <= TOLERANCE else f"its result differs from the reference by {error:.1%}"


@cache
def _warn_once(package: str, activation_format: str, reason: str) -> None:
    logger.warning(f"{package} is not used for products in {activation_format}: {reason}. Our own run instead.")
