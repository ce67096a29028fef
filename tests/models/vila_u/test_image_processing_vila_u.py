"""Images to tensors and back: three ways to make a square, exact values, rounding."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor


SIZE = {"height": 8, "width": 8}


def processor(**options):
    return VilaUImageProcessor(size=SIZE, **options)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def expected(square):
    pixels = np.asarray(square.resize((8, 8), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def pixels_of(image, **options):
    return processor()(image, return_tensors="pt", **options)["pixel_values"][0]


class TestSquares:
    @pytest.mark.parametrize("size", [(20, 12), (12, 20), (16, 16)])
    def test_resize_squashes(self, size):
        torch.testing.assert_close(pixels_of(noise(*size)), expected(noise(*size)))

    @pytest.mark.parametrize(
        ("size", "box"), [((21, 12), (4, 0, 16, 12)), ((12, 20), (0, 0, 12, 12)), ((16, 16), (0, 0, 16, 16))]
    )
    def test_crop_takes_the_top_or_the_centre(self, size, box):
        wanted = expected(noise(*size).crop(box))
        torch.testing.assert_close(pixels_of(noise(*size), image_aspect_ratio="crop"), wanted)

    @pytest.mark.parametrize(("size", "corner"), [((20, 12), (0, 4)), ((12, 20), (4, 0)), ((16, 16), (0, 0))])
    def test_pad_adds_the_mean_color(self, size, corner):
        canvas = Image.new("RGB", (max(size), max(size)), (127, 127, 127))
        canvas.paste(noise(*size), corner)
        torch.testing.assert_close(pixels_of(noise(*size), image_aspect_ratio="pad"), expected(canvas))

    def test_color_of_the_bars_is_that_of_the_mean(self):
        black = Image.new("RGB", (16, 2))
        options = {"image_aspect_ratio": "pad", "image_mean": [1.0, 0.0, 0.5], "do_normalize": False}
        assert pixels_of(black, **options)[:, 0, 0].mul(255).round().tolist() == [255, 0, 127]

    def test_unknown(self):
        for call in (
            lambda: processor(image_aspect_ratio="square"),
            lambda: pixels_of(noise(4, 4), image_aspect_ratio=""),
        ):
            with pytest.raises(Exception, match="image_aspect_ratio"):
                call()

    def test_default_is_kept(self, tmp_path):
        processor(image_aspect_ratio="crop").save_pretrained(tmp_path)
        loaded = VilaUImageProcessor.from_pretrained(tmp_path)
        assert loaded.image_aspect_ratio == "crop"
        wanted = pixels_of(noise(20, 12), image_aspect_ratio="crop")
        assert torch.equal(loaded(noise(20, 12), return_tensors="pt")["pixel_values"][0], wanted)


class TestOptionsOfAllImageProcessors:
    def test_center_crop(self):
        wanted = pixels_of(noise(20, 12))[:, 1:7, 2:6]
        options = {"do_center_crop": True, "crop_size": {"height": 6, "width": 4}}
        assert torch.equal(pixels_of(noise(20, 12), **options), wanted)
        assert torch.equal(processor(**options)(noise(20, 12), return_tensors="pt")["pixel_values"][0], wanted)

    def test_pad(self):
        padded = pixels_of(noise(20, 12), do_pad=True, pad_size={"height": 10, "width": 9})
        assert padded.shape == (3, 10, 9)
        assert torch.equal(padded[:, :8, :8], pixels_of(noise(20, 12)))
        assert not padded[:, 8:].any()
        assert not padded[:, :, 8:].any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data_format": "channels_last"}, "`data_format` must be one of"),
            ({"device": "cuda"}, "`device` must be the CPU, where images are prepared, got 'cuda'"),
            ({"do_center_crop": True}, "crop_size"),
        ],
        ids=str,
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            pixels_of(noise(4, 4), **options)

    def test_what_changes_nothing(self):
        options = {"data_format": "channels_first", "device": "cpu"}
        assert torch.equal(pixels_of(noise(20, 12), **options), pixels_of(noise(20, 12)))

    def test_unknown(self):
        with pytest.raises(Exception, match="do_sharpen"):
            pixels_of(noise(4, 4), do_sharpen=True)
        with pytest.raises(TypeError, match="do_denormalize"):
            processor().postprocess(torch.zeros(3, 4, 4), do_denormalize=False)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb(mode):
    image = noise(16, 16).convert(mode)
    torch.testing.assert_close(pixels_of(image), expected(image.convert("RGB")))


def test_images_of_different_sizes():
    batch = processor()([noise(20, 12), noise(9, 30)], return_tensors="pt")["pixel_values"]
    assert batch.shape == (2, 3, 8, 8)
    assert torch.equal(batch[1], pixels_of(noise(9, 30)))


class TestPostprocess:
    def test_inverse_of_preprocessing(self):
        image = noise(8, 8)
        assert np.array_equal(np.asarray(processor().postprocess(pixels_of(image))), np.asarray(image))

    def test_rounding(self):
        levels = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 3.0])  # 127.5 between two integers, 254.87 near the upper
        pixels = levels.expand(3, 1, 6)
        assert processor().postprocess(pixels, output_type="uint8")[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
        truncated = processor().postprocess(pixels, output_type="uint8", rounding="truncate")
        assert truncated[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]

    def test_shapes(self):
        video = torch.rand(2, 5, 3, 4, 6) * 2 - 1
        frames = processor().postprocess(video)
        assert [len(frames), len(frames[0])] == [2, 5]
        assert frames[0][0].size == (6, 4)
        assert processor().postprocess(video, output_type="np").shape == (2, 5, 4, 6, 3)
        torch.testing.assert_close(processor().postprocess(video, output_type="pt"), (video + 1) / 2)
        assert processor().postprocess(list(video[0]), output_type="uint8").shape == (5, 4, 6, 3)

    def test_half_precision(self):
        pixels = torch.rand(3, 4, 4).mul(2).sub(1).bfloat16()
        same = processor().postprocess(pixels.float(), output_type="uint8")
        assert np.array_equal(processor().postprocess(pixels, output_type="uint8"), same)

    @pytest.mark.parametrize(
        ("images", "options", "message"),
        [
            (torch.zeros(3, 4, 4), {"output_type": "jpg"}, "`output_type` must be one of"),
            (torch.zeros(3, 4, 4), {"rounding": "up"}, "`rounding` must be one of"),
            (torch.zeros(4, 4), {}, r"must be a tensor \[..., 3, H, W\], got \(4, 4\)"),
            (torch.zeros(4, 4, 3), {}, r"got \(4, 4, 3\)"),
            ("picture", {}, "got str"),
        ],
    )
    def test_refused(self, images, options, message):
        with pytest.raises(ValueError, match=message):
            processor().postprocess(images, **options)
