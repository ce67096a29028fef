"""Images to and from the [-1, 1] tensors of VILA-U's vision tower."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from diffusers_sana._compat import PilBackend
from diffusers_sana.images import read_image, to_rgb, upright
from diffusers_sana.models.vila_u.configuration_vila_u import NeverCopied


ASPECT_RATIOS = ("resize", "pad", "crop")
OUTPUT_TYPES = ("pil", "np", "uint8", "pt")
ROUNDINGS = ("round", "truncate")


class VilaUImageProcessorKwargs(ImagesKwargs, total=False):
    """What the image processor takes beyond the arguments that all image processors have.

    Attributes:
        image_aspect_ratio: how an image becomes a square. "resize" ignores the aspect ratio, as in the released
            model's training for understanding; "pad" adds bars of the mean color; "crop" takes the top square of a
            portrait and the central one of a landscape, as in its training for generation.
    """

    image_aspect_ratio: Literal["resize", "pad", "crop"]


class VilaUImageProcessor(NeverCopied, PilBackend):
    """Makes images square, resizes them (bicubic, by PIL) and maps 0..255 to [-1, 1].

    Every argument is a default for `preprocess`, where it can be overridden.
    """

    valid_kwargs = VilaUImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size = {"height": 256, "width": 256}
    resample = PILImageResampling.BICUBIC
    image_aspect_ratio = "resize"
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def __init__(self, **kwargs: Unpack[VilaUImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)
        _check_choice("image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)

    def _validate_preprocess_kwargs(
        self, image_aspect_ratio: str = "resize", data_format: Any = None, device: Any = None, **kwargs: Any
    ) -> None:
        _check_choice("image_aspect_ratio", image_aspect_ratio, ASPECT_RATIOS)
        _check_choice("data_format", data_format, (None, ChannelDimension.FIRST))  # of what the model takes
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(
                f"`device` must be the CPU, where images are prepared, got {device!r}. Move what is returned:"
                " `inputs.to(device)`."
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads images from paths, URLs and base64 as `diffusers_sana.images` does; passes on anything else."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str):
            return _fetched(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        """An image as `[C, H, W]`, with EXIF orientation applied; 16-bit integers and booleans are scaled to bytes."""
        if isinstance(image, Image.Image):
            image = to_rgb(image) if do_convert_rgb else upright(image)
        elif str(getattr(image, "dtype", "")).endswith("uint16"):
            image = np.round(np.asarray(image) / 257).astype(np.uint8)
        elif str(getattr(image, "dtype", "")).endswith("bool"):
            image = np.asarray(image).astype(np.uint8) * 255
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def _preprocess(  # type: ignore[override]  # one argument more than in the base class
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool | None,
        crop_size: SizeDict | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        return_tensors: Any,
        image_aspect_ratio: str,
        **kwargs: Any,
    ) -> BatchFeature:
        outputs = []
        for image in images:
            if np.issubdtype(image.dtype, np.floating):
                if not np.isfinite(image).all():
                    raise ValueError("`images` must be finite, but one has NaN or infinite values.")
                if do_rescale and rescale_factor == 1 / 255 and image.max() <= 1:
                    image = image * 255  # values in [0, 1] would otherwise be almost black
            if do_resize:
                image = self.resize(self.square(image, image_aspect_ratio, image_mean), size, resample)
            if do_center_crop:
                image = self.center_crop(image, crop_size)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            outputs.append(image)
        if do_pad:
            outputs = self.pad(outputs, pad_size=pad_size)
        return BatchFeature({"pixel_values": outputs}, tensor_type=return_tensors)

    @staticmethod
    def square(image: np.ndarray, image_aspect_ratio: str, image_mean: list[float]) -> np.ndarray:
        """Makes an image `[C, H, W]` square; with "resize" it is unchanged, and `resize` ignores its aspect ratio."""
        height, width = image.shape[1:]
        side = min(height, width) if image_aspect_ratio == "crop" else max(height, width)
        if height == width or image_aspect_ratio == "resize":
            return image
        if image_aspect_ratio == "crop":
            left = (width - side) // 2
            return image[:, :side, left : left + side]  # the top of a portrait
        mean = np.array([int(255 * value) for value in image_mean], dtype=image.dtype)
        canvas = np.broadcast_to(mean[:, None, None], (len(mean), side, side)).copy()
        top, left = (side - height) // 2, (side - width) // 2
        canvas[:, top : top + height, left : left + width] = image
        return canvas

    def postprocess(self, images: Tensor | list[Tensor], output_type: str = "pil", rounding: str = "round") -> Any:
        """Decoded pixels as images.

        Args:
            images: about [-1, 1], [3, H, W], [N, 3, H, W] or, for videos, [N, F, 3, H, W]; or a list of one of these.
            output_type: "pil" for `PIL.Image` (lists follow the leading dimensions), "np" for floats in [0, 1] with
                channels last, "uint8" for integers with channels last, "pt" for a tensor in [0, 1], channels first.
            rounding: to 8 bits. "round" has the smaller error; "truncate" is what the official scripts do.

        Raises:
            ValueError: an unknown option, a shape without 3 channels.
        """
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        _check_choice("rounding", rounding, ROUNDINGS)
        pixels = torch.stack(list(images)) if isinstance(images, list | tuple) else images
        if not isinstance(pixels, Tensor) or pixels.ndim < 3 or pixels.shape[-3] != 3:
            shape = tuple(getattr(pixels, "shape", ())) or type(pixels).__name__
            raise ValueError(f"`images` must be a tensor [..., 3, H, W], got {shape}.")
        pixels = ((pixels.detach().float() + 1) * 127.5).clamp(0, 255)
        if output_type == "pt":
            return pixels / 255
        pixels = pixels.movedim(-3, -1).cpu()
        if output_type == "np":
            return (pixels / 255).numpy()
        integers = (pixels.round() if rounding == "round" else pixels).to(torch.uint8).numpy()
        return integers if output_type == "uint8" else _to_pil(integers)


def _fetched(place: str) -> Image.Image:
    """The image at a path or URL, or in base64 with or without a `data:` header."""
    if place.startswith(("http://", "https://")):
        import httpx  # of huggingface_hub

        try:
            answer = httpx.get(place, timeout=60, follow_redirects=True).raise_for_status()
        except httpx.HTTPError as error:
            raise OSError(f"{place} cannot be fetched: {error}. Check the address, or give a file.") from error
        return read_image(BytesIO(answer.content))
    is_inline = place.startswith("data:")
    if not is_inline and len(place) < 4096 and Path(place).is_file():
        return read_image(place)
    try:
        content = base64.b64decode(place.partition(",")[2] if is_inline else place, validate=not is_inline)
    except ValueError:
        content = b""
    if not content:
        raise ValueError(
            "`images` must be images, or their paths, addresses that begin with http:// or https://, or base64, got"
            f" {place[:100]!r}, which is no file here."
        )
    return read_image(BytesIO(content))


def _to_pil(pixels: np.ndarray) -> Any:
    return Image.fromarray(pixels) if pixels.ndim == 3 else [_to_pil(item) for item in pixels]


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
