"""`AutoencoderDC` under the tools of training: checkpointing, autocast, compilation, memory formats."""

import pytest
import torch
from torch.nn import functional as F

from tests.models.autoencoder_dc_cases import image, small_model
from tests.numerics import assert_close_fp32, relative_error


def gradients(model, x):
    model.zero_grad()
    sample = model(x).sample
    F.mse_loss(sample.float(), x).backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["sana", "in"])
def test_gradient_checkpointing(name):
    model, x = small_model(name).train(), image(2)
    calls = []
    model.encoder.down_blocks[1][0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(model, x)
    assert len(calls) == 1

    model.enable_gradient_checkpointing()
    for key, grad in gradients(model, x).items():
        assert torch.equal(grad, expected[key]), key
    assert len(calls) == 3  # once more, and again in the backward pass

    model.disable_gradient_checkpointing()
    gradients(model, x)
    assert len(calls) == 4


def test_autocast():
    model, x = small_model("sana").train(), image(2)
    gold = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        latent = model.encode(x).latent
    assert latent.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(model, x)
    for key, grad in actual.items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all(), key
    flat = [torch.cat([grad.flatten() for grad in grads.values()]) for grads in (actual, gold)]
    assert relative_error(*flat) < 0.1


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@torch.no_grad()
def test_compiles_as_one_graph(half):
    module = getattr(small_model("two-scales"), half)
    x = image() if half == "encoder" else torch.randn(1, 8, 3, 5)
    expected = module(x)
    actual = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert_close_fp32(actual, expected)


@torch.no_grad()
def test_channels_last():
    model, x = small_model("sana"), image(2)
    expected = model(x).sample
    model.to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last)).sample
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_close_fp32(actual, expected)


def test_learns():
    """Forty steps on one smooth image must leave a quarter of the error of its mean color, or less."""
    model = small_model("sana").train()
    ramp = torch.linspace(-1, 1, 32)
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp.outer(ramp)])[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).sample, x)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * x.var()
