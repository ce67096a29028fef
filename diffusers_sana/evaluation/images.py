"""Images as files and as tensors, and the generation of those that are missing."""

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
from diffusers_sana.images import to_rgb


SETTINGS = "settings.json"


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as `[N, 3, H, W]` in [0, 1].

    Raises:
        ValueError: sizes differ.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"`images` must have one size, got sizes {sorted(sizes)}; resize them to one")
    pixels = np.stack([np.asarray(to_rgb(image)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def to_images(images: Tensor) -> list[Image.Image]:
    """The reverse of `to_tensor`."""
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def generate_missing(
    generate: Callable[[list[str], list[int]], Sequence[Image.Image]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    settings: dict[str, Any],
    batch_size: int = 8,
    description: str = "generating",
) -> list[Path]:
    """Generates `folder/00000.png` and so on, except those that an earlier, interrupted call has written.

    Batches are the same whichever images are missing, so an interrupted run ends with the same bits.

    Args:
        generate: from prompts and as many seeds to images.
        prompts, seeds: of all images.
        folder: new, or that of an earlier call.
        settings: what else the images depend on; recorded in the folder, and must not have changed.
        batch_size: images generated at a time.
        description: label of the progress bar.

    Returns:
        The paths of all images.

    Raises:
        ValueError: the folder has images of other settings.
    """
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    paths = [folder / f"{i:05d}.png" for i in range(len(rows))]
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, settings | {"batch_size": batch_size, "images": rows})
    batches = [range(i, min(i + batch_size, len(rows))) for i in range(0, len(rows), batch_size)]
    with tqdm(total=len(rows), desc=description, unit="image") as progress:
        for batch in batches:
            if not all(paths[i].exists() for i in batch):
                images = generate([prompts[i] for i in batch], [seeds[i] for i in batch])
                for i, image in zip(batch, images, strict=True):
                    with atomic_write(paths[i]) as temporary:  # a file of that name is a whole image
                        image.save(temporary, format="PNG")
            progress.update(len(batch))
    return paths


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    images = sorted(folder.glob("*.png"))  # without any, what an earlier call recorded before it failed says nothing
    if path.exists() and images:
        before = read_json(path)
        changed = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if changed:
            raise ValueError(
                f"`folder` must be new or have images of the same settings, but in {folder} "
                f"{', '.join(changed)} differ; choose another folder or delete it"
            )
    elif images:
        raise ValueError(
            f"`folder` must be new or one of this function, but {folder} has {images[0].name}; choose another"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
