"""Which parameters each phase trains."""

import pytest
import torch
from torch import nn

from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.recipes.dc_ae import PHASES, get_phase, select_parameters
from tests.training.tiny import tiny_autoencoder


@pytest.mark.parametrize(
    ("phase", "modules"),
    [
        (1, ("encoder.", "decoder.")),
        (2, ("encoder.conv_out.", "decoder.conv_in.")),
        (3, ("decoder.norm_out.", "decoder.conv_out.")),
    ],
)
def test_select_parameters_trains_what_the_phase_says(phase, modules):
    model = tiny_autoencoder()
    selected = select_parameters(model, get_phase(phase).trained_prefixes)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(modules)}
    assert len(selected) == len(trained) > 0
    for module in modules:
        assert any(name.startswith(module) for name in trained)


def test_only_the_last_phase_has_a_discriminator():
    assert [phase.adversarial for phase in PHASES.values()] == [False, False, True]
    with pytest.raises(ValueError, match="`phase` must be one of"):
        get_phase(4)


def test_select_parameters_refuses_prefixes_that_match_nothing():
    with pytest.raises(ValueError, match="`trained_prefixes` must match parameters, got 'decoder-head'"):
        select_parameters(tiny_autoencoder(), ("decoder-head",))


def test_a_frozen_batch_norm_keeps_its_statistics():
    model = nn.ModuleDict(
        {
            "frozen": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
            "trained": nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4)),
        }
    )
    select_parameters(model, ("trained.",))
    model["trained"](model["frozen"](torch.randn(2, 3, 4, 4) + 5))
    assert model["frozen"][1].running_mean.abs().sum() == 0
    assert model["trained"][2].running_mean.abs().sum() > 0
    assert model["trained"][1].training


def test_adamw_decays_kernels_only():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    make_adamw(model.parameters(), 0.1, (0.9, 0.999), 0.5).step()
    assert torch.allclose(model[0].weight, torch.tensor(0.95))
    for parameter in (model[0].bias, model[1].weight, model[1].bias):
        assert (parameter == 1).all()
