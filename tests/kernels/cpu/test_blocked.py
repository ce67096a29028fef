"""Blocked implementations against the whole operation in float64, with several blocks of which the last is smaller."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_sana.kernels.cpu import blocked
from diffusers_sana.kernels.glu_mb_conv import glu_mb_conv
from diffusers_sana.kernels.precision import arithmetic_dtype
from tests.numerics import assert_close_fp32, relative_error


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_in_pieces(monkeypatch, has_bias):
    monkeypatch.setattr(blocked, "WEIGHT_PIECE", 16 * 24)
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(40, 24), torch.randn(40) if has_bias else None
    pieces = []

    def rows(piece):
        pieces.append(weight[piece])
        return pieces[-1]

    out = blocked.linear_in_pieces(x, rows, 40, bias)
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    assert_close_fp32(out, F.linear(x.double(), weight.double(), None if bias is None else bias.double()))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_glu_mb_conv_in_groups_of_channels(monkeypatch, dtype, has_bias):
    monkeypatch.setattr(blocked, "MIN_CHANNELS", 4)
    monkeypatch.setattr(blocked, "CHANNEL_GROUP", 1)
    monkeypatch.setattr("diffusers_sana.kernels.glu_mb_conv.LARGE_IMAGE", 0)
    features = 11  # groups of 3, 4 and 4
    expand, depthwise = torch.randn(2 * features, 6), torch.randn(2 * features, 1, 3, 3)
    biases = [torch.randn(2 * features).to(dtype) if has_bias else None for _ in range(2)]
    x, expand, depthwise, project = (
        tensor.to(dtype) for tensor in (torch.randn(2, 5, 7, 6), expand, depthwise, torch.randn(3, features))
    )
    groups, convolve = [], F.conv2d
    monkeypatch.setattr(
        F, "conv2d", lambda *args, **kwargs: groups.append(kwargs["groups"]) or convolve(*args, **kwargs)
    )
    with torch.no_grad():
        out = glu_mb_conv(x, expand, biases[0], depthwise, biases[1], project)
    assert groups == [3, 3, 4, 4, 4, 4]

    wide = [None if bias is None else bias.double() for bias in biases]
    hidden = F.silu(F.linear(x.double(), expand.double(), wide[0])).movedim(-1, 1)
    hidden = convolve(hidden, depthwise.double(), wide[1], padding=1, groups=2 * features).movedim(1, -1)
    expected = (hidden[..., :features] * F.silu(hidden[..., features:])) @ project.double().t()
    assert out.dtype == dtype
    # A processor that computes in bf16 rounds what is between the products, too.
    rounds_between = arithmetic_dtype(x) == torch.bfloat16
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else 1e-2 if rounds_between else 3e-3)
