"""The encoded scenes that the transformer at 256 px learns from: computed once, kept in a file, sampled by kind.

Scenes have no jitter, so there are few of them: every scene of one object and every count is encoded. Only the pairs
are too many; as many as `PAIRS` are chosen at random. Captions and noise are new each time.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from diffusers_sana.files import atomic_write, digest

from .scenes import COLORS, CORNERS, NUMBERS, STYLES, UNCOUNTED, Art, Scene, Scenes, is_held_out, render


PAIRS = 40_000
View = Callable[[Tensor], Tensor]  # from images `[B, 3, H, W]` in [-1, 1] to others


def identity(images: Tensor) -> Tensor:
    """The images themselves."""
    return images


def taught_scenes(objects: list[str], pairs: int = PAIRS) -> list[Scene]:
    """What the transformer may see: all scenes that are not held out, of the pairs that many."""
    looks = list(product(objects, STYLES, COLORS))
    scenes = [Scene((word,), style, color) for word, style, color in looks]
    for word, style, color in looks:
        scenes += [Scene((word,), style, color, position) for position in CORNERS]
        if word not in UNCOUNTED:
            scenes += [Scene((word,) * number, style, color) for number in NUMBERS]
    taught = [scene for scene in scenes if not is_held_out(scene)]
    source = Scenes(objects, kinds={"pair": 1})
    return taught + [source.sample() for _ in range(pairs)]


@torch.no_grad()
def encode(vae: ModelMixin, art: Art, scenes: list[Scene], view: View = identity, batch_size: int = 32) -> Tensor:
    """Scaled latents `[N, C, h, w]` of views of the scenes, in fp16 on the CPU."""
    parts = []
    for start in trange(0, len(scenes), batch_size, desc="encoding the scenes", mininterval=10):
        images = view(render(art, scenes[start : start + batch_size]))
        parts.append((vae.encode(images.to(vae.dtype)).latent * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts).contiguous()  # a few images come in channels-last order


def load_latents(path: Path, vae: ModelMixin, art: Art, scenes: list[Scene], view: View = identity) -> Tensor:
    """Those of `encode`, from the file at `path` if that has the same scenes and autoencoder; else it is written."""
    weights = torch.cat([parameter.detach().float().cpu().flatten() for parameter in vae.encoder.parameters()])
    vae_digest = digest(weights.numpy().tobytes(), vae.config.scaling_factor)
    made_from = digest(vae_digest, art.digest, view.__name__, [repr(scene) for scene in scenes])
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata()["made_from"] == made_from:
                return file.get_tensor("latents")
    latents = encode(vae, art, scenes, view)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        save_file({"latents": latents}, file, {"made_from": made_from})
    return latents


def latent_batches(
    scenes: list[Scene],
    latents: Tensor,
    batch_size: int,
    seed: int = 0,
    kinds: Mapping[str, float] = Scenes.KINDS,
    caption: Callable[[Scene, random.Random], str] = Scene.caption,
) -> Iterator[dict]:
    """Endless batches `{"latents": [B, C, h, w], "text": list of B captions}`; `kinds` as in `Scenes`."""
    rows = defaultdict(list)
    for row, scene in enumerate(scenes):
        rows[scene.kind].append(row)
    rng = random.Random(seed)
    while True:
        chosen = [rng.choice(rows[kind]) for kind in rng.choices(list(kinds), list(kinds.values()), k=batch_size)]
        yield {"latents": latents[chosen].float(), "text": [caption(scenes[row], rng) for row in chosen]}
