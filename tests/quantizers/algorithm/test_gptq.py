"""GPTQ against plain rounding and against its definition, column by column with exact inverses."""

from dataclasses import replace

import pytest
import torch

from diffusers_sana.kernels.low_bit import decode_weight, encode_weight, group_scales, weight_scales
from diffusers_sana.quantizers.svdquant.algorithm.decompose import Inputs, compensated, damped, decompose
from diffusers_sana.quantizers.svdquant.algorithm.gptq import DAMPING, Compensation
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from tests.numerics import relative_error


def correlated(tokens, features):
    return torch.randn(tokens, features) @ torch.randn(features, features) / features**0.5


def gptq_codes(weight, wscales, wtscale, hessian):
    return Compensation(hessian).codes(weight, wscales, wtscale)


def by_definition(weight, scales, hessian):
    """Optimal brain quantization in the order of the diagonal, in float64: int4 codes."""
    hessian = hessian.double() + DAMPING * hessian.diagonal().mean().double() * torch.eye(len(hessian))
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    open_columns = hessian.diagonal().argsort(descending=True).tolist()
    while open_columns:
        inverse = torch.linalg.inv(hessian[open_columns][:, open_columns])
        column = open_columns[0]
        codes[:, column] = (left[:, column] / scales[:, column]).round().clamp(-7, 7)
        error = left[:, column] - codes[:, column] * scales[:, column]
        left[:, open_columns] -= error[:, None] * inverse[0] / inverse[0, 0]
        del open_columns[0]
    return codes


def test_equals_its_definition():
    weight, x = torch.randn(8, 192), correlated(400, 192)  # more than one block of columns
    wscales, _ = weight_scales(weight, "int4", torch.float32)
    qweight = gptq_codes(weight, wscales, None, x.t() @ x)
    scales = group_scales(wscales, None).repeat_interleave(64, dim=1)
    expected = by_definition(weight, scales.double(), x.t() @ x)
    codes = (decode_weight(qweight, wscales, None) / scales).round()
    assert (codes != expected).float().mean() < 0.01  # a number between two codes may fall on either side


@pytest.mark.parametrize("precision", ["int4", "nvfp4", "int8"])
def test_beats_rounding(precision):
    weight, x = torch.randn(32, 128), correlated(512, 128)
    scales = weight_scales(weight, precision, torch.float32)
    target = x @ weight.t()
    rounded, compensated = (
        relative_error(x @ decode_weight(codes, *scales).t(), target)
        for codes in (encode_weight(weight, *scales), gptq_codes(weight, *scales, x.t() @ x))
    )
    assert compensated < 0.8 * rounded


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_is_rounding_where_inputs_do_not_correlate(precision):
    weight = torch.randn(16, 128)
    scales = weight_scales(weight, precision, torch.float32)
    diagonal = torch.rand(128) + 0.1
    assert torch.equal(gptq_codes(weight, *scales, diagonal.diag()), encode_weight(weight, *scales))


def test_unused_channels_and_padding_have_no_codes():
    weight, x = torch.randn(16, 128), correlated(200, 100)
    weight[:, 100:] = 0
    x[:, 7] = 0
    scales = weight_scales(weight, "int4", torch.float32)
    rounded = decode_weight(gptq_codes(weight, *scales, x.t() @ x), *scales)
    assert rounded[:, [7, *range(100, 128)]].count_nonzero() == 0
    assert rounded[:, :7].count_nonzero() > 0


def test_in_a_layer():
    weight, x = torch.randn(64, 100), correlated(256, 100)
    x[:, 3] *= 40
    errors = {}
    for gptq in (False, True):
        _, (report,) = decompose([weight], LayerConfig(rank=8, gptq=gptq), inputs=x, hessian=x.t() @ x)
        errors[gptq] = report.error
        assert report.gptq == gptq
    assert errors[True] < 0.95 * errors[False]


def test_a_layer_keeps_it_only_where_it_helps_on_other_inputs():
    # Inputs with heavy tails: the compensation fits the few that are large, and is worse for others.
    heavy = torch.distributions.StudentT(1.2).sample((768, 96)).clamp(-1000, 1000)
    x, other, weight = heavy[:96], heavy[96:], torch.randn(64, 96)
    config = LayerConfig(rank=4, smoothing="none", mode="w4a16")
    items = {}
    for gptq in (False, True):
        (items[gptq],), (report,) = decompose([weight], replace(config, gptq=gptq), x, hessian=x.t() @ x)
        assert not report.gptq
    assert all(torch.equal(part, items[True].tensors()[name]) for name, part in items[False].tensors().items())
    hessian = damped(x.t() @ x, 0.3)
    forced = compensated(weight, items[False], config, Inputs(x, hessian), hessian)
    assert relative_error(forced.output(other, "w4a16"), other @ weight.t()) > relative_error(
        items[False].output(other, "w4a16"), other @ weight.t()
    )


def test_few_inputs_are_damped():
    weight, x = torch.randn(16, 64), torch.randn(3, 64)  # a hessian of rank 3
    scales = weight_scales(weight, "int4", torch.float32)
    rounded = decode_weight(gptq_codes(weight, *scales, x.t() @ x), *scales)
    assert relative_error(x @ rounded.t(), x @ weight.t()) < 0.1


def test_bad_hessian():
    weight = torch.randn(16, 64)
    scales = weight_scales(weight, "int4", torch.float32)
    with pytest.raises(ValueError, match="64 input channels cannot be inverted"):
        gptq_codes(weight, *scales, torch.full((64, 64), torch.nan))
