"""Clips of videos, and images, at the sizes of a training.

Animations (GIF, WebP, PNG) are read by Pillow; other videos by FFmpeg, through the package `imageio-ffmpeg`.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from diffusers_sana.files import IMAGE_SUFFIXES
from diffusers_sana.images import image_size, read_image, to_rgb
from diffusers_sana.training.data.batches import nearest_size
from diffusers_sana.training.data.images import Images, to_size
from diffusers_sana.training.data.sources import FolderSource


logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)  # an image is a video of one frame


class VideoInfo(NamedTuple):
    """What is in a video: number of frames, height and width in pixels, frames per second (0 for an image)."""

    frames: int
    height: int
    width: int
    fps: float


class Clip(NamedTuple):
    """A part of a video: the number of its source, and of the frames that are taken from it."""

    source: int
    frames: tuple[int, ...]


def video_info(path: Path) -> VideoInfo:
    """What is in a video, an animation or an image.

    Raises:
        ImportError: a video without `imageio-ffmpeg`.
        ValueError: the file is damaged; the message names it.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        reader = _ffmpeg(path)
        try:
            frames, _ = reader.count_frames_and_secs(str(path))
            about = next(stream := reader.read_frames(str(path)))
            stream.close()
        except (OSError, RuntimeError, StopIteration) as error:
            raise _damaged(path, error) from error
        width, height = about["size"]
        return VideoInfo(frames, height, width, about["fps"])
    height, width = image_size(path)
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames == 1:
            return VideoInfo(1, height, width, 0.0)
        try:
            shown = sum(_milliseconds(frame) for frame in ImageSequence.Iterator(image))
        except (OSError, SyntaxError) as error:
            raise _damaged(path, error) from error
    return VideoInfo(frames, height, width, 1000 * frames / shown)


def _milliseconds(frame: Image.Image) -> float:
    """How long a frame is shown; where it does not say so, a tenth of a second, as in browsers."""
    frame.load()  # WebP does not know before
    return frame.info.get("duration") or 100


def read_frames(path: Path, numbers: Sequence[int]) -> list[Image.Image]:
    """Frames of a file in RGB, by their numbers, which ascend; see `video_info` for errors."""
    wanted = set(numbers)
    found: dict[int, Image.Image] = {}
    for number, frame in enumerate(_frames(path)):
        if number in wanted:
            found[number] = frame
        if number >= numbers[-1]:
            break
    if missing := wanted - found.keys():
        raise _damaged(path, f"frame {min(missing)} is not there")
    return [found[number] for number in numbers]


def _frames(path: Path) -> Iterator[Image.Image]:
    """All frames in RGB."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        try:
            stream = _ffmpeg(path).read_frames(str(path))
            size = next(stream)["size"]
            for pixels in stream:
                yield Image.frombytes("RGB", size, pixels)
        except (OSError, RuntimeError, StopIteration) as error:
            raise _damaged(path, error) from error
        return
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) == 1:
            yield read_image(path)
            return
        try:
            for frame in ImageSequence.Iterator(image):
                yield to_rgb(frame.copy(), str(path))
        except (OSError, SyntaxError) as error:
            raise _damaged(path, error) from error


def _ffmpeg(path: Path) -> Any:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(f"{str(path)!r} is read by FFmpeg: pip install 'diffusers_sana[video]'") from error
    return imageio_ffmpeg


def _damaged(path: Path, reason: Any) -> ValueError:
    return ValueError(f"{str(path)!r} cannot be read as a video: {reason}. Replace or remove it.")


def cut(info: VideoInfo, lengths: Sequence[int], fps: float = 0.0, clips: int = 1) -> list[tuple[int, ...]]:
    """The frames of the clips of a video: of the largest of `lengths` that it has, and at most so many as fit.

    Args:
        info: of the video.
        lengths: numbers of frames that a clip may have.
        fps: of the clips, whose frames are the nearest of the video; 0 takes all as they are.
        clips: most of them; they are spread evenly over the video, and a single one is from its middle.

    Returns:
        For each clip, numbers of frames; none where the video is too short.
    """
    step = info.fps / fps if fps and info.fps else 1.0
    available = int((info.frames - 1) / step + 1e-6) + 1
    length = max((length for length in lengths if length <= available), default=0)
    if not length:
        return []
    number = min(clips, available // length)
    slack = available - length
    starts = [slack // 2] if number == 1 else [round(slack * at / (number - 1)) for at in range(number)]
    return [tuple(round((start + at) * step) for at in range(length)) for start in starts]


class Videos(Dataset):
    """Clips of the videos of a folder, and images, each scaled and cut to one of several sizes.

    Items are `{"pixel_values": [3, F, H, W] in [-1, 1], "text": caption or ""}`; an image has one frame. A clip has
    the size out of `sizes` whose shape is nearest to its own; `sizes_of_items` lists frames, height and width of each.

    Args:
        source: a folder, with `suffixes=SUFFIXES`. Its images are taken, too.
        sizes: (height, width) pairs in pixels.
        lengths, fps, clips: see `cut`. Of a video that is too short for all lengths but 1 a warning tells.
        images: further images.

    Attributes:
        names, captions: of each item.

    Raises:
        ValueError: there is nothing to train on.
    """

    def __init__(
        self,
        source: FolderSource,
        sizes: list[tuple[int, int]],
        lengths: Sequence[int],
        fps: float = 16.0,
        clips: int = 1,
        images: Images | None = None,
    ):
        self.source, self.images, self.fps = source, images, fps
        self.clips: list[Clip] = []
        self.names: list[str] = []
        self.captions: list[str] = []
        self.sizes_of_items: list[tuple[int, int, int]] = []
        short = []
        for index, name in enumerate(tqdm(source.names, desc="reading videos", delay=5)):
            info = video_info(source.open(index))
            found = [(0,)] if info.frames == 1 else cut(info, lengths, fps, clips)
            if not found:
                short.append(name)
            for frames in found:
                self.clips.append(Clip(index, frames))
                self.names.append(f"{name}, from frame {frames[0]}")
                self.captions.append(source.captions[index])
                self.sizes_of_items.append((len(frames), *nearest_size(info.height, info.width, sizes)))
        if short:
            logger.warning(
                f"`data`: {len(short)} videos are left out, because they have fewer than {min(lengths)} frames"
                f"{f' at {fps:g} per second' if fps else ''}. The first is {short[0]!r}."
            )
        if images is not None:
            self.names += images.names
            self.captions += images.captions
            self.sizes_of_items += [(1, *size) for size in images.sizes_of_items]
        if not self.names:
            raise ValueError(
                f"`data` must have videos of {min(lengths)} frames or more, got none. Pass fewer `frames`."
            )

    def made_from(self, index: int) -> list[Any]:
        """What an item depends on, for `fill_cache`."""
        if index >= len(self.clips):
            assert self.images is not None
            return self.images.made_from(index - len(self.clips))
        at, frames = self.clips[index]
        stamp = self.source.stamp(at)
        return [self.source.names[at], stamp, list(self.sizes_of_items[index]), [self.captions[index]], list(frames)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.clips):
            assert self.images is not None
            image = self.images[index - len(self.clips)]
            return {"pixel_values": image["pixel_values"].unsqueeze(1), "text": image["text"]}
        at, numbers = self.clips[index]
        _, height, width = self.sizes_of_items[index]
        frames: list[Tensor] = [to_size(frame, height, width) for frame in read_frames(self.source.open(at), numbers)]
        return {"pixel_values": torch.stack(frames, dim=1), "text": self.captions[index]}
