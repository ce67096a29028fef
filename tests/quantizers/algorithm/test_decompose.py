"""One layer to 4 bits: what each part of SVDQuant contributes, and that nothing but the arguments decides."""

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight_reference
from diffusers_sana.kernels.lowbit_linear import lowbit_linear_reference
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from diffusers_sana.quantizers.svdquant.algorithm import decompose as module
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from tests.numerics import assert_close_fp32, relative_error


def outliers(tokens, inputs, outputs, channels=32):
    """Inputs of which some channels are 30 times the others, and a weight."""
    x = torch.randn(tokens, inputs)
    x[:, torch.randperm(inputs)[:channels]] *= 30
    return x, torch.randn(outputs, inputs) * 0.02


def dense(item):
    parts = (item.qweight, item.wscales, item.wtscale, item.smooth_factor, item.proj_down, item.proj_up)
    return dequantize_weight_reference(*parts, torch.float32)


def w4a4(x, item, precision):
    codes, scales, low = quantize_lowrank_reference(x, item.smooth_factor, item.proj_down, precision)
    weight = (item.qweight, item.wscales, item.wtscale, item.proj_up)
    return lowbit_linear_reference(codes, scales, low, *weight, activation_format=precision)


def test_outliers_at_the_size_of_a_real_layer():
    # A plain rank-32 branch with exponents 1/2 leaves .053 of the output, and .039 with 16-bit activations.
    x, weight = outliers(2048, 3072, 1024)
    (item,), (report,) = decompose([weight], LayerConfig(), inputs=x)
    target = x @ weight.t()
    error = relative_error(w4a4(x, item, "int4"), target)
    assert error < 0.053
    assert relative_error(x @ dense(item).t(), target) < 0.039
    assert report.error == pytest.approx(error, rel=0.05)
    assert report.naive_error > 2.5 * error


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_smoothing_and_branch_need_each_other(precision):
    x, weight = outliers(256, 1024, 512, channels=16)
    errors = {
        (rank, smoothing): decompose([weight], LayerConfig(precision, rank, smoothing), inputs=x)[1][0].error
        for rank in (0, 16)
        for smoothing in ("none", "search")
    }
    naive, both = errors[0, "none"], errors[16, "search"]
    assert errors[16, "none"] > 0.9 * naive
    assert both < 0.75 * errors[0, "search"] < 0.75 * naive


def test_a_part_of_the_features_is_enough_to_choose(monkeypatch):
    x, weight = outliers(256, 256, 4 * module.SCORED_FEATURES, channels=8)
    _, (some,) = decompose([weight], LayerConfig(rank=8), inputs=x)
    monkeypatch.setattr(module, "SCORED_FEATURES", 10**6)
    _, (every,) = decompose([weight], LayerConfig(rank=8), inputs=x)
    assert some.exponents == pytest.approx(every.exponents, abs=0.125)  # the finer step: errors differ little
    assert some.error == pytest.approx(every.error, rel=0.05)


def test_layers_of_one_input_share_the_smoothing():
    x, weight = outliers(64, 128, 96, channels=4)
    items, reports = decompose([weight, weight[:32] * 5], LayerConfig(rank=4), inputs=x)
    assert torch.equal(items[0].smooth_factor, items[1].smooth_factor)
    assert reports[0].exponents == reports[1].exponents
    assert [item.qweight.shape[0] for item in items] == [96, 32]


def test_largest_magnitudes_come_from_all_data(monkeypatch):
    monkeypatch.setattr(module, "_pattern_search", lambda *args: ((0.5, 0.25), 0.0))
    x, weight = outliers(64, 128, 96, channels=4)
    largest = x.abs().amax(0)
    quiet = largest.argmin()
    largest[quiet] *= 4  # in a call that the sample misses
    (plain,), _ = decompose([weight], LayerConfig(rank=4), inputs=x)
    (item,), _ = decompose([weight], LayerConfig(rank=4), inputs=x, largest=largest)
    ratio = item.smooth_factor / plain.smooth_factor
    assert ratio[quiet] / ratio[quiet - 1] == pytest.approx(4**0.5, rel=1e-4)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_data(precision, dtype):
    weight = (torch.randn(48, 100) * 0.02).to(dtype)  # K is no multiple of a group
    (item,), (report,) = decompose([weight], LayerConfig(precision, rank=8))
    assert relative_error(dense(item), weight.float()) < 0.11
    assert report.exponents[0] == 0
    assert {item.smooth_factor.dtype, item.proj_down.dtype, item.proj_up.dtype} == {dtype}


def test_exponents_are_searched_between_the_coarse_ones():
    scores = []

    def score(a, b):
        scores.append((a, b))
        return (a - 0.6) ** 2 + (b - 0.15) ** 2

    coarse = [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5)]
    assert module._pattern_search(score, coarse, [(1, 0), (0, 1)], [0.25, 0.125])[0] == (0.625, 0.125)
    assert len(scores) == len(set(scores)) < 20
    assert all(0 <= value <= 1 for pair in scores for value in pair)
    assert module._pattern_search(score, coarse, [(0, 1)], [0.25, 0.125])[0] == (0.5, 0.125)


def test_candidates_are_compared_in_the_mode_that_will_run():
    # A channel of large outliers costs a lot where activations have 4 bits, and nothing where they have 16.
    x, weight = outliers(256, 128, 96, channels=2)
    items = {mode: decompose([weight], LayerConfig(rank=4, mode=mode), inputs=x)[0][0] for mode in ("w4a4", "w4a16")}
    for mode, other in (("w4a4", "w4a16"), ("w4a16", "w4a4")):
        errors = {name: module.relative_error(item, weight, x, mode) for name, item in items.items()}
        assert errors[mode] < 0.95 * errors[other]


def test_best_is_better():
    x, weight = outliers(512, 256, 128, channels=4)
    x = x @ torch.linalg.qr(torch.randn(256, 256)).Q * torch.logspace(0, -1, 256)
    other = x[256:]
    errors = {}
    for quality in ("default", "best"):
        config = LayerConfig(rank=8, mode="w4a16", quality=quality)
        (item,), (report,) = decompose([weight], config, inputs=x[:256], hessian=x[:256].t() @ x[:256])
        errors[quality] = module.relative_error(item, weight, other, "w4a16")
        assert report.gptq == (quality == "best")
    assert errors["best"] < 0.97 * errors["default"]


def test_refinements_lower_the_error():
    weight = torch.randn(96, 128) * torch.logspace(0, -1.5, 128)
    errors = []
    for refinements in (0, 8):
        (item,), _ = decompose([weight], LayerConfig(rank=8, smoothing="none", refinements=refinements))
        errors.append(relative_error(dense(item), weight))
    assert errors[1] < errors[0]


def test_same_seed_same_bits():
    weight = torch.randn(64, 128)
    first, second, other = (decompose([weight], LayerConfig(rank=8, seed=seed))[0][0].tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["proj_down"], other["proj_down"])


def test_weights_of_zeros():
    (item,), (report,) = decompose([torch.zeros(64, 64)], LayerConfig(rank=4))
    assert dense(item).count_nonzero() == 0
    assert report.error == report.naive_error == 0


def test_randomized_svd():
    left, right = (torch.linalg.qr(torch.randn(n, 60)).Q for n in (200, 150))
    values = torch.logspace(2, -1, 60)
    matrix = (left * values) @ right.t()
    up, down = randomized_svd(matrix, 20, seed=0)
    assert_close_fp32(down @ down.t(), torch.eye(20))
    best = values[20:].norm()
    assert (matrix - up @ down).norm() < 1.01 * best
    assert [part.shape for part in randomized_svd(matrix, 0, seed=0)] == [(200, 0), (0, 150)]


def test_parts_and_devices_of_a_quantized_weight():
    for precision in ("int4", "nvfp4"):
        (item,), _ = decompose([torch.randn(64, 64)], LayerConfig(precision, rank=4))
        assert torch.equal(dense(item.rows(slice(None, None, 3))), dense(item)[::3])
        assert item.to("meta").qweight.is_meta


def test_bad_input():
    weight = torch.randn(64, 64)
    broken = weight.clone()
    broken[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"`weights\[1\]` must be finite"):
        decompose([weight, broken], LayerConfig(rank=4))
    with pytest.raises(ValueError, match="`inputs` must be finite"):
        decompose([weight], LayerConfig(rank=4), inputs=broken)
    with pytest.raises(ValueError, match="`gptq=True` needs calibration data"):
        decompose([weight], LayerConfig(rank=4, gptq=True), inputs=weight)
