"""How good the emoji checkpoint is, on what it has not seen.

    python -m examples.train_emoji.evaluate --data outputs/emoji.zip [--model FOLDER]

Autoencoder: PSNR and SSIM on emoji that no training showed. Text to image: prompts whose triple of object, style
and background never occurred in training; each image is compared, in a fixed feature space (a network with seeded
random weights), with the true renderings of every object, of both styles, and of every background color.
"""

import json
import platform
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana import SanaPipeline, __version__
from diffusers_sana.evaluation.machine import device_name
from diffusers_sana.training.objectives.perceptual import RandomFeatures
from diffusers_sana.training.plots import save_image_grid

from .common import generate, make_parser, write_report
from .data import COLORS, COMMON_OBJECTS, POSITIONS, STYLES, EmojiArt, EmojiScenes, Scene, triples


def held_out_scenes(labels: Sequence[str], singles: int = 52, pairs: int = 12) -> list[Scene]:
    """Scenes of the objects `labels`: triples of object, style and color kept out of training, and random pairs."""
    rng = random.Random(1)
    positions = [p for p in POSITIONS if p]
    chosen = rng.sample(triples(labels, held_out=True), singles)
    scenes = [
        Scene((label,), style, color, "" if i % 4 else positions[i // 4 % len(positions)])
        for i, (label, style, color) in enumerate(chosen)
    ]
    scenes += [
        Scene(tuple(rng.sample(list(labels), 2)), rng.choice(STYLES), rng.choice(list(COLORS))) for _ in range(pairs)
    ]
    return scenes


def reconstruction(vae, art: EmojiArt, scenes: EmojiScenes) -> tuple[dict, Tensor]:
    """PSNR (dB) and SSIM over held-out emoji in both styles, and images: originals above reconstructions."""
    emoji = [(i,) for i in art.held_out for _ in STYLES]
    style = [j for _ in art.held_out for j in range(len(STYLES))]
    palette = torch.tensor(list(COLORS.values())) / 255
    color = palette[torch.arange(len(emoji)) % len(palette)]
    originals = scenes.compose(emoji, style, color, [""] * len(emoji), jitter=0.0)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(x).latent).sample for x in originals.split(32)]).clamp(-1, 1)
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(originals, decoded, strict=True)]
    psnr = [peak_signal_noise_ratio(a, b, data_range=2) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=2, channel_axis=0) for a, b in pairs]
    figures = {"images": len(pairs), "psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}
    shown = slice(None, None, max(1, len(pairs) // 16))
    return figures, torch.cat([originals[shown][:16], decoded[shown][:16]])


def feature_space() -> Callable[[Tensor], Tensor]:
    """Images `[B, 3, H, W]` -> unit vectors `[B, F]`; fixed by its seed, learns nothing."""
    network = RandomFeatures()

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = network(images)
        return torch.cat([F.normalize(F.adaptive_avg_pool2d(m, 8).flatten(1)) for m in maps], dim=1)

    return features


def prompt_following(images: dict[str, Tensor], scenes: list[Scene], renderer: EmojiScenes) -> dict[str, dict]:
    """How often the nearest true rendering is the prompted one, when only one property of the scene is varied.

    Args:
        images: name -> images `[B, 3, H, W]` of the B scenes; each is judged alike.
        scenes: what they should show; those with two objects are left out.
        renderer: composes the true images; its `labels` are the objects to tell apart.
    """
    features = feature_space()
    rows = [i for i, scene in enumerate(scenes) if len(scene.labels) == 1]
    scenes = [scenes[i] for i in rows]
    described = {name: features(batch[rows]) for name, batch in images.items()}

    def ranks(varied: Callable[[Scene], list[Scene]]) -> dict[str, list[int]]:
        """For each image, how many renderings are nearer to it than the true one."""
        found: dict[str, list[int]] = {name: [] for name in images}
        for i, scene in enumerate(scenes):
            gallery = varied(scene)
            renderings = features(renderer.render(gallery, jitter=0.0))
            for name, batch in described.items():
                order = torch.cdist(batch[i : i + 1], renderings)[0].argsort().tolist()
                found[name].append(order.index(gallery.index(scene)))
        return found

    objects = ranks(lambda s: [Scene((label,), s.style, s.color, s.position) for label in renderer.labels])
    colors = ranks(lambda s: [Scene(s.labels, s.style, color, s.position) for color in COLORS])
    styles = ranks(lambda s: [Scene(s.labels, style, s.color, s.position) for style in STYLES])

    def fraction(found: list[int], top: int = 1) -> float:
        return sum(rank < top for rank in found) / len(found)

    return {
        name: {
            "prompts": len(scenes),
            "object_top1": fraction(objects[name]),
            "object_top5": fraction(objects[name], top=5),
            "object_top1_chance": 1 / len(renderer.labels),
            "color_top1": fraction(colors[name]),
            "color_top1_chance": 1 / len(COLORS),
            "style_top1": fraction(styles[name]),
            "style_top1_chance": 1 / len(STYLES),
        }
        for name in images
    }


def captioned_grid(images: Tensor, captions: list[str], path: Path, columns: int = 8) -> None:
    """One PNG: images `[N, 3, H, W]` with their prompts below."""
    side, strip = images.shape[-1], 34
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * side, i // columns * (side + strip)
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (x, y))
        lines, line = [], ""
        for word in caption.split():
            longer = f"{line} {word}".strip()
            if draw.textlength(longer, font_size=9) > side - 4:
                lines.append(line)
                longer = word
            line = longer
        draw.multiline_text((x + 2, y + side + 1), "\n".join([*lines, line]), "black", font_size=9, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def evaluate(
    pipe: SanaPipeline, data: Path, labels: Sequence[str], out: Path, steps: int = 20, guidance_scale: float = 4.5
) -> dict:
    """Measures a pipeline that knows `labels`; writes `evaluation.json` and two images into `out`."""
    art = EmojiArt(data)
    renderer = EmojiScenes(art, labels=labels)
    figures, comparison = reconstruction(pipe.vae, art, renderer)
    scenes = held_out_scenes(labels)
    prompts = [scene.prompt for scene in scenes]
    images = generate(pipe, prompts, num_inference_steps=steps, guidance_scale=guidance_scale)
    truth = renderer.render(scenes, jitter=0.0)
    with torch.no_grad():
        decoded = torch.cat([pipe.vae.decode(pipe.vae.encode(x).latent).sample for x in truth.split(16)])
    out.mkdir(parents=True, exist_ok=True)
    save_image_grid(comparison, out / "reconstructions.png", columns=16)
    captioned_grid(images, prompts, out / "held_out.png")
    report = {
        "command": f"python -m examples.train_emoji.evaluate --steps {steps} --guidance-scale {guidance_scale}",
        "device": device_name(),
        "versions": {
            "diffusers_sana": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        "autoencoder_on_held_out_emoji": figures,
        **prompt_following(
            {
                "generated_from_held_out_prompts": images,
                "ceiling_autoencoded_truth": decoded.clamp(-1, 1),
            },
            scenes,
            renderer,
        ),
    }
    return write_report(report, out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/evaluation", "folder for figures and images", takes_model=True)
    parser.add_argument("--objects", choices=("common", "all"), default="common", help="what the model was taught")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.5)
    args = parser.parse_args(argv)
    pipe = SanaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    labels = EmojiArt(args.data).labels if args.objects == "all" else COMMON_OBJECTS
    print(json.dumps(evaluate(pipe, args.data, labels, args.out, args.steps, args.guidance_scale), indent=1))


if __name__ == "__main__":
    main()
