"""The formulas of DiffusionNFT against what the paper says of them."""

import pytest
import torch

from diffusers_sana.training.objectives.nft import most_contrastive, nft_losses, old_decay, optimalities


def test_optimality_compares_images_of_one_prompt():
    rewards = torch.tensor([1.0, 3.0, 100.0, 104.0])
    by_group = optimalities(rewards, group_size=2, clip=2.0)
    assert torch.allclose(by_group, torch.tensor([0.25, 0.75, 0.25, 0.75]), atol=1e-3)
    by_batch = optimalities(rewards, group_size=2, clip=1.0, std=torch.tensor(2.0))
    assert torch.allclose(by_batch, torch.tensor([0.25, 0.75, 0.0, 1.0]), atol=1e-3)
    assert torch.equal(optimalities(torch.full((4,), 7.0), group_size=4), torch.full((4,), 0.5))


def test_most_contrastive_are_the_best_and_the_worst_of_each_group():
    rewards = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 9.0, 7.0, 7.0])
    assert most_contrastive(rewards, group_size=4, kept=2).tolist() == [0, 3, 4, 5]
    assert most_contrastive(rewards, group_size=4, kept=4).tolist() == list(range(8))


def example(batch=3):
    generator = torch.Generator().manual_seed(0)
    latents, noise, old = (torch.randn(batch, 2, 3, 3, generator=generator) for _ in range(3))
    sigmas = torch.rand(batch, generator=generator)
    wide = sigmas.view(-1, 1, 1, 1)
    return latents, (1 - wide) * latents + wide * noise, sigmas, old


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_losses_are_those_of_the_two_implicit_policies(beta):
    latents, noisy, sigmas, old = example()
    velocity, optimality = torch.randn(latents.shape), torch.tensor([1.0, 0.0, 0.3])
    losses = nft_losses(velocity, old, noisy, latents, sigmas, optimality, beta)
    for i, (r, sigma) in enumerate(zip(optimality, sigmas, strict=True)):
        expected = 0.0
        for weight, implicit in (
            (r, old[i] + beta * (velocity[i] - old[i])),
            (1 - r, old[i] - beta * (velocity[i] - old[i])),
        ):
            difference = noisy[i] - sigma * implicit - latents[i]
            expected += weight / beta * difference.square().mean() / difference.abs().mean()
        assert torch.allclose(losses[i], expected, rtol=1e-5)


def test_a_better_image_attracts_as_much_as_a_worse_one_repels():
    latents, noisy, sigmas, old = example()
    gradients = []
    for r in (1.0, 0.0, 0.5):
        velocity = old.clone().requires_grad_()
        nft_losses(velocity, old, noisy, latents, sigmas, torch.full((3,), r)).sum().backward()
        gradients.append(velocity.grad)
    target = (noisy - latents) / sigmas.view(-1, 1, 1, 1)  # the velocity that leads to the image
    assert ((target - old) * gradients[0]).sum() < 0
    assert torch.allclose(gradients[0], -gradients[1])
    assert torch.allclose(gradients[2], torch.zeros_like(old), atol=1e-7)


def test_the_sampling_policy_follows_more_slowly_in_time():
    assert [old_decay(step) for step in (0, 100, 1000)] == [0, pytest.approx(0.1), 0.5]
