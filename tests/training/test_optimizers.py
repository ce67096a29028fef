"""AdamW in 32 and in 8 bits, and Muon."""

import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_sana.training.config import TrainingConfig
from diffusers_sana.training.loop import TrainingLoop
from diffusers_sana.training.optimizers import OPTIMIZERS, Muon, make_optimizer, orthogonalize


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def state_bytes(optimizer):
    """Of what the optimiser keeps, shared tables counted once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def fit(name, steps=40):
    """First and last loss, and bytes of the optimiser's state."""
    model, generator = make_model(), torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(32, 64, generator=generator) for _ in range(2))
    optimizer = make_optimizer(name, model.parameters(), 1e-2, (0.9, 0.999), 0.0)
    losses = []
    for _ in range(steps):
        losses.append((model(inputs) - targets).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0].item(), losses[-1].item(), state_bytes(optimizer)


def test_eight_bits_learn_as_well_in_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    first, last, size = fit("adamw8bit")
    _, last_of_32, size_of_32 = fit("adamw")
    assert last < 0.1 * first
    assert last < 2 * last_of_32
    assert size < 0.3 * size_of_32


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_kernels_decay(name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(name, model.parameters(), 0.1, (0.9, 0.999), 0.5).step()
    assert torch.allclose(model[0].weight, torch.tensor(0.95))
    for parameter in (model[0].bias, model[1].weight, model[1].bias):
        assert (parameter == 1).all()


@pytest.mark.parametrize("name", ["adamw8bit", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")

    def run(folder, max_steps, resume=False):
        config = TrainingConfig(output_dir=str(folder), max_steps=max_steps, resume=resume)
        accelerator, model = Accelerator(), make_model()
        optimizer = make_optimizer(name, model.parameters(), 1e-2, (0.9, 0.999), 0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        loop = TrainingLoop(config, accelerator, [model], [optimizer], lambda path: path.mkdir(), lambda path: None)
        batches = [{"x": torch.randn(8, 64, generator=torch.Generator().manual_seed(i))} for i in range(6)]
        for batch in loop.run(lambda start: batches[start:]):
            loss = (model(batch["x"]) - batch["x"]).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loop.report(images=8, loss=loss)
        return [parameter.detach() for parameter in model.parameters()]

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="`optimizer` 'adamw8bit' needs bitsandbytes"):
        make_optimizer("adamw8bit", make_model().parameters(), 1e-3, (0.9, 0.999), 0.0)
    with pytest.raises(ValueError, match="`optimizer` must be one of"):
        make_optimizer("sgd", make_model().parameters(), 1e-3, (0.9, 0.999), 0.0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 64)])
def test_orthogonalize_keeps_the_directions_and_levels_their_sizes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices[..., :5] *= 30
    left, sizes, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (sizes.amax(-1) / sizes.amin(-1) > 20).all()
    out = orthogonalize(matrices)
    levelled = torch.linalg.svdvals(out)
    assert levelled.max() < 2
    assert levelled.min() > 0.15
    assert torch.allclose(
        left.mT @ out @ right.mT, torch.diag_embed((left.mT @ out @ right.mT).diagonal(0, -2, -1)), atol=1e-3
    )


def test_muon_steps_are_as_large_as_adams():
    """Square, wide and tall matrices and kernels: an RMS near the learning rate, so one rate fits both."""
    torch.manual_seed(0)
    shapes = [(64, 64), (32, 16, 3, 3), (512, 48), (1024, 16, 3, 3), (64,), (8, 64)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    Muon(parameters, learning_rate=0.01).step()
    for shape, parameter in zip(shapes, parameters, strict=True):
        rms = parameter.detach().square().mean().sqrt().item()
        assert 0.004 < rms < 0.016, (shape, rms)


def test_muon_learns():
    first, last, size = fit("muon")
    _, _, size_of_adam = fit("adamw")
    assert last < 0.1 * first
    assert size < 0.6 * size_of_adam, "one moment in the place of two"
