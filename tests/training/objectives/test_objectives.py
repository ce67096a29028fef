"""Flow matching, the perceptual loss, the discriminator and structured latents."""

import sys
import types

import pytest
import torch
from diffusers import AutoencoderDC as DiffusersAutoencoderDC
from diffusers import DPMSolverMultistepScheduler
from torch import nn

from diffusers_sana.training.objectives.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from diffusers_sana.training.objectives.flow_matching import (
    interpolate,
    level_weights,
    sample_euler,
    sample_sigmas,
    shift_sigmas,
    timesteps_of,
    velocity_errors,
    velocity_target,
)
from diffusers_sana.training.objectives.perceptual import PerceptualLoss, RandomFeatures, make_perceptual
from diffusers_sana.training.recipes.dc_ae import mask_latents, sample_latent_prefix
from tests.numerics import assert_close_fp32


def test_sample_sigmas_is_logit_normal():
    sigmas = sample_sigmas(100_000, shift=1.0, mean=0.5, std=1.5)
    logits = torch.logit(sigmas.double() + 5e-4)  # rounded down to thousandths
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(1.5, abs=0.02)


def test_sample_sigmas_shifts_after_the_sigmoid():
    torch.manual_seed(1)
    plain = sample_sigmas(1000, shift=1.0)
    torch.manual_seed(1)
    shifted = sample_sigmas(1000, shift=3.0)
    assert_close_fp32(shifted, 3 * plain / (1 + 2 * plain))
    assert shifted.median().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_noise_levels_and_timesteps_are_those_of_the_authors(shift):
    """Their formulas in float64: levels 1 - linspace(1, 0.001, 1000), shifted; the model rounds 1000 sigma down."""
    torch.manual_seed(0)
    u = torch.sigmoid(torch.randn(20_000))
    torch.manual_seed(0)
    sigmas = sample_sigmas(20_000, shift)
    index = (u * 1000).long()
    level = index.double() / 1000
    shifted = shift * level / (1 + (shift - 1) * level)
    assert_close_fp32(sigmas, shifted.float())
    told = timesteps_of(sigmas)
    assert torch.equal(told, told.round())
    assert (told - 1000 * shifted).abs().max() < 1 + 1e-3
    assert torch.equal(told.long(), (1000 * shifted + 1e-4).long())
    if shift == 1:
        assert torch.equal(told.long(), index)


def test_training_feeds_the_numbers_that_the_scheduler_feeds():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(20)
    unshifted = torch.arange(20, 0, -1) * 0.999 / 20
    sigmas = shift_sigmas(unshifted, 3.0)
    assert_close_fp32(sigmas, scheduler.sigmas[:-1])
    assert torch.equal(timesteps_of(sigmas).long(), scheduler.timesteps)


def test_the_target_is_the_velocity_of_the_interpolation():
    latents, noise = torch.randn(2, 3, 4, 5, 6).double()
    sigmas = torch.rand(3).double()
    step = 1e-3
    moved = interpolate(latents, noise, sigmas + step) - interpolate(latents, noise, sigmas)
    assert torch.allclose(moved / step, velocity_target(latents, noise), atol=1e-9)


def test_min_snr_is_that_of_the_error_of_the_clean_latents():
    """Its definition (arXiv 2303.09556) in float64, with x_0 computed from the velocity."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, error = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64, generator=generator)
    sigmas = torch.tensor([0.02, 0.2, 0.31, 0.5, 0.99], dtype=torch.float64)
    target = velocity_target(latents, noise)
    noisy = interpolate(latents, noise, sigmas)
    predicted = noisy - sigmas.view(-1, 1, 1, 1) * (target + error)
    ratio = ((1 - sigmas) / sigmas).square()
    expected = ratio.clamp_max(5.0) * (predicted - latents).square().mean((1, 2, 3))
    errors = velocity_errors((target + error).float(), target.float(), sigmas.float(), "min_snr", 5.0)
    assert_close_fp32(errors, expected.float())
    assert level_weights(torch.zeros(1), "min_snr").item() == 0, "finite where there is no noise"


def test_cosmap_is_the_ratio_of_two_densities():
    """The density of sigma = tan / (1 + tan) at evenly spread angles; it integrates to 1."""
    sigmas = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    weights = level_weights(sigmas, "cosmap")
    assert torch.trapezoid(weights, sigmas).item() == pytest.approx(1, abs=1e-6)
    angles = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.pi / 2
    share = (angles.tan() / (1 + angles.tan()) < 0.25).double().mean().item()
    assert torch.trapezoid(weights[:2501], sigmas[:2501]).item() == pytest.approx(share, abs=5e-3)


def test_errors_without_weights_are_the_mean_squared_error():
    velocity, target = torch.randn(2, 3, 4, 2, 2)
    errors = velocity_errors(velocity, target, torch.rand(3))
    assert_close_fp32(errors.mean(), nn.functional.mse_loss(velocity, target))


def test_lpips_is_asked_for_whole_or_cut_images(monkeypatch):
    class Lpips(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert (net, verbose) == ("vgg", False)
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, images, targets):
            self.side = images.shape[-1]
            return self.scale * (images - targets).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Lpips))
    loss = make_perceptual("lpips", crop_size=4)
    images = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    value = loss(images, torch.zeros(2, 3, 8, 8))
    assert value.item() == pytest.approx(1.5)
    value.backward()
    assert images.grad.count_nonzero() == 2 * 3 * 4 * 4
    assert loss.distance.side == 4
    assert not loss.distance.scale.requires_grad
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"`perceptual` 'lpips' needs packages .*`pip install lpips torchvision`"):
        make_perceptual("lpips")
    assert isinstance(make_perceptual("lpips", RandomFeatures()).network, RandomFeatures)


def test_sample_euler_follows_a_straight_line_to_the_latents():
    latents, noise = torch.randn(2, 2, 4, 3, 3)
    called_with = []

    def predict(sample, sigmas):
        called_with.append(sigmas)
        return (sample - latents) / sigmas.view(-1, 1, 1, 1)

    result = sample_euler(predict, noise, num_steps=5, shift=3.0)
    assert torch.allclose(result, latents, atol=1e-5)
    assert len(called_with) == 5
    assert called_with[0].tolist() == [1.0, 1.0]


def test_perceptual_loss_is_zero_for_equal_images_and_grows_with_blur():
    loss = PerceptualLoss()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    little = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    much = nn.functional.avg_pool2d(images, 9, stride=1, padding=4)
    assert loss(images, images).item() == 0
    assert 0 < loss(little, images).item() < loss(much, images).item()


def test_perceptual_loss_trains_images_and_not_the_network():
    loss = PerceptualLoss(crop_size=16)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss(images, torch.zeros(2, 3, 32, 32)).backward()
    touched = images.grad.abs().sum(dim=(0, 1)) > 0
    assert touched.any(dim=1).sum() == 16  # rows of the crop
    assert all(not parameter.requires_grad for parameter in loss.parameters())


def test_random_features_are_the_same_in_every_run():
    first = RandomFeatures(channels=(4, 8), seed=3).state_dict()
    torch.manual_seed(99)
    second = RandomFeatures(channels=(4, 8), seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_perceptual_loss_takes_another_network():
    class Identity(nn.Module):
        def forward(self, images):
            return [images]

    images, targets = torch.randn(2, 1, 3, 4, 4)
    cosine = nn.functional.cosine_similarity(images, targets, dim=1).mean()
    assert_close_fp32(PerceptualLoss(Identity())(images, targets), 2 - 2 * cosine)


def test_discriminator_learns_to_tell_noise_from_flat_images():
    discriminator = PatchDiscriminator(channels=8, num_layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        real, fake = torch.rand(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert losses[-1] < 0.3 * losses[0]
    assert generator_loss(discriminator(fake)) > generator_loss(discriminator(real))


def test_discriminator_sees_patches_of_70_pixels():
    discriminator = PatchDiscriminator(channels=8)
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):  # which sees the whole image
            module.forward = lambda features: features
    logits = discriminator(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert (images.grad[0, 0].abs().sum(dim=0) > 0).sum().item() == 70


def test_structured_latents_keep_a_prefix():
    model = DiffusersAutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
    ).eval()
    latent = torch.randn(1, 8, 2, 2)
    keys = model.state_dict().keys()
    with torch.no_grad():
        prefix_only = torch.cat([latent[:, :6], torch.zeros(1, 2, 2, 2)], dim=1)
        expected = model.decode(prefix_only).sample
        mask_latents(model)
        model.decoder.latent_mask[:, 6:] = 0
        assert torch.equal(model.decode(latent).sample, expected)
    assert model.state_dict().keys() == keys


def test_latent_prefixes_are_drawn_evenly():
    mask = torch.zeros(1, 10, 1, 1)
    counts = dict.fromkeys((4, 8, 10), 0)
    for _ in range(600):
        sample_latent_prefix(mask, 4)
        kept = int(mask.sum())
        assert mask.flatten().tolist() == [1.0] * kept + [0.0] * (10 - kept)
        counts[kept] += 1
    assert min(counts.values()) > 150
