"""Behind ComfyUI's VAE and LATENT sockets, and the previews of latents."""

import pytest
import torch
from torch.nn import functional as F

from tests.comfyui.stub import call


@pytest.fixture(scope="module")
def loaded(nodes):
    return call(nodes, "SanaLoad")


@pytest.fixture(scope="module")
def generated(nodes, loaded):
    prompts = [
        "a fox on a green background, flat style",
        "a lemon on a black background",
        "a car on a white background",
    ]
    outputs = [call(nodes, "SanaSample", model=loaded[0], prompt=prompt, steps=8) for prompt in prompts]
    return torch.cat([image for image, _ in outputs]), torch.cat([latent["samples"] for _, latent in outputs])


def test_vae_decode_gives_the_images(loaded, generated):
    """As ComfyUI's VAE Decode and VAE Decode (Tiled) call it."""
    vae, (images, latents) = loaded[1], generated
    assert latents.shape == (3, vae.latent_channels, 8, 8)
    torch.testing.assert_close(vae.decode(latents), images)
    compression = vae.spacial_compression_decode()
    assert (compression, vae.temporal_compression_decode()) == (32, None)
    tiles = {"tile_x": 512 // compression, "tile_y": 512 // compression, "overlap": 2, "tile_t": None}
    torch.testing.assert_close(vae.decode_tiled(latents, **tiles, overlap_t=None), images)
    assert not loaded[0].pipe.vae.use_tiling


def test_vae_encode(loaded, generated):
    """As ComfyUI's VAE Encode and VAE Encode (Tiled) call it; borders that fill no cell are cut on both sides."""
    vae, (images, _) = loaded[1], generated
    latents = vae.encode(images)
    with torch.no_grad():
        expected = loaded[0].pipe.vae.encode(images.movedim(-1, 1) * 2 - 1).latent
    torch.testing.assert_close(latents, expected)
    assert (vae.decode(latents) - images).abs().mean() < 0.05
    wide = F.pad(images.movedim(-1, 1), (5, 6, 0, 1)).movedim(1, -1)
    torch.testing.assert_close(vae.encode(wide), latents)
    tiled = vae.encode_tiled(images, tile_x=512, tile_y=512, overlap=64, tile_t=None, overlap_t=None)
    torch.testing.assert_close(tiled, latents)
    with pytest.raises(ValueError, match="`pixels` must be at least 32 wide and high"):
        vae.encode(images[:, :16])


def test_tiles_do_not_change_the_image(loaded):
    """Larger than a tile."""
    vae = loaded[1]
    latents = torch.randn(1, 32, 36, 4)
    tiled = vae.decode_tiled(latents, tile_x=8, tile_y=8)
    torch.testing.assert_close(tiled, vae.decode(latents), atol=1e-4, rtol=1e-4)


def test_previews_look_like_the_images(loaded, generated):
    model, (images, latents) = loaded[0], generated
    shown = model.preview().pixels(latents * model.scaling_factor)
    small = F.adaptive_avg_pool2d(images.movedim(-1, 1), shown.shape[-2:])
    assert shown.shape == (3, 3, 32, 32)
    correlation = torch.corrcoef(torch.stack([shown.flatten(), small.flatten()]))[0, 1]
    assert correlation > 0.9
    for own, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        errors = (shown[own] - small).square().mean(dim=(1, 2, 3))
        assert all(errors[own] < errors[other] / 2 for other in others)
    assert model.preview() is model.preview()


def test_previews_foresee_the_end(nodes, loaded):
    """In the middle of the steps, latents under noise are shown as what they lead to."""
    clean_latents = nodes.nodes_sana.generate.__globals__["clean_latents"]
    model, seen, before = loaded[0], [], None

    def keep(pipe, step, timestep, tensors):
        nonlocal before
        seen.append((tensors["latents"], clean_latents(pipe, tensors["latents"], before)))
        before = tensors["latents"]
        return {}

    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "callback_on_step_end": keep}
    last = model.pipe("a lemon on a black background", num_inference_steps=10, **options).images
    noisy, foreseen = seen[4]
    assert seen[0][1] is None
    assert (foreseen - last).square().mean() < 0.5 * (noisy - last).square().mean()
    assert torch.equal(seen[-1][1], last)
