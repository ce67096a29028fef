"""What importers do to a layer, case by case."""

from dataclasses import replace

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.low_bit import decode_int4
from diffusers_sana.loaders.nunchaku.layers import LITE_NAMES, read_awq, read_svdq, svdq_tensors, without_shift
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer, merge_columns, stack_rows
from tests.loaders.nunchaku import nunchaku_files as files
from tests.loaders.nunchaku import nunchaku_formulas as formulas
from tests.numerics import assert_close_fp32


def layer(rows=8, columns=128, rank=3, precision="int4", row_scale=1.0):
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
    groups = columns // (64 if precision == "int4" else 16)
    scales = torch.rand(rows, groups) + 0.5
    return UnpackedLayer(
        codes,
        scales if precision == "int4" else scales.to(torch.float8_e4m3fn),
        None if precision == "int4" else torch.full((rows,), row_scale),
        torch.rand(columns) + 0.5,
        torch.randn(rank, columns),
        torch.randn(rows, rank),
        torch.randn(rows),
    )


def matrix(unpacked):
    return dequantize_weight(**vars(unpacked.to_quantized_weight(torch.float32)), dtype=torch.float32)


def awq_source(codes, scales, zeros):
    tensors = {"x.qweight": formulas.write_awq(codes), "x.wscales": scales.t(), "x.wzeros": zeros.t()}
    return Source(tensors, "a file")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("point", "rank"), [(7, 0), (8, 0), (0, 2), (7.5, 2), (15, 2)])
def test_zeros_of_weight_only_layers(point, rank, dtype):
    """Every zero point; those that codes of -8..7 can make good cost nothing."""
    codes = torch.randint(15 if point == 7 else 16, (8, 128), dtype=torch.uint8)
    scales = (torch.rand(8, 2) + 0.5).to(dtype)
    zeros = (-point * scales.float()).to(dtype)
    unpacked = read_awq(awq_source(codes, scales, zeros), "x", 8, 128)
    assert unpacked.down.shape == (rank, 128)
    exact = zeros.float() if rank else -point * scales.float()  # without the rounding to 16 bits, where it can be told
    expected = (codes.unflatten(1, (2, 64)) * scales.float()[..., None] + exact[..., None]).flatten(1)
    assert_close_fp32(matrix(unpacked), expected)


@pytest.mark.parametrize("point", [7, 7.5])
def test_lora_beside_weight_only_layers(point):
    """In natural order, as Nunchaku adds it to the output of such a layer; with zeros that need a branch or not."""
    scales = torch.rand(8, 2) + 0.5
    codes = torch.randint(15, (8, 128), dtype=torch.uint8)
    source = awq_source(codes, scales, -point * scales)
    without = matrix(read_awq(source, "x", 8, 128))
    down, up = torch.randn(3, 128), torch.randn(8, 3)
    source.tensors |= {"x.lora_down": down, "x.lora_up": up}
    unpacked = read_awq(source, "x", 8, 128)
    assert_close_fp32(matrix(unpacked), without + up @ down)
    rows = torch.randperm(8)
    assert_close_fp32(matrix(unpacked.rows(rows)), (without + up @ down)[rows])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_down": torch.zeros(3, 128)}, "must have 'x.lora_up'"),
        ({"lora_up": torch.zeros(8, 3)}, "must have 'x.lora_down'"),
        ({"lora_down": torch.zeros(3, 64), "lora_up": torch.zeros(8, 3)}, r"'x.lora_down' must have shape \(3, 128\)"),
        ({"lora_down": torch.zeros(3, 128), "lora_up": torch.zeros(8, 2)}, r"'x.lora_up' must have shape \(8, 3\)"),
    ],
)
def test_lora_that_does_not_fit(tensors, message):
    source = awq_source(torch.zeros(8, 128, dtype=torch.uint8), torch.ones(8, 2), torch.zeros(8, 2))
    source.tensors |= {f"x.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        read_awq(source, "x", 8, 128)


def test_groups_of_scale_zero():
    codes = torch.randint(16, (4, 128), dtype=torch.uint8)
    scales = torch.tensor([[0.0, 1.0]]).repeat(4, 1)
    unpacked = read_awq(awq_source(codes, scales, -8 * scales), "x", 4, 128)
    assert unpacked.down.shape[0] == 0
    assert torch.equal(matrix(unpacked), torch.cat([torch.zeros(4, 64), codes[:, 64:].float() - 8], dim=1))


def test_shape_of_weight_only_scales():
    source = awq_source(torch.zeros(8, 128, dtype=torch.uint8), torch.ones(8, 1), torch.ones(8, 2))
    with pytest.raises(ValueError, match=r"'x.wscales' must have shape \(2, 8\), got \(1, 8\)"):
        read_awq(source, "x", 8, 128)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_what_a_file_may_leave_out(precision):
    """The low-rank branch, and NVFP4's scales other than those of groups."""
    written = files.quantize(torch.randn(100, 200), None, precision)
    optional = ("lora_down", "lora_up", "wtscale")
    least = {f"x.{name}": value for name, value in written.tensors.items() if name not in optional}
    unpacked = read_svdq(Source(least, "a file"), "x", 100, 200)
    assert unpacked.down.shape == (0, 200)
    scale = written.tensors.get("wtscale", torch.ones(1))
    assert_close_fp32(matrix(unpacked) * scale.float(), written.residual.float())
    with pytest.raises(ValueError, match=r"must have 'x.lora_up'"):
        read_svdq(Source(least | {"x.lora_down": written.tensors["lora_down"]}, "a file"), "x", 100, 200)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_weights_in_the_padding(precision):
    """Such as the channel 5632 of a file that is opened with 5631 channels."""
    written = files.quantize(torch.randn(100, 200), None, precision)
    source = Source({f"x.{name}": value for name, value in written.tensors.items()}, "a file")
    for shape in ((99, 200), (100, 199)):
        with pytest.raises(ValueError, match=r"'x.qweight' must have the shape .* before padding, got weights beyond"):
            read_svdq(source, "x", *shape)
    assert_close_fp32(matrix(read_svdq(source, "x", 100, 200)), written.matrix)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_merged_layers_add_up(precision):
    first, second = layer(precision=precision, row_scale=0.3), layer(8, 192, 2, precision, row_scale=0.7)
    merged = merge_columns(first, second, "x")
    assert_close_fp32(matrix(merged), torch.cat([matrix(first), matrix(second)], dim=1))
    assert_close_fp32(merged.bias, first.bias + second.bias)
    assert torch.equal(merge_columns(replace(first, bias=None), second, "x").bias, second.bias)
    assert merge_columns(replace(first, bias=None), replace(second, bias=None), "x").bias is None


def test_layers_that_cannot_be_merged():
    with pytest.raises(ValueError, match=r"'x' .* 100 features, must be a multiple of the group size 64"):
        merge_columns(layer().columns(100), layer(), "x")
    with pytest.raises(ValueError, match=r"'x' .* have the format of the second"):
        merge_columns(layer(), layer(precision="nvfp4"), "x")
    second = layer(precision="nvfp4")
    second = replace(second, row_scales=torch.linspace(1, 2, 8))
    with pytest.raises(ValueError, match=r"must have the same ratio in all rows, got 0.5 to 1.0"):
        merge_columns(layer(precision="nvfp4"), second, "x")


def test_shift():
    """The stored bias and a shifted input to the 4-bit part give what the plain bias and the plain input give."""
    stored = layer(columns=200)
    stored = replace(stored, scales=torch.rand(8, 4) + 0.5)
    residual = decode_int4(stored.codes) * stored.scales.repeat_interleave(64, 1)[:, :200] / stored.smooth
    x = torch.randn(5, 200)
    low = x @ stored.down.t() @ stored.up.t()
    expected = (x + 0.171875) @ residual.t() + low + stored.bias
    plain = without_shift(stored)
    assert_close_fp32(x @ matrix(plain).t() + plain.bias.float(), expected)
    for unshifted in (layer(precision="nvfp4"), replace(stored, bias=None)):
        assert without_shift(unshifted) is unshifted


def test_columns_and_rows():
    whole = layer(8, 192)
    index = torch.tensor([5, 0])
    assert_close_fp32(matrix(whole.columns(100).rows(index)), matrix(whole)[index][:, :100])
    assert whole.columns(100).to_quantized_weight(torch.float32).wscales.shape == (8, 2)


def test_what_16_bits_would_round_stays_fp32():
    unpacked = layer(precision="nvfp4")
    native = unpacked.to_quantized_weight(torch.bfloat16)
    assert native.smooth_factor.dtype == torch.float32
    assert native.wtscale.dtype == native.proj_up.dtype == torch.bfloat16
    rounded = replace(unpacked, row_scales=torch.full((8,), 0.3), smooth=unpacked.smooth.bfloat16())
    native = rounded.to_quantized_weight(torch.bfloat16)
    assert native.smooth_factor.dtype == torch.bfloat16
    assert native.wtscale.dtype == torch.float32


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize(("rows", "columns"), [(100, 192), (300, 128), (256, 80)])
def test_written_layers(precision, rows, columns):
    """Also at sides that are no multiple of 128: the same numbers come back, and no kernel divides by a zero."""
    item = layer(rows, columns if precision == "nvfp4" else formulas.ceil(columns, 64), 16, precision, row_scale=0.5)
    item = item.columns(columns)
    tensors = svdq_tensors(item, torch.float32)
    high, wide = formulas.ceil(rows, 128), formulas.ceil(columns, 128)
    assert tensors["wscales"].shape == (wide // item.group_size, high)
    for name in ("smooth_factor", "wscales", "wcscales"):
        assert (tensors.get(name, torch.ones(1)).float() != 0).all(), name
    source = Source({f"x.{name}": tensor for name, tensor in tensors.items()}, "a file")
    again = read_svdq(source, "x", rows, columns, LITE_NAMES)
    assert_same(again, item)


def assert_same(actual, expected):
    for name, tensor in vars(expected).items():
        other = getattr(actual, name)
        if isinstance(tensor, torch.Tensor):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            if tensor.dtype == torch.float8_e4m3fn:
                other, tensor = other.view(torch.uint8), tensor.view(torch.uint8)
            assert torch.equal(other, tensor), name
        else:
            assert other == tensor, name


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_stacked_layers(precision):
    parts = [layer(precision=precision), layer(12, rank=2, precision=precision)]
    parts[1].smooth = parts[0].smooth
    parts[1].bias = None
    stacked = stack_rows(parts, "x")
    assert stacked.rank == 5
    assert_close_fp32(matrix(stacked), torch.cat([matrix(part) for part in parts]))
    assert torch.equal(stacked.bias, torch.cat([parts[0].bias, torch.zeros(12)]))
    shared = stack_rows([stacked.rows(slice(8)), stacked.rows(slice(8, None))], "x")
    assert_same(shared, stacked)
    with pytest.raises(ValueError, match=r"'x' cannot be fused: its parts must have the same smoothing factors"):
        stack_rows([parts[0], layer(precision=precision)], "x")
    other = layer(precision="nvfp4" if precision == "int4" else "int4")
    with pytest.raises(ValueError, match=r"'x' cannot be fused: its parts must have one format"):
        stack_rows([parts[0], other], "x")


def test_branches_with_one_up_projection_are_merged_without_a_higher_rank():
    first, second = layer(), layer()
    second.up = first.up
    merged = merge_columns(first, second, "x")
    assert merged.rank == first.rank
    assert_close_fp32(matrix(merged), torch.cat([matrix(first), matrix(second)], dim=1))
