"""Images and videos as users pass them: which belongs to which prompt, and which frames are used."""

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import load_video

from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, VIDEO


def is_image(item: Any) -> bool:
    """Whether `item` is an image, or a path or URL of one."""
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim in (2, 3)
    return isinstance(item, str | Path | Image.Image)


def codes_of_images(items: list[Any], num_image_tokens: int) -> list[Tensor]:
    """The items if they are codes `[num_image_tokens, D]`, an empty list if they are images.

    Raises:
        ValueError: images and codes are mixed, or codes have another number of image tokens.
    """
    integers = (torch.int32, torch.int64)
    codes = [item for item in items if isinstance(item, Tensor) and item.ndim == 2 and item.dtype in integers]
    if not codes:
        return []
    if len(codes) != len(items):
        raise ValueError(f"`images` must all be images or all codes, got {len(codes)} codes among {len(items)}.")
    for item in codes:
        if len(item) != num_image_tokens or item.shape != codes[0].shape:
            raise ValueError(f"codes in `images` must be [{num_image_tokens}, D], got {list(item.shape)}.")
    return codes


def is_video(item: Any) -> bool:
    """Whether `item` is a video: a file, a folder of frames, a list of frames, or frames along the first axis."""
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim == 4
    if isinstance(item, list | tuple):
        return len(item) > 0 and all(is_image(frame) and not isinstance(frame, str | Path) for frame in item)
    return isinstance(item, str | Path)


def media_of_rows(media: Any, counts: list[int], name: str, is_item: Callable[[Any], bool]) -> list[list[Any]]:
    """Assigns media to the prompts of a batch.

    Args:
        media: None, one item, a list of items for the whole batch in order, or one list per prompt.
        counts: placeholders in each prompt.
        name: the caller's name of `media`, "images" or "videos".
        is_item: whether something is an item.

    Raises:
        ValueError: a placeholder without an item, an item without a placeholder, a list that mixes items and lists,
            something that is not an item.
    """
    items = [] if media is None else [media] if is_item(media) else _listed(media, name)
    if items and all(isinstance(item, list | tuple) and not is_item(item) for item in items):
        rows = [list(item) for item in items]
        if len(rows) != len(counts):
            raise ValueError(f"`{name}` must have one list per prompt ({len(counts)}), got {len(rows)} lists.")
    else:
        rows = [items]
        counts = [sum(counts)] if len(counts) != 1 else counts
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        for item in row:
            if not is_item(item):
                raise ValueError(
                    f"`{name}` must hold {name} or, for every prompt, a list of {name}; got {type(item).__name__}"
                    f"{_shape(item)} among them."
                )
        if len(row) != count:
            where = f"prompt {index}" if len(rows) > 1 else "the text"
            raise ValueError(
                f"`{name}` must be as many as the placeholders `<{name[:-1]}>`: {where} has {count}, got {len(row)}. "
                "Each placeholder takes one, in order."
            )
    return rows


def media_in_order(texts: list[str], images: Any, videos: Any, num_frames: int, sample: bool) -> list[Any]:
    """All images and frames of a batch, in the order in which its prompts have `<image>` and `<video>`.

    Args:
        texts: prompts.
        images, videos: see `media_of_rows`.
        num_frames, sample: see `frames_of_video`.
    """
    image_rows = media_of_rows(images, [text.count(IMAGE) for text in texts], "images", is_image)
    video_rows = media_of_rows(videos, [text.count(VIDEO) for text in texts], "videos", is_video)
    next_of = {IMAGE: chain.from_iterable(image_rows), VIDEO: chain.from_iterable(video_rows)}
    ordered: list[Any] = []
    for mark in re.findall(f"{IMAGE}|{VIDEO}", "".join(texts)):
        item = next(next_of[mark])
        ordered += [item] if mark == IMAGE else frames_of_video(item, num_frames, sample)
    return ordered


def frames_of_video(video: Any, num_frames: int, sample: bool) -> list[Any]:
    """Equally spaced frames of a video, including the first and the last; a short video repeats frames.

    Args:
        video: see `is_video`; files are decoded by `transformers.video_utils.load_video` (PyAV).
        num_frames: number of frames.
        sample: False for a video that already has `num_frames` frames.

    Raises:
        ValueError: no frames, or without `sample` another number of them.
    """
    if isinstance(video, str | Path) and Path(video).is_dir():
        found = sorted(path for path in Path(video).iterdir() if path.suffix.lower() in Image.registered_extensions())
        video = found if not sample else [found[index] for index in _indices(len(found), num_frames, video)]
        return _checked([str(path) for path in video], num_frames)
    if isinstance(video, str | Path):
        frames, _ = load_video(
            str(video),  # type: ignore[arg-type]  # its annotation lacks paths
            sample_indices_fn=lambda metadata, **_: (
                _indices(metadata.total_num_frames, num_frames, video)
                if sample
                else np.arange(metadata.total_num_frames)
            ),
        )
        return _checked(list(frames), num_frames)
    if sample:
        return [video[index] for index in _indices(len(video), num_frames, "a video")]
    return _checked(list(video), num_frames)


def _indices(total: int, wanted: int, origin: Any) -> np.ndarray:
    if total < 1:
        raise ValueError(f"`videos` must have at least one frame each, but {origin} has none.")
    return np.round(np.linspace(0, total - 1, wanted)).astype(int)


def _checked(frames: list[Any], num_frames: int) -> list[Any]:
    if len(frames) != num_frames:
        raise ValueError(
            f"`videos` must have {num_frames} frames each where `do_sample_frames=False`, got one with {len(frames)}. "
            "Sample them, or let the processor do it."
        )
    return frames


def _listed(media: Any, name: str) -> list[Any]:
    if isinstance(media, list | tuple | np.ndarray | Tensor):
        return list(media)
    raise ValueError(f"`{name}` must be one of the {name[:-1]} kinds or a list, got {type(media).__name__}.")


def _shape(item: Any) -> str:
    return f" of shape {tuple(item.shape)}" if hasattr(item, "shape") else ""
