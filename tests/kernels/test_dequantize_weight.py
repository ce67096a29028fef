"""The matrix that a quantized layer represents: the reference by its definition, the kernel by the reference."""

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight, dequantize_weight_reference
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.low_bit import decode_weight
from tests.kernels.kernel_checks import DEVICE, DTYPES
from tests.kernels.low_bit_checks import PRECISIONS, check_compiled, quantized_weight
from tests.numerics import assert_close_fp32, assert_kernel, assert_no_worse


ALL = (*PRECISIONS, "float8")


def tensors(outputs, features, rank, precision, dtype=torch.float32):
    given = {
        "smooth_factor": torch.rand(features) + 0.5,
        "proj_down": torch.randn(rank, features),
        "proj_up": torch.randn(outputs, rank),
    }
    given = {name: tensor.to(DEVICE, dtype) for name, tensor in given.items()}
    return quantized_weight(outputs, features, precision, dtype) | given


def formula(qweight, wscales, wtscale, smooth_factor, proj_down, proj_up):
    residual = decode_weight(qweight, wscales, wtscale).double()[:, : smooth_factor.shape[0]]
    return residual / smooth_factor.double() + proj_up.double() @ proj_down.double()


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("precision", ALL)
def test_equals_the_formula(precision, rank):
    given = tensors(7, 100, rank, precision)
    assert_close_fp32(dequantize_weight(**given, dtype=torch.float32), formula(**given))
    exact = dequantize_weight(**given, dtype=torch.float64)
    assert (exact - formula(**given)).norm() < 1e-14 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    given = tensors(32, 128, 8, "int4", dtype)
    exact = formula(**given)
    out = dequantize_weight(**given, dtype=dtype)
    assert out.dtype == dtype
    assert_no_worse(out, exact.to(dtype), exact, factor=1.0)


def check_kernel(given, dtype):
    with kernel_mode("triton"):
        actual = dequantize_weight(**given, dtype=dtype)
        assert torch.equal(actual, dequantize_weight(**given, dtype=dtype))
    exact = dequantize_weight_reference(**given, dtype=torch.float64)
    assert_kernel(actual, dequantize_weight_reference(**given, dtype=dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(67, 200, 32), (1, 17, 0), (3, 64, 40), (130, 100, 5)], ids=str)
@pytest.mark.parametrize("precision", ALL)
def test_kernel(precision, sizes, dtype):
    check_kernel(tensors(*sizes, precision, dtype), dtype)


def test_kernel_with_mixed_dtypes_and_slices():
    """fp32 factors beside half ones; some rows of a larger weight, as the layers take them."""
    given = tensors(20, 96, 6, "nvfp4", torch.float16)
    given |= {name: given[name][4:13] for name in ("qweight", "wscales", "wtscale", "proj_up")}
    check_kernel(given, torch.float32)
    check_kernel(given | {"proj_down": given["proj_down"].float()}, torch.float16)


def test_kernel_refuses_float64():
    given = tensors(4, 64, 2, "int4")
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=r"the dtype of the result is torch\.float64"):
        dequantize_weight(**given, dtype=torch.float64)


@pytest.mark.parametrize("precision", ALL)
def test_kernel_is_an_operator(precision):
    check_compiled(dequantize_weight, tensors(5, 100, 4, precision), dtype=torch.float16)
