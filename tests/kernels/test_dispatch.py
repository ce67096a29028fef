"""Which implementation runs, and in which arithmetic, with what is installed and on devices that are not here."""

import logging
from types import SimpleNamespace

import pytest
import torch

from diffusers_sana import _compat
from diffusers_sana.kernels import dispatch, precision
from diffusers_sana.kernels.cpu import int8_linear
from diffusers_sana.kernels.linear import linear
from diffusers_sana.quantizers.svdquant.algorithm import randomized_svd


def on(device: str, dtype=torch.float16):
    """What the functions ask of a tensor on a device that is not here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    dispatch._log_once.cache_clear()
    return on("cuda")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.3.1", r"triton 3\.3\.1 is older than 3\.4"),
        ("2.1.0+git", "older than"),
        ("3.4.0", None),
        ("3.10.0", None),
    ],
)
def test_old_triton_is_left_alone(gpu, monkeypatch, caplog, version, reason):
    """torch 2.6 and 2.7 bring a triton that lacks what the kernels use."""
    monkeypatch.setattr(_compat, "version_of", lambda host: version)
    monkeypatch.setattr(dispatch, "_TRITON_REFUSAL", _compat.triton_refusal())
    with caplog.at_level(logging.INFO, logger="diffusers_sana.kernels.dispatch"):
        monkeypatch.setattr(logging.getLogger("diffusers_sana"), "propagate", True)
        with dispatch.kernel_mode("auto"):
            assert [dispatch.use_triton("an_operation", gpu) for _ in range(2)] == [reason is None] * 2
    assert len(caplog.records) == (reason is not None)
    if reason is not None:
        with dispatch.kernel_mode("triton"), pytest.raises(RuntimeError, match=reason):
            dispatch.use_triton("an_operation", gpu)


def test_no_triton(gpu, monkeypatch):
    monkeypatch.setattr(_compat, "find_spec", lambda name: None)
    assert _compat.triton_refusal() == "triton is not installed"


class NoOperators:
    """`torch.ops.mkldnn` of builds without oneDNN."""

    def __getattr__(self, name):
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_onednn(monkeypatch, dtype):
    monkeypatch.setitem(torch.ops.__dict__, "mkldnn", NoOperators())
    assert _compat.onednn_computes(dtype) is False


def test_without_the_int8_product(monkeypatch):
    monkeypatch.setitem(torch.ops.__dict__, "onednn", NoOperators())
    assert int8_linear._is_supported.__wrapped__() is False
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert int8_linear.levels.__wrapped__() == 63


def test_arithmetic():
    assert precision.arithmetic_dtype(on("mps", torch.float16)) == torch.float32
    assert precision.arithmetic_dtype(on("mps", torch.bfloat16)) == torch.float32
    assert precision.arithmetic_dtype(on("mps", torch.float32)) == torch.float32
    assert precision.arithmetic_dtype(on("cuda", torch.float16)) == torch.float16


def test_linear_in_fp32_off_the_cpu(monkeypatch):
    """Meta tensors stand for a device without fast half precision: one product, its result in the input's dtype."""
    monkeypatch.setitem(precision._DTYPES, "meta", {torch.float16: torch.float32})
    seen = []
    product = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: seen.append(args[0].dtype) or product(*args))
    with torch.no_grad():
        out = linear(torch.ones(3, 8, device="meta", dtype=torch.float16), torch.ones(4, 8, device="meta").half())
    assert (out.dtype, out.shape, seen) == (torch.float16, (3, 4), [torch.float32])


def test_fp64_on_a_device_without():
    matrix = torch.eye(2)
    moved = SimpleNamespace(device=torch.device("mps"), cpu=lambda: matrix)
    assert randomized_svd._in_fp64(moved).dtype == torch.float64


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_autocast(device):
    x = torch.ones(2, 2, device=device)
    with torch.autocast("cpu", torch.bfloat16), precision.without_autocast(device):
        assert (x @ x).dtype == torch.float32
    assert {"cpu", "cuda", "mps", "xpu"} <= precision._AUTOCAST_DEVICES
