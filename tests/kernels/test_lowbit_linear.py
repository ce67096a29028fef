"""The low-bit product: the reference by the numbers that codes stand for, the kernel by the reference in float64."""

import importlib

import pytest
import torch

from diffusers_sana.kernels import lowbit_linear as operation
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.kept import forget, kept_changes
from diffusers_sana.kernels.low_bit import decode_e2m1, decode_weight, requantize_rows, unpack_nibbles
from diffusers_sana.kernels.lowbit_linear import lowbit_linear, lowbit_linear_reference
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from tests.kernels.kernel_checks import DEVICE, DTYPES
from tests.kernels.low_bit_checks import PRECISIONS, check_compiled, quantized_weight
from tests.numerics import assert_close_fp32, assert_kernel


PAIRS = [
    ("int4", "int4"),
    ("int4", "int8"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "int8"),
    ("int8", "int8"),
]  # of weight and activations


def tensors(sizes, precision, activation_format, dtype=torch.float32):
    tokens, outputs, features, rank = sizes
    x = torch.randn(tokens, features)
    codes, scales, low = quantize_lowrank_reference(
        x, torch.ones(features), torch.randn(rank, features), activation_format
    )
    weight = quantized_weight(outputs, features, precision, dtype)
    given = {"codes": codes, "scales": scales, "low": low}
    given |= {"proj_up": torch.randn(outputs, rank).to(dtype), "bias": torch.randn(outputs).to(dtype)}
    return {name: tensor.to(DEVICE) for name, tensor in given.items()} | weight


def formula(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, activation_format):
    if activation_format == "nvfp4":
        codes = decode_e2m1(unpack_nibbles(codes, 16))
    x = (codes.double().unflatten(-1, (scales.shape[-1], -1)) * scales.double()[..., None]).flatten(-2)
    weight = decode_weight(qweight, wscales, wtscale).double()
    if activation_format == "int8":
        weight, rows = requantize_rows(qweight, wscales, wtscale)
        weight = weight.double() * rows.double()[:, None]
    out = x @ weight.t() + low.double() @ proj_up.double().t()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize(("precision", "activation_format"), PAIRS)
def test_equals_the_formula(precision, activation_format):
    given = tensors((5, 9, 100, 3), precision, activation_format)
    exact = formula(**given, activation_format=activation_format)
    assert_close_fp32(lowbit_linear(**given, activation_format=activation_format), exact)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_int8_is_close_to_the_weight_itself(precision):
    """What w4a8 adds to 4-bit rounding is below one percent."""
    given = tensors((16, 24, 256, 0), precision, "int8") | {"bias": None}
    x = given["codes"].double() * given["scales"].double()
    exact = x @ decode_weight(given["qweight"], given["wscales"], given["wtscale"]).double().t()
    out = lowbit_linear(**given, activation_format="int8").double()
    assert (out - exact).norm() < 0.01 * exact.norm()


def test_wrong_arguments():
    given = tensors((1, 2, 64, 0), "nvfp4", "nvfp4")
    with pytest.raises(ValueError, match="`activation_format` must be 'int8' or the weight's own format 'nvfp4'"):
        lowbit_linear(**given, activation_format="int4")


def check_kernel(given, activation_format):
    options = {"activation_format": activation_format}
    with kernel_mode("triton"):
        actual = lowbit_linear(**given, **options)
        assert torch.equal(actual, lowbit_linear(**given, **options))
    exact = lowbit_linear_reference(**given, **options, dtype=torch.float64)
    assert_kernel(actual, lowbit_linear_reference(**given, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("precision", "activation_format"), PAIRS)
def test_kernel(precision, activation_format, dtype):
    """NVFP4 against NVFP4 is in fp16 here; on a GPU with such tensor cores the same test takes those."""
    check_kernel(tensors((37, 67, 200, 32), precision, activation_format, dtype), activation_format)


@pytest.mark.parametrize("sizes", [(1, 3, 64, 0), (2, 1, 128, 5), (130, 141, 192, 40)], ids=str)
@pytest.mark.parametrize(("precision", "activation_format"), PAIRS)
def test_kernel_of_other_sizes(precision, activation_format, sizes):
    """One token, no rank; several blocks of tokens and outputs, whose weight is made int8 before."""
    check_kernel(tensors(sizes, precision, activation_format), activation_format)


def test_kernel_without_a_bias():
    check_kernel(tensors((9, 20, 64, 5), "nvfp4", "nvfp4") | {"bias": None}, "nvfp4")


def test_kernel_with_the_blocks_of_other_architectures(monkeypatch):
    module = importlib.import_module("diffusers_sana.kernels.triton.lowbit_linear")
    monkeypatch.setattr(module, "PROGRAMS", 1)
    given = tensors((260, 130, 128, 5), "int4", "int8", torch.float16)
    assert module._launch_config(260, 128, 130, "int8", False, "tf32", 90)[:3] == (128, 256, 128)
    for target in (80, 90):
        monkeypatch.setattr(module, "architecture", lambda target=target: target)
        check_kernel(given, "int8")


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_kernel_requantizes_to_the_reference_s_codes(precision):
    """All of them, also those of numbers half way between two."""
    module = importlib.import_module("diffusers_sana.kernels.triton.requantize_rows")
    parts = quantized_weight(21, 320, precision, torch.float16)
    weight, rows = module.requantize_rows(**parts)
    expected = requantize_rows(**parts)
    assert torch.equal(weight, expected[0])
    assert torch.equal(rows, expected[1])


def test_kernel_takes_the_code_that_we_never_write():
    """int4 has a -8; as an int8 of its row it saturates, as in the reference."""
    given = tensors((3, 5, 64, 0), "int4", "int8")
    given["qweight"].fill_(0x87)
    check_kernel(given, "int8")
    check_kernel(
        {name: torch.cat([x] * 30) if name in ("codes", "scales", "low") else x for name, x in given.items()}, "int8"
    )


def test_no_tokens():
    given = tensors((1, 6, 64, 2), "int4", "int8")
    given |= {name: given[name][:0] for name in ("codes", "scales", "low")}
    assert lowbit_linear(**given, activation_format="int8").shape == (0, 6)


@pytest.mark.parametrize(("precision", "activation_format"), PAIRS)
def test_kernel_is_an_operator(precision, activation_format):
    check_compiled(
        lowbit_linear, tensors((3, 5, 100, 4), precision, activation_format), activation_format=activation_format
    )


@pytest.fixture
def conversions(monkeypatch):
    """The weights that are converted to int8 by the kernel."""
    module = importlib.import_module("diffusers_sana.kernels.triton.requantize_rows")
    product = importlib.import_module("diffusers_sana.kernels.triton.lowbit_linear")
    convert, converted = module.requantize_rows, []

    def spy(qweight, *scales):
        converted.append(qweight)
        return convert(qweight, *scales)

    for place in (module, product):
        monkeypatch.setattr(place, "requantize_rows", spy)
    return converted


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_int8_copy_is_made_once(precision, conversions):
    """The bits are those of a conversion at each call; a changed weight is converted again."""
    given = tensors((65, 9, 128, 3), precision, "int8")

    def out(**options):
        with kernel_mode("triton"):
            return lowbit_linear(**given, activation_format="int8", **options)

    expected = out()
    assert torch.equal(out(), expected)
    assert len(conversions) == 2
    for _ in range(3):
        assert torch.equal(out(keep_int8=True), expected)
    assert len(conversions) == 3
    assert given["qweight"] in operation._INT8
    before = kept_changes()
    given["wscales"].copy_(given["wscales"].float() / 2)
    changed = out()
    assert not torch.equal(changed, expected)
    assert torch.equal(out(keep_int8=True), changed)
    assert (len(conversions), kept_changes()) == (5, before + 1)
    forget(given["qweight"])
    assert given["qweight"] not in operation._INT8
    assert kept_changes() == before + 2
    size = len(operation._INT8)
    out(keep_int8=True)
    assert len(operation._INT8) == size + 1
    conversions.clear()
    del given["qweight"]
    assert len(operation._INT8) == size  # a copy lives as long as its weight


def test_no_int8_copy_without_room_or_for_few_tokens(conversions, monkeypatch):
    given = tensors((70, 9, 128, 0), "int4", "int8")
    options = {"activation_format": "int8", "keep_int8": True}
    few = given | {name: given[name][:64] for name in ("codes", "scales", "low")}
    with kernel_mode("triton"):
        lowbit_linear(**few, **options)
        assert (conversions, given["qweight"] in operation._INT8) == ([], False)
        free = operation.ROOM * 2 * given["qweight"].numel()
        monkeypatch.setattr(operation, "_free_bytes", lambda device: free - 1)
        without = [lowbit_linear(**given, **options) for _ in range(2)]
        assert len(conversions) == 2  # at each call
        forget(given["qweight"])
        monkeypatch.setattr(operation, "_free_bytes", lambda device: free)
        assert all(torch.equal(lowbit_linear(**given, **options), out) for out in without)
        assert len(conversions) == 3


def test_int8_copy_in_compiled_code(conversions):
    given = tensors((66, 9, 128, 3), "int4", "int8")
    check_compiled(lowbit_linear, given, activation_format="int8", keep_int8=True)
    assert len(conversions) == 1
