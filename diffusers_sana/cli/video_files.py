"""Video files: which can be written, how they are written, and the record in them of how they were made.

    .mp4          H.264 by imageio and ffmpeg, frame by frame; the record is a box of its own, which players pass over
    .webp, .gif   by Pillow; the record is the description in the EXIF data, or the comment

Legend: a record is JSON text of ASCII characters.
"""

import struct
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers_sana.arguments import UsageError


SUFFIXES = (".mp4", ".webp", ".gif")
BOX = b"diffusers_sana\0\0"  # the 16 bytes that tell a box of ours from those of others (ISO 14496-12, `uuid`)
DESCRIPTION = 0x010E  # of EXIF
FASTEST_GIF = 50  # frames per second; viewers show faster ones slowly
QUALITY = 8  # of 10, for H.264
LOSSY = {"quality": 90, "method": 4}  # of WebP


def check_video_file(out: Path, fps: float | None) -> None:
    """Raises where a video cannot be written in the format that `--out` names.

    Raises:
        UsageError: no format of videos, or frames that are too fast for it.
        ModuleNotFoundError: its writer is not installed.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"--out must be a folder, or end in {', '.join(SUFFIXES)} for a video, got {out}")
    if suffix == ".gif" and fps is not None and fps > FASTEST_GIF:
        raise UsageError(f"--fps must be at most {FASTEST_GIF} for a .gif, got {fps:g}. Choose .mp4 or .webp")
    lacks = [name for name in ("imageio", "imageio_ffmpeg") if find_spec(name) is None]
    if suffix == ".mp4" and lacks:
        packages = " and ".join(lacks).replace("_", "-")
        raise ModuleNotFoundError(
            f"a .mp4 needs {packages}, not installed here: pip install 'diffusers_sana[video]'; or let --out end in"
            " .webp or .gif"
        )


def write_video(path: Path, frames: Iterable[Any], fps: float, record: str) -> None:
    """Writes a video that plays in a loop where the format knows of loops.

    Args:
        path: in one of `SUFFIXES`.
        frames: images of Pillow; a `.mp4` is written while they come.
        fps: frames per second.
        record: how it was made.
    """
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _write_mp4(path, frames, fps)
        with open(path, "ab") as file:
            file.write(struct.pack(">I4s", 24 + len(record), b"uuid") + BOX + record.encode("ascii"))
        return
    first, *others = frames
    ticks = 100 if suffix == ".gif" else 1000  # per second
    ends = [round(index * ticks / fps) * 1000 // ticks for index in range(len(others) + 2)]
    options: dict[str, Any] = {"comment": record.encode("ascii")}
    if suffix == ".webp":
        exif = first.getexif()
        exif[DESCRIPTION] = record
        options = {"exif": exif, **LOSSY}
    durations = [end - start for start, end in pairwise(ends)]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, **options)


def read_video_record(path: Path) -> str | None:
    """The record in a video; None if there is none, or if this is no video."""
    if path.suffix.lower() == ".mp4":
        return next((body[len(BOX) :].decode("ascii") for body in _uuid_boxes(path) if body.startswith(BOX)), None)
    from PIL import Image

    try:
        with Image.open(path) as video:
            comment = video.info.get("comment") or video.getexif().get(DESCRIPTION)
    except OSError:
        return None
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else comment


def _write_mp4(path: Path, frames: Iterable[Any], fps: float) -> None:
    import imageio.v2 as imageio
    import numpy as np

    writer: Any = imageio.get_writer(path, format="FFMPEG", fps=fps, quality=QUALITY, macro_block_size=2)
    with writer as video:
        for frame in frames:
            video.append_data(np.asarray(frame))


def _uuid_boxes(path: Path) -> Iterator[bytes]:
    """The contents of the boxes of this type at the top of an MP4."""
    end = path.stat().st_size
    with open(path, "rb") as file:
        start = 0
        while start + 8 <= end:
            file.seek(start)
            size, kind = struct.unpack(">I4s", file.read(8))
            head = 8
            if size == 1:  # a larger box has its size in 64 bits
                size, head = int.from_bytes(file.read(8), "big"), 16
            if size < head:  # up to the end of the file, or no MP4
                return
            if kind == b"uuid":
                yield file.read(size - head)
            start += size
