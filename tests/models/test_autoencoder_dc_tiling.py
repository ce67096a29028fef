"""Tiled `AutoencoderDC`: the same numbers as whole, in bounded memory, for every layout and ragged sizes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusers_sana import AutoencoderDC
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.models.autoencoders.exact_tiling import map_tiles
from tests.models.autoencoder_dc_cases import OFFICIAL, SMALL, image, small_model
from tests.numerics import assert_close_fp32, relative_error


# Pixels of context that an output, or input, pixel needs, by the definition of the layers.
RADIUS = {
    "f32c32-sana": (36, 50),
    "f32c32-lite": (36, 66),
    "f32c32-in": (87, 114),
    "f64c128-in": (87, 114),
    "f128c512-in": (87, 114),
    "f32c128-1.5": (107, 114),
    "f64c128-1.5": (107, 114),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_halo_is_the_least_that_holds_the_radius(name):
    with torch.device("meta"):
        model = AutoencoderDC(**OFFICIAL[name])
    for half, radius in zip((model.encoder, model.decoder), RADIUS[name], strict=True):
        assert half.shallow_end.unit == 8
        assert 8 * (half.shallow_end.halo - 1) < radius <= 8 * half.shallow_end.halo


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_equals_untiled(name):
    model = small_model(name)
    x = image(2, 144, 208)
    latent = model.encode(x).latent
    sample = model.decode(latent).sample
    calls = []
    model.encoder.conv_in.register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder.norm_out.register_forward_hook(lambda *_: calls.append("decoder"))

    model.enable_tiling(128, 112)
    assert_close_fp32(model.encode(x).latent, latent, tolerance=1e-6)
    assert_close_fp32(model.decode(latent).sample, sample, tolerance=1e-6)
    assert calls.count("encoder") >= 6
    assert calls.count("decoder") >= 6

    model.disable_tiling()
    assert torch.equal(model.decode(latent).sample, sample)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("half", ["encoder", "decoder"])
@torch.no_grad()
def test_halo_is_not_larger_than_needed(name, half):
    """In float64, where rounding hides nothing: exact with the halo, off with one unit less."""
    module = getattr(small_model(name).double(), half)
    end = module.shallow_end
    unit_in, unit_out = (end.unit, 1) if half == "encoder" else (1, end.unit)
    channels = 3 if half == "encoder" else 16
    x = torch.randn(1, channels, 20 * unit_in, 3 * unit_in, dtype=torch.float64)
    expected = module.shallow_stages(x)

    def error(halo):
        tiled = map_tiles(module.shallow_stages, x, core=(3, 2), halo=halo, unit_in=unit_in, unit_out=unit_out)
        return relative_error(tiled, expected)

    assert error(end.halo) < 1e-13
    assert error(end.halo - 1) > 1e-10


@pytest.mark.parametrize("size", [(1, 1), (1, 63), (100, 7), (63, 100)], ids=str)
@pytest.mark.parametrize("core", [(1, 1), (5, 9), (200, 200)], ids=str)
def test_map_tiles_covers_every_size(size, core):
    """Nearest enlargement of a running number shows at once where a tile was put."""
    x = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, 1, *size)
    shapes = []

    def enlarge(tile):
        shapes.append(tile.shape[-2:])
        return tile.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)

    assert torch.equal(map_tiles(enlarge, x, core=core, halo=2, unit_in=1, unit_out=2), enlarge(x))
    assert all(rows <= core[0] + 4 and columns <= core[1] + 4 for rows, columns in shapes[:-1])


@pytest.mark.parametrize("name", OFFICIAL)
def test_enable_tiling_alone_is_enough(name):
    """In and out of every layout, on the meta device."""
    with torch.device("meta"):
        model = AutoencoderDC(**OFFICIAL[name]).eval()
        x = torch.empty(1, 3, 2048, 1152)
    model.enable_tiling()
    with torch.no_grad():
        latent = model.encode(x).latent
        assert latent.shape[-2:] == (2048 // model.spatial_compression_ratio, 1152 // model.spatial_compression_ratio)
        assert model.decode(latent).sample.shape == x.shape


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_memory_at_4096(half):
    """With the kernels, in bf16: the Sana autoencoder at 4096 x 4096, whole and in tiles."""
    with torch.device("meta"):
        model = AutoencoderDC(**OFFICIAL["f32c32-sana"]).eval().to(torch.bfloat16)
        shape = (1, 3, 4096, 4096) if half == "encode" else (1, 32, 128, 128)
        x = torch.empty(shape, dtype=torch.bfloat16)

    def peak():
        with torch.no_grad(), kernel_mode("triton"), PeakBytes() as meter:
            getattr(model, half)(x, return_dict=False)
        return meter.peak, meter.largest

    whole_peak, whole_largest = peak()
    model.enable_tiling()
    tiled_peak, tiled_largest = peak()
    assert whole_peak < 20.5 * 2**30  # diffusers: 26 and 28 GiB
    assert tiled_peak < 5 * 2**30
    assert tiled_largest <= 2 * 2**30 < whole_largest  # the gated convolution of stage 3, which is not tiled


@torch.no_grad()
def test_small_images_are_not_tiled():
    model = small_model("1.5")
    model.enable_tiling(128, 128)
    calls = []
    model.encoder.conv_in.register_forward_hook(lambda *_: calls.append(1))
    model.encode(image(1, 128, 128))
    assert len(calls) == 1
    model.encode(image(1, 16, 144))
    assert len(calls) > 2


def test_gradients_flow_through_tiles():
    model = small_model("sana")
    x = image(1, 96, 160)
    grads = []
    for tiling in (False, True):
        if tiling:
            model.enable_tiling(96, 96)
        model.zero_grad()
        model(x).sample.square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, tiled in zip(*grads, strict=True):
        assert_close_fp32(tiled, whole, tolerance=1e-4)


def test_tile_attributes():
    model = small_model("sana")
    assert (model.use_tiling, model.tile_sample_min_height, model.tile_latent_min_width) == (False, 1024, 64)
    margin = 2 * 8 * max(model.encoder.shallow_end.halo, model.decoder.shallow_end.halo)

    model.enable_tiling(256, 320)
    assert model.use_tiling
    assert (model.tile_sample_min_height, model.tile_sample_min_width) == (256, 320)
    assert (model.tile_sample_stride_height, model.tile_sample_stride_width) == (256 - margin, 320 - margin)
    assert (model.tile_latent_min_height, model.tile_latent_min_width) == (16, 20)

    model.enable_tiling(tile_sample_stride_width=64)
    model.enable_tiling()
    assert (model.tile_sample_min_width, model.tile_sample_stride_width) == (320, 64)
    assert (model.tile_sample_min_height, model.tile_sample_stride_height) == (256, 256 - margin)
    assert model.decoder.shallow_end.core(320, 64) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_sample_min_height": 0}, "`tile_sample_min_height` must be a positive multiple of 16 pixels, got 0"),
        ({"tile_sample_min_width": -64}, "`tile_sample_min_width` must be a positive multiple"),
        ({"tile_sample_min_width": 500}, "`tile_sample_min_width` must be a positive multiple of 16 pixels, got 500"),
        ({"tile_sample_stride_height": 0}, "`tile_sample_stride_height` must be a positive multiple"),
        ({"tile_sample_stride_height": 40}, "`tile_sample_stride_height` must be a positive multiple"),
        ({"tile_sample_min_height": 48}, "`tile_sample_min_height` must be more than 64 pixels, .* got 48"),
        (
            {"tile_sample_min_width": 512, "tile_sample_stride_width": 1024},
            "`tile_sample_stride_width` must be at most the tile's size, 512, got 1024",
        ),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_enable_tiling_refuses(arguments, message):
    model = small_model("sana")
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**arguments)
    assert not model.use_tiling
    assert model.tile_sample_min_height == model.tile_sample_min_width == 1024


def test_tile_set_by_hand_is_checked_too():
    model = small_model("sana")
    model.use_tiling = True
    model.tile_sample_min_height = 16
    with pytest.raises(ValueError, match="`tile_sample_min_height` and `tile_sample_min_width` must be at least"):
        model.encode(image())


def test_training_batch_norm_is_not_tiled():
    model = small_model("in").train()
    model.enable_tiling(256, 256)
    with pytest.raises(ValueError, match=r"`use_tiling` needs `vae.eval\(\)`"):
        model.decode(torch.zeros(1, 8, 17, 4))


class PeakBytes(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at the same time, and of the largest."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in self.live and id(storage) not in inputs:
                self.live[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, id(storage))
                self.peak = max(self.peak, sum(self.live.values()))
                self.largest = max(self.largest, storage.nbytes())
        return out


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
