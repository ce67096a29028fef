"""The branch that is the best for given inputs, against exact decompositions and on inputs it has not seen."""

from dataclasses import replace

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight_reference
from diffusers_sana.quantizers.svdquant.algorithm import decompose as module
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd, weighted_svd
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from tests.numerics import assert_close_fp32, relative_error


def spread(features, decades=1.5):
    """A map of white noise to inputs that mostly lie in some directions, which are not those of the channels."""
    directions = torch.linalg.qr(torch.randn(features, features)).Q
    return directions * torch.logspace(0, -decades, features)


def output_error(item, x, weight):
    parts = (item.qweight, item.wscales, item.wtscale, item.smooth_factor, item.proj_down, item.proj_up)
    return relative_error(x @ dequantize_weight_reference(*parts, torch.float32).t(), x @ weight.t())


def test_weighted_svd_is_the_best_for_its_inputs():
    matrix, factor = torch.randn(60, 80) * torch.logspace(0, -1, 80), spread(80)
    up, down = weighted_svd(matrix, 12, 0, factor @ factor.t())
    best = torch.linalg.svdvals((matrix @ factor).double())[12:].norm()
    error = ((matrix - up @ down) @ factor).norm()
    assert error < 1.01 * best
    plain_up, plain_down = randomized_svd(matrix, 12, 0)
    assert ((matrix - plain_up @ plain_down) @ factor).norm() > 1.2 * error
    assert_close_fp32(down.norm(dim=1), torch.ones(12))


def test_weighted_svd_makes_no_input_worse():
    # Also in directions that the covariance does not have.
    matrix, seen = torch.randn(48, 64), torch.randn(5, 64)
    up, down = weighted_svd(matrix, 8, 0, seen.t() @ seen)
    x = torch.randn(500, 64)
    assert ((x @ (matrix - up @ down).t()).norm(dim=1) <= (x @ matrix.t()).norm(dim=1) * 1.0001).all()
    assert relative_error(seen @ (up @ down).t(), seen @ matrix.t()) < 1e-4
    nothing = weighted_svd(matrix, 8, 0, torch.zeros(64, 64))
    assert all(part.isfinite().all() for part in nothing)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("tokens", [2048, 96], ids=["many", "fewer than channels"])
def test_hessian_helps_on_other_inputs(precision, tokens):
    weight, factor = torch.randn(96, 192), spread(192, decades=3)
    x, other = torch.randn(tokens, 192) @ factor.t(), torch.randn(512, 192) @ factor.t()
    options = LayerConfig(precision, rank=16, smoothing="none", mode="w4a16")
    (plain,), _ = decompose([weight], options, inputs=x)
    (fitted,), _ = decompose([weight], options, inputs=x, hessian=x.t() @ x)
    assert output_error(fitted, x, weight) < 0.85 * output_error(plain, x, weight)
    assert output_error(fitted, other, weight) < 0.9 * output_error(plain, other, weight)


def test_a_round_that_makes_it_worse_is_dropped(monkeypatch):
    """All roundings but the first are spoilt: the first one's codes and their branch stay."""
    rounded, results = module._rounded, []

    def spoilt(*args):
        item = rounded(*args)
        results.append(replace(item, wscales=item.wscales * 1.5) if results else item)
        return results[-1]

    weight, smooth = torch.randn(48, 64), torch.ones(64)
    expected = module.fit_weight(weight, smooth, torch.float32, LayerConfig(rank=8, refinements=1))
    monkeypatch.setattr(module, "_rounded", spoilt)
    actual = module.fit_weight(weight, smooth, torch.float32, LayerConfig(rank=8, refinements=9))
    assert len(results) == 1 + module.PATIENCE["weight"]
    assert all(torch.equal(value, actual.tensors()[name]) for name, value in expected.tensors().items())


def test_rounds_end_where_they_no_longer_pay(monkeypatch):
    weight, smooth = torch.randn(96, 128), torch.ones(128)
    rounds, errors = [], {}
    rounded = module._rounded
    monkeypatch.setattr(module, "_rounded", lambda *args: rounds.append(0) or rounded(*args))
    for refinements in (2, 20, 1000):
        rounds.clear()
        item = module.fit_weight(weight, smooth, torch.float32, LayerConfig(rank=8, refinements=refinements))
        errors[refinements] = relative_error(item.residual() + item.proj_up @ item.proj_down, weight)
    assert len(rounds) < 40
    assert errors[1000] <= errors[20] < 0.95 * errors[2]


def test_scale_of_the_hessian_does_not_matter():
    weight, x = torch.randn(32, 64), torch.randn(256, 64) @ spread(64)
    options = LayerConfig(rank=8)
    errors = [decompose([weight], options, x, hessian=x.t() @ x * scale)[1][0].error for scale in (1e-4, 1.0, 1e4)]
    assert errors == pytest.approx([errors[0]] * 3, rel=0.02)


def test_no_branch_needs_no_hessian():
    assert LayerConfig().uses_hessian
    assert LayerConfig(rank=0, gptq=True).uses_hessian
    assert not LayerConfig(rank=0).uses_hessian
    assert not LayerConfig(refinements=0).uses_hessian


def test_bad_hessian():
    x = torch.randn(16, 64)
    with pytest.raises(ValueError, match="`hessian` must be finite"):
        decompose([torch.randn(64, 64)], LayerConfig(rank=4), inputs=x, hessian=torch.full((64, 64), torch.inf))
