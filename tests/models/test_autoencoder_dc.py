"""`AutoencoderDC` against the diffusers class with equal weights, and the arguments of `encode` and `decode`."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_sana.models.autoencoders.autoencoder_dc import DownBlock, MultiscaleLinearAttention, UpBlock
from tests.models.autoencoder_dc_cases import SMALL, SMALL_RATIO, image, small_model, small_pair
from tests.numerics import assert_close_fp32, relative_error


@pytest.mark.parametrize("name", SMALL)
# At 16 x 32 the deep stages have fewer tokens than a head has channels; there the stock class attends quadratically.
@pytest.mark.parametrize("size", [(48, 80), (16, 32), (16, 16)], ids=str)
@torch.no_grad()
def test_equals_diffusers(name, size):
    ours, stock = small_pair(name)
    x = image(2, *size)

    expected = stock.encode(x).latent
    assert ours.encode(x).latent.is_contiguous()
    assert ours.decode(expected.contiguous()).sample.is_contiguous()
    assert_close_fp32(ours.encode(x).latent, expected)
    assert_close_fp32(ours.decode(expected).sample, stock.decode(expected).sample)
    assert_close_fp32(ours(x).sample, stock(x).sample)


@pytest.mark.parametrize("name", ["sana", "in"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradients_equal_diffusers(name, train):
    ours, stock = small_pair(name)
    x, target = image(2), image(2)
    for model in (ours, stock):
        model.train(train)
        F.mse_loss(model(x).sample, target).backward()

    expected = dict(stock.named_parameters())
    for key, parameter in ours.named_parameters():
        assert_close_fp32(parameter.grad, expected[key].grad, tolerance=1e-4)
    buffers = dict(stock.named_buffers())
    assert all(torch.allclose(buffer, buffers[key]) for key, buffer in ours.named_buffers())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_bfloat16_is_no_worse_than_diffusers(name):
    """By the median over seeds: a denominator near zero in random attention may amplify either's rounding."""
    ratios = []
    for seed in range(7):
        torch.manual_seed(seed)
        ours, stock = small_pair(name)
        x = image(2)
        z = gold_latent = stock.encode(x).latent
        gold_sample = stock.decode(z).sample
        models = [model.to(torch.bfloat16) for model in (ours, stock)]
        x, z = x.bfloat16(), z.bfloat16()
        encoded = [relative_error(model.encode(x).latent, gold_latent) for model in models]
        decoded = [relative_error(model.decode(z).sample, gold_sample) for model in models]
        ratios.append([encoded[0] / encoded[1], decoded[0] / decoded[1]])
    assert (torch.tensor(ratios).median(dim=0).values <= 1.1).all()


@pytest.mark.parametrize("name", ["sana", "in"])
@torch.no_grad()
def test_float16_agrees_with_float32(name):
    model = small_model(name)
    x = image()
    gold = model(x).sample
    assert_close_fp32(model.to(torch.float16)(x.half()).sample.float(), gold, tolerance=5e-3)


def test_attention_of_nothing_is_finite_in_float16():
    """1e-15, the term against division by zero, is zero in fp16."""
    attention = MultiscaleLinearAttention(16, 8, "rms_norm", (5,)).half()
    zeros = torch.zeros(1, 16, 8, 8, dtype=torch.float16)
    assert torch.equal(attention(zeros), zeros)


def test_rows_of_the_projections_interleave_roles():
    """Channel r of [to_q; to_k; to_v] is head r // 3D, role r // D % 3; checked against attention written out."""
    head_dim, num_heads = 4, 3
    channels = head_dim * num_heads
    attention = MultiscaleLinearAttention(channels, head_dim, "rms_norm", ())
    x = torch.randn(1, channels, 3, 5)

    weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    tokens = x.flatten(2)[0].T  # [N, C]
    heads = []
    for head in range(num_heads):
        start = 3 * head_dim * head
        query, key, value = (tokens @ weight[start + head_dim * i : start + head_dim * (i + 1)].T for i in range(3))
        scores = query.relu() @ key.relu().T
        heads.append(scores / (scores.sum(dim=1, keepdim=True) + 1e-15) @ value)
    out = torch.cat(heads, dim=1) @ attention.to_out.weight.T
    out = out / (out.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() + tokens

    assert_close_fp32(attention(x)[0].flatten(1).T, out)


@torch.no_grad()
def shortcut(block, x):
    """What the block adds to its convolution."""
    block.conv.weight.zero_()
    block.conv.bias.zero_()
    return block(x)


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "expected"),
    [
        (4, 4, lambda x: F.avg_pool2d(x, 2)),
        (2, 4, lambda x: x.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2)),
        (1, 4, lambda x: F.pixel_unshuffle(x, 2)),
    ],
    ids=["equal", "double", "quadruple"],
)
@pytest.mark.parametrize("block_type", ["pixel_unshuffle", "Conv"])
def test_down_shortcut(in_channels, out_channels, expected, block_type):
    x = torch.randn(2, in_channels, 6, 4)
    assert_close_fp32(shortcut(DownBlock(in_channels, out_channels, block_type), x), expected(x))


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "channel"),
    [(4, 4, lambda c, i, j: c), (4, 2, lambda c, i, j: 2 * c + i), (4, 1, lambda c, i, j: 2 * i + j)],
    ids=["equal", "half", "quarter"],
)
@pytest.mark.parametrize("block_type", ["pixel_shuffle", "interpolate"])
def test_up_shortcut(in_channels, out_channels, channel, block_type):
    x = torch.randn(2, in_channels, 3, 5)
    expected = torch.empty(2, out_channels, 6, 10)
    for c in range(out_channels):
        for i in range(2):
            for j in range(2):
                expected[:, c, i::2, j::2] = x[:, channel(c, i, j)]
    assert torch.equal(shortcut(UpBlock(in_channels, out_channels, block_type), x), expected)


@torch.no_grad()
def test_slicing_runs_one_image_at_a_time():
    model = small_model("sana")
    x = image(3)
    z = model.encode(x).latent
    sample = model.decode(z).sample
    batch_sizes = []
    for half in (model.encoder, model.decoder):
        half.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))

    model.enable_slicing()
    assert_close_fp32(model.encode(x).latent, z)
    assert_close_fp32(model.decode(z).sample, sample)
    assert batch_sizes == [1] * 6

    model.disable_slicing()
    model.encode(x)
    assert batch_sizes[6:] == [3]


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_return_dict(slicing, tiling):
    model = small_model("1.5")
    model.use_slicing = slicing
    if tiling:
        model.enable_tiling(128, 128)
    x = image(2, 144, 48)
    (latent,) = model.encode(x, return_dict=False)
    (sample,) = model.decode(latent, return_dict=False)
    assert torch.equal(latent, model.encode(x).latent)
    assert torch.equal(sample, model.decode(latent).sample)
    assert torch.equal(sample, model(x, return_dict=False)[0])
    assert torch.equal(sample, model(x).sample)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 16, 16), ValueError, r"`x` must have the shape \[B, 3, H, W\], got \[3, 16, 16\]"),
        (torch.zeros(1, 4, 16, 16), ValueError, r"`x` must have the shape \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "`x` must be of a floating point dtype"),
        (torch.zeros(1, 3, 100, 64), ValueError, "`x` .* multiples of 16, got 100 x 64. Resize or crop to 96 x 64"),
        (torch.zeros(1, 3, 64, 8), ValueError, "`x` .* multiples of 16, got 64 x 8. Resize or crop to 64 x 16"),
    ],
)
def test_encode_refuses(x, error, message):
    with pytest.raises(error, match=message):
        small_model("1.5").encode(x)


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (torch.zeros(8, 1, 1), ValueError, r"`z` must have the shape \[B, 8, H, W\], got \[8, 1, 1\]"),
        (torch.zeros(1, 3, 16, 16), ValueError, r"`z` must have the shape \[B, 8, H, W\]"),
        (torch.zeros(1, 8, 1, 1, dtype=torch.int64), TypeError, "`z` must be of a floating point dtype"),
    ],
)
def test_decode_refuses(z, error, message):
    with pytest.raises(error, match=message):
        small_model("1.5").decode(z)


def test_compression_ratios():
    model = small_model("1.5")
    assert (model.spatial_compression_ratio, model.temporal_compression_ratio) == (SMALL_RATIO, 1)
