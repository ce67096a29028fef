"""What a PNG or a video says of how it was made: the command, the inputs it depends on, and the versions."""

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from diffusers_sana.arguments import UsageError, check_file, open_input
from diffusers_sana.checkpoints import BUNDLED, BUNDLED_CONTROLNETS, BUNDLED_LORAS
from diffusers_sana.cli.video_files import SUFFIXES, read_video_record
from diffusers_sana.files import digest
from diffusers_sana.loading import checkpoint_path, identity


KEY = "diffusers_sana"  # of the text in a PNG
PACKAGES = ("torch", "diffusers", "transformers")
# Of one image of a run: its prompt and its seed, not where it was written, or how many there were.
NOT_OF_THE_IMAGE = ("prompt", "prompts", "seed", "num_images", "out", "overwrite", "device", "run", "command")


@dataclass(frozen=True)
class LoRA:
    """A LoRA as `--lora FILE[:SCALE]` names it."""

    place: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The `type` of `--lora`."""
        place, colon, end = text.rpartition(":")
        try:
            scale = float(end) if colon else math.nan
        except ValueError:
            colon = ""
        if not colon:
            place, scale = text, 1.0
        if not place or not math.isfinite(scale):
            raise argparse.ArgumentTypeError(
                f"must be a file, perhaps with a scale as in style.safetensors:0.8, got {text!r}"
            )
        return cls(place, scale)

    def __str__(self) -> str:
        return f"{_name(self.place)}:{self.scale!r}"


def make_record(args: argparse.Namespace) -> Callable[[Any, Any], dict[str, Any]]:
    """Hashes the inputs of a run; returns the function that gives the record of one of its images."""
    inputs = hash_inputs(args)

    def record(task: Any, pipe: Any) -> dict[str, Any]:
        dtype = str((pipe.model if hasattr(pipe, "model") else pipe.transformer).dtype).removeprefix("torch.")
        return {
            "prompt": task.prompt,
            "seed": task.seed,
            "steps": args.steps or getattr(pipe, "num_timesteps", None),
            "model": _name(args.model),
            "device": str(pipe.device),
            "command": _command(args, task, dtype),
            "inputs": inputs,
            "versions": versions(),
        }

    return record


def hash_inputs(args: argparse.Namespace) -> dict[str, str]:
    """A digest of everything on disk or on the Hub that the images of a command depend on, by option."""
    found = {"--model": identity(args.model, args.revision)}
    for name in ("image", "mask", "control_image"):
        if getattr(args, name) is not None:
            found["--" + name.replace("_", "-")] = digest(Path(getattr(args, name)))
    if args.controlnet is not None:
        found["--controlnet"] = identity(args.controlnet)
    for i, lora in enumerate(args.lora, 1):
        place = Path(checkpoint_path(lora.place))
        found[f"--lora {i}"] = digest(place) if place.is_file() else identity(lora.place)
    return found


def versions() -> dict[str, str]:
    """Of what computes images."""
    import diffusers_sana

    found = {"diffusers_sana": diffusers_sana.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def png_text(record: dict[str, Any]) -> Any:
    """The record as text for a PNG file."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(KEY, json.dumps(record), zip=True)
    return text


def read_record(path: Path) -> dict[str, Any]:
    """The record in a PNG or a video.

    Raises:
        UsageError: there is none.
    """
    is_video = path.suffix.lower() in SUFFIXES
    if is_video:
        check_file("IMAGE", path)
    found: Any = read_video_record(path) if is_video else open_input("IMAGE", path).info.get(KEY)
    try:
        record = json.loads(found)
        if not isinstance(record["command"], list) or not all(isinstance(word, str) for word in record["command"]):
            raise TypeError
        return {"inputs": dict(record["inputs"]), "versions": dict(record["versions"])} | record
    except (ValueError, LookupError, TypeError):
        raise UsageError(
            f"IMAGE must be a {'video' if is_video else 'PNG'} that `diffusers-sana generate` wrote, but {path} does"
            " not say how it was made"
        ) from None


def _command(args: argparse.Namespace, task: Any, dtype: str) -> list[str]:
    """The arguments of `diffusers-sana generate` that make one image."""
    words = [f"--seed={task.seed}", f"--dtype={dtype}"]
    for name, value in sorted(vars(args).items()):
        if name in (*NOT_OF_THE_IMAGE, "dtype") or value is None or value is False or value == []:  # but not 0
            continue
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
            continue
        text = ",".join(map(repr, value)) if name == "sigmas" else _name(value)
        values = [str(lora) for lora in value] if name == "lora" else [text]
        words += [f"--{name.replace('_', '-')}={value}" for value in values]
    return [*words, "--", task.prompt]


def _name(value: Any) -> str:
    """A value as the user gave it: the name of a bundled checkpoint, not its folder."""
    bundled = {place: name for name, place in (BUNDLED | BUNDLED_CONTROLNETS | BUNDLED_LORAS).items()}
    return bundled.get(str(value), str(value))
