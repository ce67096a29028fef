"""`SanaInpaintPipeline`: generates what is masked, keeps the rest: in latents at each step, in pixels at the end."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_sana
from diffusers_sana.pipelines.inpainting import mask_cells, masked_region
from tests import tiny
from tests.numerics import assert_close_fp32


STEPS = 4
PROMPT = "a cat"

generate = partial(tiny.generate, num_inference_steps=STEPS, output_type="pt")


def random_image(height=32, width=32, seed=0):
    data = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return (data * 255).round() / 255


def mask(height=32, width=32, rows=slice(4, 16), columns=slice(10, 21)):
    masked = torch.zeros(1, 1, height, width)
    masked[..., rows, columns] = 1
    return masked


@pytest.fixture(scope="module")
def pipe(ours):
    return diffusers_sana.SanaInpaintPipeline.from_pipe(ours)


@pytest.fixture(scope="module")
def latents_of(ours):
    @torch.no_grad()
    def encode(image):
        return ours.vae.encode(2 * image - 1).latent * ours.vae.config.scaling_factor

    return encode


class TestPixels:
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_unmasked_stay_and_masked_are_generated(self, pipe, strength):
        given = {"image": random_image(), "mask_image": mask(), "strength": strength}
        kept, generated = generate(pipe, **given), generate(pipe, **given, preserve_unmasked=False)
        is_masked = mask().bool().expand_as(kept)
        assert torch.equal(kept[~is_masked], random_image()[~is_masked])
        assert torch.equal(kept[is_masked], generated[is_masked])
        assert not torch.isclose(kept, random_image(), atol=1e-3)[is_masked].all()

    def test_stay_through_bytes_and_scaling(self, pipe):
        data = (random_image(50, 70) * 255).round().to(torch.uint8)[0].movedim(0, -1).numpy()
        masked = mask(50, 70)
        image, mask_image = Image.fromarray(data), Image.fromarray((masked[0, 0] * 255).byte().numpy())
        result = np.array(generate(pipe, image=image, mask_image=mask_image, output_type="pil")[0])
        is_masked = masked[0, 0].bool().numpy()
        assert (result[~is_masked] == data[~is_masked]).all()
        assert (result[is_masked] != data[is_masked]).any()

    def test_gray_mixes(self, pipe):
        given = {"image": random_image(), "preserve_unmasked": True}
        generated = generate(pipe, **given, mask_image=torch.ones(32, 32))
        mixed = generate(pipe, **given, mask_image=torch.full((32, 32), 0.75))
        assert_close_fp32(mixed, 0.75 * generated + 0.25 * random_image())

    def test_nothing_masked(self, pipe, latents_of, caplog):
        given = {"image": random_image(), "mask_image": torch.zeros(32, 32)}
        assert torch.equal(generate(pipe, **given), random_image())
        assert "`mask_image` masks nothing" in caplog.text
        assert_close_fp32(generate(pipe, **given, output_type="latent"), latents_of(random_image()))


class TestLatents:
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_all_masked_is_image_to_image(self, pipe, strength):
        given = {"image": random_image(), "strength": strength}
        img2img = diffusers_sana.SanaImg2ImgPipeline.from_pipe(pipe)
        assert torch.equal(generate(pipe, **given, mask_image=torch.ones(32, 32)), generate(img2img, **given))

    def test_all_masked_is_text_to_image(self, ours, pipe):
        generated = generate(pipe, image=random_image(), mask_image=torch.ones(32, 32))
        assert torch.equal(generated, generate(ours))

    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_kept_cells_are_at_the_noise_level_of_each_step(self, pipe, latents_of, strength):
        seen = []
        generate(
            pipe,
            image=random_image(),
            mask_image=mask(),
            strength=strength,
            callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"]),
        )
        pipe.scheduler.set_timesteps(STEPS)
        z, sigmas = latents_of(random_image()), pipe.scheduler.sigmas[-len(seen) :]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
        kept = torch.ones(16, 16, dtype=bool)
        kept[2:8, 5:11] = False  # cells are 2 pixels wide: columns 10 to 20 are cells 5 to 10
        assert len(seen) == strength * STEPS
        for latents, sigma in zip(seen, sigmas, strict=True):
            expected = (1 - sigma) * z + sigma * noise
            assert_close_fp32(latents[..., kept], expected[..., kept])
            assert not torch.isclose(latents, expected)[..., ~kept].any()

    def test_latents_as_image(self, pipe, latents_of):
        given = {"mask_image": mask(), "output_type": "latent"}
        assert torch.equal(
            generate(pipe, image=latents_of(random_image()), **given), generate(pipe, image=random_image(), **given)
        )
        as_image = generate(pipe, image=latents_of(random_image(32, 64)), mask_image=mask(32, 64))
        assert as_image.shape == (1, 3, 32, 64)

    def test_same_seed_same_bits(self, pipe):
        given = {"image": random_image(), "mask_image": mask()}
        assert torch.equal(generate(pipe, **given), generate(pipe, **given))
        assert not torch.equal(generate(pipe, **given), generate(pipe, **given, seed=4))


class TestMask:
    def test_one_pixel_marks_its_cell(self):
        # As the nearest pixel of each cell would not: diffusers' inpainting pipelines miss thin masks.
        for row in range(64):
            cells = mask_cells(mask(64, 64, slice(row, row + 1), slice(40, 41)), (64, 64), (2, 2))
            assert cells[0, 0].tolist() == [[False, row < 32], [False, row >= 32]]

    def test_of_an_image_of_another_ratio(self):
        # 60 x 64 is generated as 64 x 64: the border is repeated by 2 rows above and below.
        cells = mask_cells(mask(60, 64, slice(29, 30)), (64, 64), (2, 2))
        assert cells[0, 0].tolist() == [[True, False], [False, False]]
        assert mask_cells(mask(60, 64, slice(30, 31)), (64, 64), (2, 2))[0, 0, 1, 0]

    def test_forms(self, pipe):
        masked = mask()
        expected = generate(
            pipe, image=random_image(), mask_image=Image.fromarray((masked[0, 0] * 255).byte().numpy())
        )
        array = masked[0, 0].numpy()
        labels = [array.astype(dtype) for dtype in (bool, np.uint8, np.int64)]  # 0 and 1, as of segmentations
        deep = Image.fromarray((array * 65535).astype(np.uint16))
        tensors = [masked, masked[0], masked[0, 0], masked.bool()]
        for form in (*tensors, array, array[None], array[..., None], [array], *labels, deep):
            assert torch.equal(generate(pipe, image=random_image(), mask_image=form), expected)

    def test_of_another_size(self, pipe):
        large = mask().repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        generated = generate(pipe, image=random_image(), mask_image=large, output_type="latent")
        assert_close_fp32(generated, generate(pipe, image=random_image(), mask_image=mask(), output_type="latent"))

    def test_of_the_image_before_it_was_cut(self, pipe):
        given = {"image": random_image(32, 64), "height": 32, "width": 32}
        generated = generate(pipe, **given, mask_image=mask(32, 64, columns=slice(26, 37)))
        assert_close_fp32(generated, generate(pipe, **given, mask_image=mask()))
        with pytest.raises(ValueError, match="proportions of `image`, which is 32 x 64"):
            generate(pipe, **given, mask_image=mask(48, 32))

    def test_one_a_prompt(self, pipe):
        masks = [mask(), mask(rows=slice(20, 30))]
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        given = {"image": random_image(), "num_images_per_prompt": 2, "generator": generators}
        batch = generate(pipe, ["a", "b"], mask_image=masks, **given)
        for i in range(4):
            single = generate(pipe, "ab"[i // 2], seed=i, image=random_image(), mask_image=masks[i // 2])
            assert_close_fp32(batch[i : i + 1], single)
        several = {"image": random_image(), "mask_image": masks}
        assert torch.equal(generate(pipe, "a", **several), generate(pipe, ["a", "a"], **several))


class TestCrop:
    def test_is_inpainting_of_the_part(self, pipe):
        image, masked = random_image(100, 120), mask(100, 120, slice(60, 66), slice(80, 90))
        result = generate(pipe, image=image, mask_image=masked, padding_mask_crop=5)
        rows, columns = slice(53, 73), slice(75, 95)  # 10 and twice 5, square
        part = generate(pipe, image=image[..., rows, columns], mask_image=masked[..., rows, columns])
        assert torch.equal(result[..., rows, columns], part)
        assert torch.equal(result[~masked.bool().expand_as(result)], image[~masked.bool().expand_as(result)])

    @pytest.mark.parametrize(
        ("rows", "columns", "padding", "region"),
        [
            (slice(0, 2), slice(10, 20), 0, (slice(0, 10), slice(10, 20))),
            (slice(38, 40), slice(10, 20), 3, (slice(24, 40), slice(7, 23))),
            (slice(0, 40), slice(10, 12), 5, (slice(0, 40), slice(0, 40))),
            (slice(0, 1), slice(0, 60), 0, (slice(0, 40), slice(0, 60))),
        ],
    )
    def test_region(self, rows, columns, padding, region):
        assert masked_region(mask(40, 60, rows, columns), padding) == region

    def test_region_holds_all_masks(self):
        masks = torch.cat([mask(40, 60, slice(0, 4), slice(0, 4)), mask(40, 60, slice(20, 24), slice(20, 24))])
        assert masked_region(masks, 0) == (slice(0, 24), slice(0, 24))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": None}, ValueError, "`image` must be given"),
        ({"mask_image": None}, ValueError, "`mask_image` must be given, got None. Use SanaImg2ImgPipeline"),
        ({"mask_image": mask() * 255}, ValueError, r"`mask_image` should have values in \[0, 1\], got 0 to 255"),
        ({"mask_image": random_image()}, ValueError, "`mask_image` must have 1 color channels"),
        ({"mask_image": [mask()] * 2, "prompt": ["a"] * 3}, ValueError, "`mask_image` must have one image, or one"),
        ({"strength": 0.0}, ValueError, "`strength` must be above 0"),
        ({"strength": 0.2}, ValueError, "`strength` times the number of steps must be at least 1"),
        ({"padding_mask_crop": -1}, ValueError, "`padding_mask_crop` must be at least 0"),
        ({"padding_mask_crop": 0.5}, TypeError, "`padding_mask_crop` must be an integer or None"),
        ({"padding_mask_crop": 1, "mask_image": mask() * 0}, ValueError, "`mask_image` must have white pixels with"),
        (
            {"padding_mask_crop": 1, "image": torch.zeros(1, tiny.LATENT_CHANNELS, 16, 16)},
            ValueError,
            "`padding_mask_crop` must be at least 0, and None for latents",
        ),
    ],
)
def test_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        generate(pipe, **{"image": random_image(), "mask_image": mask(), "prompt": PROMPT, **arguments})
