"""Files of images and videos: their names, which are checked before anything is loaded, and how they are written."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_sana.arguments import UsageError, check_writable, one_line
from diffusers_sana.cli.record import png_text
from diffusers_sana.cli.video_files import check_video_file, write_video
from diffusers_sana.files import IMAGE_SUFFIXES, atomic_write


LONGEST = 48  # characters of the prompt in a file name, of at most 4 bytes each; a name has at most 255


@dataclass(frozen=True)
class Task:
    """One image or video to generate, and its file."""

    prompt: str
    seed: int
    path: Path


def name_files(
    out: Path,
    prompts: list[str],
    seeds: Iterable[int],
    overwrite: bool,
    is_video: bool = False,
    fps: float | None = None,
) -> list[Task]:
    """The images or videos to generate, each with a file that can be written.

    Args:
        out: the file of an image or a video, or a folder. The file of several gets their seeds into its name. In a
            folder the name is made of prompt and seed, with the number of the prompt if there are several, and a
            number behind it where the file is there already.
        prompts: each is for images of all `seeds`.
        seeds: consecutive.
        overwrite: whether files may be replaced.
        is_video: whether these are videos.
        fps: their frames per second, if given.

    Raises:
        UsageError: `out` cannot be written, has another format, or is there already.
        ModuleNotFoundError: the writer of the format is not installed.
    """
    pairs = [(number, prompt, seed) for number, prompt in enumerate(prompts, 1) for seed in seeds]
    try:
        is_folder = out.is_dir() or not out.suffix
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"--out cannot be {one_line(str(out), 200)}: {error.strerror}") from None
    if is_folder:
        check_writable("--out", out)
        suffix = ".mp4" if is_video else ".png"
        if is_video:
            check_video_file(out / f"x{suffix}", fps)
        width = len(str(len(prompts)))
        front = [f"{number:0{width}}-" if len(prompts) > 1 else "" for number, _, _ in pairs]
        names = [
            f"{start}{slug(prompt)}-seed{seed}{suffix}" for start, (_, prompt, seed) in zip(front, pairs, strict=True)
        ]
        paths = [out / name if overwrite else free(out / name) for name in names]
    else:
        if is_video:
            check_video_file(out, fps)
            check_writable("--out", out.parent)
        else:
            _check_file(out)
        if len(prompts) > 1:
            raise UsageError(f"--out must be a folder for --prompts, got {out}")
        paths = [out] if len(pairs) == 1 else [out.with_stem(f"{out.stem}-seed{seed}") for _, _, seed in pairs]
        there = [path for path in paths if path.exists() or path.is_symlink()]
        if there and not overwrite:
            raise UsageError(f"--out must be new, but {there[0]} is there already; pass --overwrite to replace it")
    return [Task(prompt, seed, path) for (_, prompt, seed), path in zip(pairs, paths, strict=True)]


def slug(prompt: str) -> str:
    """The words of a prompt as the beginning of a file name."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return words[:LONGEST].strip("-") or "image"


def free(path: Path) -> Path:
    """The path, with a number behind its name where there is such a file."""
    candidate, number = path, 2
    while candidate.exists() or candidate.is_symlink():
        candidate = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return candidate


def save(made: Any, task: Task, record: dict[str, Any], fps: float | None = None) -> None:
    """Writes an image or a video whole or not at all; a PNG and a video with `record` in it.

    Args:
        made: the image, or with `fps` the frames.
        task: whose file it is.
        record: how it was made.
        fps: frames per second of a video.

    Raises:
        OSError: naming the file.
    """
    options = {"pnginfo": png_text(record)} if task.path.suffix.lower() == ".png" else {}
    try:
        task.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(task.path) as path:
            if fps is None:
                made.save(path, **options)
            else:
                write_video(path, made, fps, json.dumps(record))
    except OSError as error:
        raise OSError(f"{task.path} cannot be written: {error.strerror or error}") from error


def _check_file(out: Path) -> None:
    from PIL import Image

    formats = Image.registered_extensions()
    able = [suffix for suffix in IMAGE_SUFFIXES if formats.get(suffix) in Image.SAVE]
    if out.suffix.lower() not in able:
        raise UsageError(f"--out must be a folder, or end in {', '.join(able)}, got {out}")
    check_writable("--out", out.parent)
