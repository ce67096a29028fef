"""The optimizers: what they decay, that runs with them resume exactly, and Muon's numbers."""

import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_sana.training.config import TrainingConfig
from diffusers_sana.training.loop import TrainingLoop
from diffusers_sana.training.optimizers import (
    OPTIMIZERS,
    PACKAGED,
    Muon,
    averaged_weights,
    averaging,
    make_optimizer,
    optimizer_of,
    orthogonalize,
)


RATES = {"prodigy": 1.0, "lion": 1e-3, "lion8bit": 1e-3}  # others: 0.01


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
    optimizer = make_optimizer(name, model.parameters(), RATES.get(name, 1e-2), (0.9, 0.999), 0.0)
    for each in averaging([optimizer]):
        each.train()
    losses = []
    for _ in range(steps):
        losses.append((model(inputs) - targets).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0].item(), losses[-1].item(), state_bytes(optimizer)


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"adamw8bit", "muon"}))
def test_it_learns(name):
    first, last, _ = fit(name, steps=300 if name == "prodigy" else 60)
    assert last < 0.3 * first


def test_eight_bits_learn_as_well_in_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    first, last, size = fit("adamw8bit")
    _, last_of_32, size_of_32 = fit("adamw")
    assert last < 0.1 * first
    assert last < 2 * last_of_32
    assert size < 0.3 * size_of_32


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_kernels_decay(name):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    if name == "prodigy":  # makes no step where no gradient says anything, and begins with steps of a millionth
        model[0].weight.grad[0, 0] = 1
    optimizer = make_optimizer(name, model.parameters(), 0.1, (0.9, 0.999), 0.5)
    for each in averaging([optimizer]):
        each.train()
    optimizer.step()
    decayed = 1 - 0.1 * 0.5 * optimizer.param_groups[0].get("d", 1.0)
    with averaged_weights([optimizer]):
        assert torch.allclose(model[0].weight[1:], torch.tensor(decayed), rtol=1e-8, atol=1e-7)
    for parameter in (model[0].bias, model[1].weight, model[1].bias):
        assert (parameter == 1).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    """Nor does it change anything when checkpoints are written: the second run writes one after each step."""
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    published = []

    def run(folder, max_steps, **options):
        rate = RATES.get(name, 1e-2)
        config = TrainingConfig(
            output_dir=str(folder),
            max_steps=max_steps,
            optimizer=name,
            learning_rate=rate,
            weight_decay=0.1,
            **options,
        )
        accelerator, model = Accelerator(), nn.Sequential(make_model(), Kernel())
        optimizer = optimizer_of(config, model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)

        def save(path):
            path.mkdir()
            published.append(weights_of(model))

        loop = TrainingLoop(config, accelerator, [model], [optimizer], save, lambda path: None)
        batches = [{"x": torch.randn(8, 64, generator=torch.Generator().manual_seed(i))} for i in range(6)]
        for batch in loop.run(lambda start: batches[start:]):
            loss = (model(batch["x"]) - batch["x"]).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loop.report(images=8, loss=loss)
        return weights_of(model) + published[-1]

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3, save_minutes=0)
    resumed = run(tmp_path / "parts", 6, resume=True, save_minutes=0)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    trained, saved = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    is_average = any(not torch.equal(a, b) for a, b in zip(trained, saved, strict=True))
    assert is_average == (name == "schedulefree")


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


class Kernel(nn.Module):
    """A 1x1 convolution in channels-last layout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 1).to(memory_format=torch.channels_last)

    def forward(self, values):
        return self.conv(values[..., None, None])[..., 0, 0]


def test_came_treats_kernels_of_one_pixel_as_matrices():
    torch.manual_seed(0)
    kernel, matrix = Kernel().conv, nn.Linear(64, 64)
    matrix.load_state_dict({"weight": kernel.weight[..., 0, 0], "bias": kernel.bias})
    steps = [make_optimizer("came", each.parameters(), 1e-2, (0.9, 0.999), 0.1) for each in (kernel, matrix)]
    strides = kernel.weight.stride()
    for _ in range(3):
        matrix.weight.grad, matrix.bias.grad = torch.randn(64, 64), torch.randn(64)
        kernel.weight.grad, kernel.bias.grad = matrix.weight.grad.clone()[..., None, None], matrix.bias.grad.clone()
        for optimizer in steps:
            optimizer.step()
    assert torch.equal(kernel.weight[..., 0, 0], matrix.weight)
    assert (kernel.weight.shape, kernel.weight.stride()) == ((64, 64, 1, 1), strides)
    assert kernel.weight.grad.shape == kernel.weight.shape
    assert state_bytes(steps[0]) == state_bytes(steps[1])


def test_settings_that_an_optimizer_cannot_use():
    with pytest.raises(ValueError, match=r"`learning_rate` must be about 1 .*, got 0\.0001"):
        TrainingConfig(optimizer="prodigy")
    for settings in ({"lr_schedule": "cosine"}, {"ema_decay": 0.9}):
        with pytest.raises(ValueError, match="`lr_schedule` must be 'constant' and `ema_decay` 0"):
            TrainingConfig(optimizer="schedulefree", **settings)


@pytest.mark.parametrize("name", PACKAGED)
def test_packages_are_imported_when_asked_for(name, monkeypatch):
    source = PACKAGED[name]
    monkeypatch.setitem(sys.modules, source.module, None)
    with pytest.raises(
        ValueError, match=f"`optimizer` '{name}' needs {source.package}.*`pip install {source.package}`"
    ):
        make_optimizer(name, make_model().parameters(), 1.0, (0.9, 0.999), 0.0)


def test_an_unknown_name():
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
