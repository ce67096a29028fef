"""Every form of an image is read with the same values, or refused by name."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana import images
from diffusers_sana.evaluation.images import to_tensor
from diffusers_sana.evaluation.measure import batches
from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor
from diffusers_sana.pipelines.conditioning import read_images
from diffusers_sana.pipelines.inpainting import fit_masks
from diffusers_sana.training.data.batches import nearest_size
from diffusers_sana.training.data.images import ImageFolder, load_pixels


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(PIXELS), exif


def turned(pixels, orientation):
    """By the table of the EXIF standard: where row 0 and column 0 of the stored image are to be seen."""
    rows_are_rows = orientation < 5
    flips = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    pixels = pixels if rows_are_rows else pixels.swapaxes(0, 1)
    return np.flip(pixels, [axis for axis in (0, 1) if flips[axis]])


class TestOrientation:
    @pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_files_are_upright(self, tmp_path, suffix, orientation):
        image, exif = with_orientation(orientation)
        path = tmp_path / f"a.{suffix}"
        image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        read, wanted = images.read_image(path), turned(PIXELS, orientation)
        assert images.image_size(path) == (read.height, read.width) == wanted.shape[:2]
        if suffix != "jpg":
            assert np.array_equal(np.asarray(read), wanted)

    def test_of_a_png_that_says_it_at_its_end(self, tmp_path):
        image, exif = with_orientation(6)
        data = io.BytesIO()
        image.save(data, "png")
        body, end = data.getvalue()[:-12], data.getvalue()[-12:]
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        (tmp_path / "a.png").write_bytes(body + late + end)
        assert images.image_size(tmp_path / "a.png") == (20, 12)
        assert np.array_equal(np.asarray(images.read_image(tmp_path / "a.png")), turned(PIXELS, 6))

    def test_the_header_is_enough_for_the_size(self, tmp_path):
        Image.fromarray(PIXELS).save(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        start = content.index(b"IDAT") + 4
        (tmp_path / "a.png").write_bytes(content[:start] + b"\0" * (len(content) - start - 12) + content[-12:])
        assert images.image_size(tmp_path / "a.png") == (12, 20)
        with pytest.raises(ValueError, match=r"a\.png' cannot be read as an image"):
            images.read_image(tmp_path / "a.png")

    def test_everywhere(self, tmp_path):
        image, exif = with_orientation(6)
        image.save(tmp_path / "a.png", exif=exif)
        wanted = torch.tensor(turned(PIXELS, 6).copy()).movedim(-1, 0) / 255
        opened = Image.open(tmp_path / "a.png")
        assert torch.equal(read_images("image", opened)[0], wanted)
        assert torch.equal(to_tensor([opened])[0], wanted)
        assert torch.equal(next(batches([tmp_path / "a.png"]))[0], wanted)
        torch.testing.assert_close(load_pixels(tmp_path / "a.png", 20, 12) / 2 + 0.5, wanted)
        folder = ImageFolder(str(tmp_path), [(32, 64), (64, 32)])
        assert folder.sizes_of_items == [nearest_size(20, 12, [(32, 64), (64, 32)])] == [(64, 32)]
        plain = VilaUImageProcessor(do_resize=False, do_normalize=False)
        for form in (opened, str(tmp_path / "a.png")):
            pixels = plain(plain.fetch_images(form), return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(pixels, wanted)

    def test_says_when_an_image_in_memory_is_turned(self, tmp_path, caplog):
        image, exif = with_orientation(6)
        image.save(tmp_path / "a.png", exif=exif)
        images.to_rgb(Image.open(tmp_path / "a.png"))
        assert not caplog.text
        images.to_rgb(Image.open(tmp_path / "a.png").rotate(90, expand=True))  # the tag is still there
        assert "turned upright" in caplog.text

    def test_broken_exif(self, tmp_path, caplog):
        Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense")
        assert np.array_equal(np.asarray(images.read_image(tmp_path / "a.png")), PIXELS)
        assert "EXIF data of an image cannot be read" in caplog.text


class TestFiles:
    @pytest.mark.parametrize("kept", [0, 20, 200, -30])
    def test_damaged(self, tmp_path, kept):
        for suffix in ("png", "jpg", "webp", "bmp"):
            path = tmp_path / f"half.{suffix}"
            Image.fromarray(PIXELS).save(path)
            path.write_bytes(path.read_bytes()[:kept])
            with pytest.raises(ValueError, match=rf"half\.{suffix}' cannot be read as an image"):
                images.read_image(path)

    def test_absent(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.png"):
            images.read_image(tmp_path / "none.png")

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [11_600, 20_000])  # above our limit, and above PIL's own
    def test_too_many_pixels_are_refused_before_they_are_decoded(self, tmp_path, side):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        content = chunk(b"IHDR", header) + chunk(b"IDAT", b"never read") + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        for read in (images.read_image, images.image_size):
            with pytest.raises(ValueError, match=r"bomb\.png' must have at most 134 million pixels"):
                read(tmp_path / "bomb.png")

    def test_the_limit_is_above_the_one_where_pil_warns(self, monkeypatch):
        assert 89_478_485 < images.max_pixels() < 2 * 89_478_485
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert images.max_pixels() == np.inf


GRAY = np.array([[0, 20000, 65535]], dtype=np.uint16)
LEVELS = GRAY.astype(np.float32) / 65535


def deep_images():
    """PIL images of more than 8 bits, all of the values `LEVELS`."""
    return {
        "I;16": Image.fromarray(GRAY),
        "I": Image.fromarray(GRAY.astype(np.int32)),
        "F": Image.fromarray(LEVELS),
    }


class TestDeepModes:
    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_pixels_and_masks(self, mode):
        image = deep_images()[mode]
        assert image.mode == mode
        for channels in (1, 3):
            pixels = images.to_pixels("image", image, channels)
            assert pixels.shape == (1, channels, 1, 3)
            assert np.allclose(pixels[0, 0], LEVELS, rtol=1e-6)
        assert np.asarray(images.to_rgb(image))[0, :, 1].tolist() == [0, 78, 255]

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_files_in_training_and_evaluation(self, tmp_path, suffix):
        path = tmp_path / f"depth.{suffix}"
        Image.fromarray(np.full((8, 8), 20000, dtype=np.uint16)).save(path)
        for pixels in (load_pixels(path, 8, 8) / 2 + 0.5, next(batches([path]))):
            assert torch.allclose(pixels, torch.tensor(78 / 255))
        processor = VilaUImageProcessor(do_resize=False, do_normalize=False)
        for form in (str(path), Image.open(path), np.full((8, 8, 1), 20000, dtype=np.uint16)):
            seen = processor(processor.fetch_images(form), return_tensors="pt")["pixel_values"]
            assert torch.allclose(seen, torch.tensor(78 / 255))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.full((2, 2), 255, np.int32), "may be of 8 bits .* or of 16"),
            (np.full((2, 2), 70000, np.int32), "unknown scale"),
            (np.full((2, 2), -1, np.int32), "unknown scale"),
            (np.full((2, 2), 255.0, np.float32), r"must be in \[0, 1\], got 255"),
            (np.full((2, 2), np.nan, np.float32), r"must be in \[0, 1\], got nan"),
        ],
    )
    def test_unknown_scales(self, values, message):
        for convert in (images.to_rgb, lambda image: images.to_pixels("image", image)):
            with pytest.raises(ValueError, match=f"`image`.*{message}"):
                convert(Image.fromarray(values))


class TestModes:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
    def test_opaque_images_are_as_pil_converts_them(self, mode):
        image = Image.fromarray(PIXELS).convert(mode)
        assert images.to_rgb(image).tobytes() == image.convert("RGB").tobytes()
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(-1, 0) / 255
        assert torch.equal(images.to_pixels("image", image)[0], pixels)
        mask = torch.from_numpy(np.asarray(image.convert("L")).copy()) / 255
        assert torch.equal(images.to_pixels("mask_image", image, 1)[0, 0], mask)

    def test_transparent_pixels_are_white_in_images_and_black_in_masks(self, tmp_path):
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        palette = Image.new("P", (4, 4))
        palette.putpalette([255, 0, 0] * 256)
        palette.info["transparency"] = 0
        gray = Image.new("LA", (4, 4), (128, 0))
        for image in (clear, palette, gray, clear.convert("RGBa"), gray.convert("La")):
            assert (images.to_pixels("image", image) == 1).all()
            assert (images.to_pixels("mask_image", image, 1) == 0).all()
        half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
        assert images.to_rgb(half).getpixel((0, 0)) == (204, 204, 204)
        clear.save(tmp_path / "clear.png")
        assert (load_pixels(tmp_path / "clear.png", 4, 4) == 1).all()
        assert (next(batches([tmp_path / "clear.png"])) == 1).all()


class TestArrays:
    @pytest.mark.parametrize(
        ("values", "wanted"),
        [
            (np.array([[0, 51, 255]], np.uint8), [0, 0.2, 1]),
            (np.array([[0, 13107, 65535]], np.uint16), [0, 0.2, 1]),
            (np.array([[0, 0.2, 1]], np.float64), [0, 0.2, 1]),
            (np.array([[0, 0.2, 1]], np.float16), [0, 0.2, 1]),
            (np.array([[False, True, True]]), [0, 1, 1]),
        ],
    )
    def test_dtypes(self, values, wanted):
        for form in (values, torch.from_numpy(values)):
            pixels = images.to_pixels("image", form)
            assert pixels.shape == (1, 3, 1, 3)
            assert pixels.dtype == torch.float32
            assert torch.allclose(pixels[0, 0, 0], torch.tensor(wanted, dtype=torch.float32), atol=1e-4)

    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
    def test_integers_of_no_scale(self, dtype):
        with pytest.raises(TypeError, match="`image` must hold floats"):
            images.to_pixels("image", np.full((2, 2), 7, dtype))

    def test_non_finite(self):
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match="`image` must be finite"):
                images.to_pixels("image", np.full((2, 2), value))

    def test_strides_and_byte_orders(self):
        values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
        for form in (values[:, ::-1], values.astype(">f4")[:, ::-1]):
            form.flags.writeable = False
            assert images.to_pixels("image", form)[0, 0].numpy().tolist() == values[:, ::-1].tolist()

    def test_layouts(self):
        array = PIXELS / np.float32(255)
        tensor = torch.from_numpy(array).movedim(-1, 0)
        for form in (array, array[None], tensor, tensor[None]):
            assert torch.equal(images.to_pixels("image", form)[0], tensor)
        assert images.to_pixels("image", np.zeros((4, 5, 6, 1))).shape == (4, 3, 5, 6)
        for form in (np.zeros((1, 1, 3)), torch.zeros(1, 3, 1, 1)):  # one pixel
            assert images.to_pixels("image", form).shape == (1, 3, 1, 1)

    @pytest.mark.parametrize(
        "form", [np.zeros((3, 8, 8)), torch.zeros(8, 8, 3), np.zeros((2, 3, 8, 8)), np.zeros((8, 8, 4)), np.zeros(3)]
    )
    def test_other_layouts(self, form):
        with pytest.raises(ValueError, match="`image` must have 3 color channels, in arrays as the last axis"):
            images.to_pixels("image", form)

    @pytest.mark.parametrize("form", [np.zeros((3, 8, 3)), torch.zeros(3, 8, 3), torch.zeros(2, 3, 8, 3)])
    def test_layouts_that_can_be_read_two_ways(self, form):
        with pytest.raises(ValueError, match="may have its colors first or last"):
            images.to_pixels("image", form)

    def test_empty(self):
        with pytest.raises(ValueError, match="`image` must have pixels"):
            images.to_pixels("image", torch.zeros(0, 3, 8, 8))

    def test_bytes_of_zero_and_one(self, caplog):
        assert images.to_pixels("image", np.ones((2, 2), np.uint8)).max() == np.float32(1 / 255)
        assert "`image` has bytes of 0 and 1 only" in caplog.text


class TestMasks:
    @pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int8, np.int32, np.int64, np.float32, np.float64])
    def test_zero_and_one(self, dtype):
        values = np.array([[0, 1], [1, 0]], dtype)
        for form in (values, torch.from_numpy(values)):
            assert images.to_pixels("mask_image", form, 1)[0, 0].tolist() == [[0, 1], [1, 0]]
        if dtype in (bool, np.uint8, np.uint16, np.int32):
            assert images.to_pixels("mask_image", Image.fromarray(values), 1)[0, 0].tolist() == [[0, 1], [1, 0]]

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
    def test_zero_and_255(self, dtype):
        values = np.array([[0, 255]], dtype)
        assert images.to_pixels("mask_image", values, 1)[0, 0].tolist() == [[0, 1]]

    def test_labels_of_several_classes(self):
        with pytest.raises(TypeError, match=r"`mask_image` must hold floats .* integers of 0 and 1, or of 0 and 255"):
            images.to_pixels("mask_image", np.array([[0, 1, 2]]), 1)

    @pytest.mark.parametrize(
        "form", [np.zeros((8, 8, 3)), torch.zeros(3, 8, 8), np.zeros((3, 8, 8)), torch.zeros(4, 8, 8)]
    )
    def test_one_in_color_or_several(self, form):
        with pytest.raises(ValueError, match="may be one mask in color or"):
            images.to_pixels("mask_image", form, 1)

    def test_several(self):
        for form in (np.zeros((2, 8, 9)), torch.zeros(2, 8, 9), torch.zeros(3, 1, 8, 9), np.zeros((3, 8, 9, 1))):
            assert images.to_pixels("mask_image", form, 1).shape == (form.shape[0], 1, 8, 9)

    @pytest.mark.parametrize(
        ("mask", "image", "fits"),
        [
            ((64, 64), (128, 128), True),
            ((64, 43), (1024, 683), True),
            ((2048, 1366), (1024, 683), True),
            ((100, 100), (100, 101), True),
            ((100, 100), (100, 110), False),
            ((50, 100), (100, 100), False),
            ((32, 8), (128, 64), False),
        ],
    )
    def test_of_another_size(self, mask, image, fits):
        masks = torch.ones(1, 1, *mask)
        if fits:
            assert fit_masks(masks, image, image).shape == (1, 1, *image)
            assert fit_masks(masks, (32, 16), image).shape == (1, 1, 32, 16)  # cut as the image was
            return
        with pytest.raises(ValueError, match="`mask_image` must have the proportions of `image`"):
            fit_masks(masks, image, image)

    def test_nothing_masked(self, caplog):
        images.check_masks("mask_image", torch.ones(2, 1, 4, 4))
        assert not caplog.text
        images.check_masks("mask_image", torch.stack([torch.ones(1, 4, 4), torch.full((1, 4, 4), 2 / 255)]))
        assert "`mask_image` masks nothing" in caplog.text


class TestVilaU:
    def test_forms(self):
        processor = VilaUImageProcessor(size={"height": 8, "width": 8})

        def pixels(form):
            return processor(form, return_tensors="pt")["pixel_values"][0]

        expected = pixels(Image.fromarray(PIXELS))
        for form in (PIXELS, PIXELS / 255, PIXELS.astype(np.float32), PIXELS.astype(np.uint16) * 257):
            torch.testing.assert_close(pixels(form), expected)
        black_and_white = PIXELS > 127
        torch.testing.assert_close(pixels(black_and_white), pixels(black_and_white.astype(np.uint8) * 255))
        with pytest.raises(ValueError, match="`images` must be finite"):
            pixels(np.full((4, 4, 3), np.nan))

    def test_ordinary_files_have_the_bits_that_pil_reads(self, tmp_path):
        for suffix in ("png", "jpg"):
            Image.fromarray(PIXELS).save(tmp_path / f"a.{suffix}")
            read = VilaUImageProcessor().fetch_images(str(tmp_path / f"a.{suffix}"))
            assert read.tobytes() == Image.open(tmp_path / f"a.{suffix}").convert("RGB").tobytes()

    def test_transparent_files_are_as_transparent_images(self, tmp_path):
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        image.save(tmp_path / "a.png")
        processor = VilaUImageProcessor(do_resize=False, do_normalize=False)
        for form in (image, str(tmp_path / "a.png")):
            assert (processor(processor.fetch_images(form), return_tensors="pt")["pixel_values"] == 1).all()

    def test_base64(self):
        data = io.BytesIO()
        Image.fromarray(PIXELS).save(data, "png")
        text = base64.b64encode(data.getvalue()).decode()
        for form in (text, f"data:image/png;base64,{text}"):
            assert np.array_equal(np.asarray(VilaUImageProcessor().fetch_images(form)), PIXELS)
        with pytest.raises(ValueError, match=r"'nowhere\.png', which is no file here"):
            VilaUImageProcessor().fetch_images("nowhere.png")
