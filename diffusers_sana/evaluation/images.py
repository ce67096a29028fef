"""Pictures as files and as tensors, and drawing those that are not there yet."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_sana.files import atomic_write, read_json
from diffusers_sana.images import SUFFIXES, to_rgb


SETTINGS = "settings.json"


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures `[N, 3, H, W]` in [0, 1]; all must have one size.

    Raises:
        ValueError: where sizes differ.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"`images` must be pictures of one size, got sizes {sorted(sizes)}; scale them to one")
    pixels = np.stack([np.asarray(to_rgb(image)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def to_images(pictures: Tensor) -> list[Image.Image]:
    """The reverse of `to_tensor`."""
    pixels = (pictures * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def pictures_in(folder: Path) -> list[Path]:
    """All image files of a folder, in order of their names; hidden ones, such as a kill leaves, are none.

    Raises:
        OSError: where there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise OSError(f"`folder` must be a folder of pictures, but there is no folder {folder}")
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    paths = sorted(path for path in found if not path.name.startswith("."))
    if not paths:
        raise OSError(f"`folder` must have pictures in it ({', '.join(SUFFIXES)}), but {folder} has none")
    return paths


def draw_missing(
    draw: Callable[[list[str], list[int]], Sequence[Image.Image]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    settings: dict[str, Any],
    batch_size: int = 8,
    description: str = "drawing",
) -> list[Path]:
    """Draws `folder/00000.png` and so on, without those of an earlier call that was cut off.

    Batches are the same whichever pictures are missing, so that a drawing that was cut off ends with the same bits.

    Args:
        draw: from prompts and as many seeds to pictures.
        prompts, seeds: of all pictures.
        folder: new, or that of an earlier call.
        settings: what the pictures depend on besides; kept in the folder, and must not have changed.
        batch_size: pictures at a time.
        description: what the progress bar says.

    Raises:
        ValueError: where the folder has pictures of other settings.
    """
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    paths = [folder / f"{i:05d}.png" for i in range(len(rows))]
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, settings | {"batch_size": batch_size, "pictures": rows})
    batches = [range(i, min(i + batch_size, len(rows))) for i in range(0, len(rows), batch_size)]
    with tqdm(total=len(rows), desc=description, unit="picture") as progress:
        for batch in batches:
            if not all(paths[i].exists() for i in batch):
                images = draw([prompts[i] for i in batch], [seeds[i] for i in batch])
                for i, image in zip(batch, images, strict=True):
                    with atomic_write(paths[i]) as temporary:  # a name stands for a whole image
                        image.save(temporary, format="PNG")
            progress.update(len(batch))
    return paths


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = read_json(path)
        changed = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if changed:
            raise ValueError(
                f"`folder` must be new or have pictures of the same settings, but in {folder} "
                f"{', '.join(changed)} differ; choose another folder or delete it"
            )
    elif read := sorted(folder.glob("*.png")):
        raise ValueError(
            f"`folder` must be new or one of this function, but {folder} has {read[0].name}; choose another"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
