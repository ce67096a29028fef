"""Products of other packages: stand-ins that write their descriptions out, and the real one where it is installed."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from diffusers_sana.evaluation.kernel_checks import checked_kernels
from diffusers_sana.kernels import external
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.low_bit import decode_e2m1, decode_int4
from diffusers_sana.kernels.lowbit_linear import lowbit_linear, lowbit_linear_reference
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from tests.kernels.low_bit_checks import quantized_weight
from tests.loaders.nunchaku.nunchaku_formulas import grid
from tests.numerics import relative_error


M, K, N, R = 5, 192, 24, 4
NAMES = {"comfy-kitchen": "comfy_kitchen", "flashinfer": "flashinfer"}


def neighbours(packed, decode, high_first=False):
    """Bytes to numbers, two neighbours a byte."""
    packed = packed.contiguous().view(torch.uint8)
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack([decode(half).float() for half in halves], -1).flatten(-2)


def grouped(values, scales):
    return values * scales.float().repeat_interleave(values.shape[1] // scales.shape[1], 1)


def in_rows(swizzled, rows, groups):
    """Scales of a block-scaled product, by the address of each."""
    n, g = grid(rows, groups)
    address = (n // 128 * -(-groups // 4) + g // 4) * 512 + n % 32 * 16 + n % 128 // 32 * 4 + g % 4
    return swizzled.contiguous().view(torch.uint8).flatten()[address].view(torch.float8_e4m3fn)


class Package:
    """Both packages, from their descriptions."""

    calls = 0
    factor = 1.0

    def scaled_mm_svdquant_w4a4(self, act, wgt, ascales, wscales, lora_act_in, lora_up, bias=None):
        self.calls += 1
        assert len(act) % 256 == 0
        rows, weight = (
            grouped(neighbours(act, decode_int4), ascales.t()),
            grouped(neighbours(wgt, decode_int4), wscales.t()),
        )
        out = rows @ weight.t() + lora_act_in.float() @ lora_up.float().t()
        return self.factor * (out if bias is None else out + bias).to(lora_up.dtype)

    def scaled_mm_nvfp4(self, a, b, factor_a, factor_b, scales_a, scales_b, out_dtype):
        return (self._nvfp4(a, b, scales_a, scales_b, True) * factor_a * factor_b).to(out_dtype)

    def mm_fp4(self, a, b, scales_a, scales_b, alpha, out_dtype):
        return (self._nvfp4(a, b.t(), scales_a, scales_b.t(), False) * alpha).to(out_dtype)

    def _nvfp4(self, a, b, scales_a, scales_b, high_first):
        self.calls += 1
        groups = a.shape[1] // 8
        a, b = (
            grouped(neighbours(part, decode_e2m1, high_first), in_rows(scales, len(part), groups))
            for part, scales in ((a, scales_a), (b, scales_b))
        )
        return self.factor * a @ b.t()


@pytest.fixture(params=[("comfy-kitchen", "int4"), ("comfy-kitchen", "nvfp4"), ("flashinfer", "nvfp4")], ids="-".join)
def chosen(request, monkeypatch):
    """A package, a format, and its stand-in."""
    name, precision = request.param
    package = Package()
    monkeypatch.setitem(sys.modules, NAMES[name], package)
    return SimpleNamespace(name=name, precision=precision, package=package)


@pytest.fixture(autouse=True)
def no_signatures(monkeypatch):
    monkeypatch.setattr(external, "_REFUSALS", {})
    external._warn_once.cache_clear()


def given(precision, dtype=torch.bfloat16, tokens=M, with_bias=True):
    torch.manual_seed(0)
    weight = quantized_weight(N, K, precision, dtype)
    x, down = torch.randn(tokens, K), torch.randn(R, K)
    codes, scales, low = quantize_lowrank_reference(x, torch.ones(K), down, precision)
    up, bias = torch.randn(N, R).to(dtype), torch.randn(N).to(dtype) if with_bias else None
    return (codes, scales, low, weight["qweight"], weight["wscales"], weight["wtscale"], up, bias)


def run(chosen, arguments, mode=None):
    with kernel_mode(mode or chosen.name):
        return lowbit_linear(*arguments, activation_format=chosen.precision)


def test_checks_of_kernels_name_the_package(chosen):
    """`diffusers-sana verify` says what ran, and holds it to what the first use allows."""
    arguments = given(chosen.precision)
    with checked_kernels() as checks, torch.no_grad():
        run(chosen, arguments)
        chosen.package.factor = 1.1
        run(chosen, arguments)
        run(chosen, given(chosen.precision, tokens=M + 1))  # the first result of these shapes, which is wrong
    ours, reference = checks
    assert (ours.operation, ours.runs, ours.calls, ours.passed) == ("lowbit_linear", chosen.name, 2, True)
    assert ours.limit == external.TOLERANCE
    assert (reference.runs, reference.why) == ("PyTorch reference", "the tensors are on the CPU")


@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_ours(chosen, with_bias, caplog):
    arguments = given(chosen.precision, with_bias=with_bias)
    expected = lowbit_linear_reference(*arguments, activation_format=chosen.precision)
    for calls in (2, 3):  # the first is compared, and made again
        assert relative_error(run(chosen, arguments), expected) < 0.01
        assert chosen.package.calls == calls
    for mode in ("auto", "torch"):
        assert torch.equal(run(chosen, arguments, mode), expected)
    assert chosen.package.calls == 3
    assert not caplog.text


def test_wrong_results_are_not_used(chosen, caplog):
    """Of signatures that are seen for the first time. The reason is given once."""
    arguments, others = given(chosen.precision), given(chosen.precision, tokens=M + 1)
    run(chosen, arguments)
    chosen.package.factor = 1.1
    for _ in range(2):
        expected = lowbit_linear_reference(*others, activation_format=chosen.precision)
        assert torch.equal(run(chosen, others), expected)
    assert chosen.package.calls == 3
    assert len(caplog.records) == 1
    assert f"{chosen.name} is not used for products in {chosen.precision}: its result differs" in caplog.text
    run(chosen, arguments)
    assert chosen.package.calls == 4


@pytest.mark.parametrize(
    ("package", "reason"),
    [(None, "it cannot be imported (import of"), (SimpleNamespace(), "AttributeError: ")],
    ids=["not installed", "without the product"],
)
def test_ours_runs_without_theirs(chosen, package, reason, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, NAMES[chosen.name], package)
    arguments = given(chosen.precision)
    expected = lowbit_linear_reference(*arguments, activation_format=chosen.precision)
    for _ in range(2):
        assert torch.equal(run(chosen, arguments), expected)
    assert len(caplog.records) == 1
    assert f"{chosen.name} is not used for products in {chosen.precision}: {reason}" in caplog.text


def test_a_result_of_another_shape(chosen, monkeypatch, caplog):
    arguments = given(chosen.precision)
    monkeypatch.setitem(external.PRODUCTS, (chosen.name, chosen.precision), lambda *_: torch.zeros(M, N))
    run(chosen, arguments)
    assert "its result is torch.float32 [5, 24], not torch.bfloat16 [5, 24]" in caplog.text


def test_nothing_is_compared_in_a_recording(chosen, monkeypatch):
    """Which may not wait for the GPU; the next call does."""
    arguments = given(chosen.precision)
    with monkeypatch.context() as recording:
        recording.setattr(external, "_is_recorded", lambda device: True)
        run(chosen, arguments)
    assert chosen.package.calls == 0
    run(chosen, arguments)
    assert chosen.package.calls == 2


def test_is_one_operator(monkeypatch):
    """Which tracing keeps whole, without a call of the package."""
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    arguments = given("int4")

    def function(*values):
        return lowbit_linear(*values[:5], None, *values[5:], activation_format="int4")

    with kernel_mode("comfy-kitchen"), torch.no_grad():
        traced = make_fx(function, tracing_mode="fake")(*(part for part in arguments if part is not None))
    called = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in called] == ["diffusers_sana.external_linear.inference"]
    assert (called[0].meta["val"].shape, called[0].meta["val"].dtype) == ((M, N), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_comfy_kitchen_itself(dtype, caplog):
    """On a CPU its int4 product in PyTorch."""
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    arguments = given("int4", dtype)
    with kernel_mode("comfy-kitchen"):
        out = lowbit_linear(*arguments, activation_format="int4")
    assert not caplog.text
    expected = lowbit_linear_reference(*arguments, activation_format="int4")
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else 0.01)
    assert list(external._REFUSALS.values()) == [None]
