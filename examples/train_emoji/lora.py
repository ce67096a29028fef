"""Trains the bundled LoRA that makes the emoji checkpoint generate pixel art, within minutes on one core of a CPU.

    python -m examples.train_emoji.lora --data outputs/emoji.zip --out outputs/sana-emoji-pixel-art

The images are emoji scenes in few large pixels and few colors, written as an ordinary captioned folder.
`examples/train_sana_lora.py` learns from that, on the 16-bit base and on the base in 4 bits. A fifth of the objects is
kept out and judged. One large pixel is 16 small ones wide: the checkpoint's autoencoder blurs smaller ones away.
`OUT/lora` and `OUT/lora-int4` are the runs, which go on where they stopped; `OUT/bundle` is the first one's LoRA in
bf16. The figures are in `benchmarks/results/<device>/lora_pixel_art.json`.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import quantize
from diffusers_sana.files import read_json_lines
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.lora import run as train_lora
from diffusers_sana.training.recipes.options import LoraDataOptions, LoraModelOptions, LoraTrainingConfig

from .common import generate, load_pipeline, make_parser, resumable
from .data import COLORS, COMMON_OBJECTS, STYLES, EmojiArt, EmojiScenes, Scene, is_held_out
from .evaluate import held_out_scenes, prompt_following
from .models import RESOLUTION


SUFFIX = ", pixel art"  # of every prompt
PIXEL = 16  # small pixels a large one is wide
LEVELS = 6  # of each color: a palette of 216
KEPT_OUT = tuple(label for label in COMMON_OBJECTS if zlib.crc32(label.encode()) % 4 == 0)
TAUGHT = tuple(label for label in COMMON_OBJECTS if label not in KEPT_OUT)


def blocks(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` with each block of `PIXEL` x `PIXEL` replaced by its mean."""
    return F.interpolate(F.avg_pool2d(images, PIXEL), scale_factor=PIXEL, mode="nearest")


def pixelate(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [-1, 1] as pixel art: large pixels, each color rounded to `LEVELS` values."""
    steps = (LEVELS - 1) / 2
    return ((blocks(images) + 1) * steps).round() / steps - 1


def within_blocks(images: Tensor) -> float:
    """Fraction of the variance that is within blocks, mean over images `[B, 3, H, W]`: 0 for pixel art."""
    rest = (images - blocks(images)).square().mean((1, 2, 3))
    return (rest / images.var((1, 2, 3), correction=0)).mean().item()


def on_grid(images: Tensor) -> float:
    """Fraction of the squared differences of neighbours that is between blocks: 1 for pixel art, 1/16 by chance.

    Unlike `within_blocks` it gains nothing from blur.
    """
    differences = [view.diff(dim=-1).square().sum((1, 2)) for view in (images, images.transpose(2, 3))]
    total = torch.stack(differences).sum(0)  # [B, W - 1]
    return (total[:, PIXEL - 1 :: PIXEL].sum(1) / total.sum(1)).mean().item()


class PixelScenes(EmojiScenes):
    """Scenes of one object each, as pixel art."""

    def sample_scene(self) -> Scene:
        """One of `labels` in the middle; never what `is_held_out` names."""
        scene = Scene((self.random.choice(self.labels),), self.random.choice(STYLES), self.random.choice([*COLORS]))
        return self.sample_scene() if is_held_out(scene.labels[0], scene.style, scene.color) else scene

    def render(self, scenes: list[Scene], jitter: float = 1.0) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of the scenes."""
        return pixelate(super().render(scenes, jitter))


def write_images(scenes: PixelScenes, folder: Path, count: int) -> None:
    """`count` images and `metadata.jsonl`, with captions that end in `SUFFIX`."""
    folder.mkdir(parents=True, exist_ok=True)
    described = [scenes.sample_scene() for _ in range(count)]
    pixels = ((scenes.render(described) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = []
    for index, (scene, image) in enumerate(zip(described, np.asarray(pixels), strict=True)):
        Image.fromarray(image).save(folder / f"{index:04d}.png")
        rows.append(json.dumps({"file_name": f"{index:04d}.png", "text": scenes.caption(scene) + SUFFIX}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def train(images: Path, out: Path, base: str, steps: int, precision: str = "no") -> Path:
    """Trains on a folder of images; returns the folder of the LoRA. `precision` "int4" makes the base 4 bits."""
    config = LoraTrainingConfig(
        output_dir=str(out),
        rank=8,
        target_modules=("to_q", "to_k", "to_v", "to_out.0"),
        mix_ffn=True,
        max_steps=steps,
        learning_rate=2e-3,
        lr_schedule="cosine",
        warmup_steps=min(20, steps // 2),
        caption_dropout=0.1,
        sample_minutes=1e9,
        resume=resumable(out),
    )
    data = LoraDataOptions(
        data=str(images),
        cache_dir=str(images.with_name("cache")),  # the same for every base
        resolution=RESOLUTION,
        batch_size=16,
    )
    train_lora(config, data, LoraModelOptions(pretrained=base, quantize=precision))
    return out / "model"


def bundle(lora: Path, out: Path) -> Path:
    """Writes the weights of a LoRA in bf16, half the bytes, into the folder `out`, and returns it."""
    with safe_open(lora / LORA_WEIGHT_NAME_SAFE, "pt") as file:
        weights = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118 not a dict
        metadata = file.metadata()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / LORA_WEIGHT_NAME_SAFE, metadata)
    return out


def judge(art: EmojiArt, base: str, loras: dict[str, Path], out: Path, count: int = 24, steps: int = 20) -> dict:
    """Figures of objects that no LoRA was shown, and an image of them, `OUT/held_out.png`.

    Its rows: without LoRA; with it; that made sharp by `pixelate`; base in 4 bits and the LoRA that was trained on it;
    the true images through the autoencoder, and as they are.

    Args:
        art: the emoji.
        base: pipeline folder.
        loras: folders, of "lora" and "lora_int4", the latter trained on the base in 4 bits.
        out: folder for the image.
        count: prompts.
        steps: of the sampler.
    """
    labels = [label for label in art.labels if label in KEPT_OUT] or art.labels
    scenes = [Scene(s.labels, s.style, s.color) for s in held_out_scenes(labels, singles=count, pairs=0)]
    prompts = [scene.prompt + SUFFIX for scene in scenes]
    pipe = load_pipeline(base)
    known = art.among(COMMON_OBJECTS)
    truth = PixelScenes(art, RESOLUTION, labels=known)
    true_images = truth.render(scenes, jitter=0.0)
    images = {"without_lora": generate(pipe, prompts, num_inference_steps=steps)}
    pipe.load_lora_weights(loras["lora"])
    images["lora"] = generate(pipe, prompts, num_inference_steps=steps)
    pipe.unload_lora_weights()
    quantize(pipe, progress=False)
    for name, folder in (("lora_on_4_bit_base", loras["lora"]), ("lora_trained_on_4_bit_base", loras["lora_int4"])):
        pipe.load_lora_weights(folder)
        images[name] = generate(pipe, prompts, num_inference_steps=steps)
        pipe.unload_lora_weights()
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(true_images).latent).sample.clamp(-1, 1)
    images |= {f"{name}_made_sharp": pixelate(batch) for name, batch in images.items()}
    images |= {"truth_through_autoencoder": decoded, "truth": true_images}
    shown = ("without_lora", "lora", "lora_made_sharp", "lora_trained_on_4_bit_base")
    rows = [images[name][:12] for name in (*shown, "truth_through_autoencoder", "truth")]
    save_image_grid(torch.cat(rows), out / "held_out.png", columns=min(12, count))
    recognized = prompt_following(images, scenes, truth)
    return {
        name: {
            "variance_within_large_pixels": round(within_blocks(batch), 4),
            "differences_on_their_grid": round(on_grid(batch), 4),
            **{key: round(recognized[name][key], 4) for key in ("object_top1", "object_top5", "object_top1_chance")},
        }
        for name, batch in images.items()
    }


def summary(run: Path) -> dict:
    """Steps and minutes of a run, and the mean loss of its last hundred steps."""
    rows = [row for _, row in read_json_lines(run / "log.jsonl")]
    loss = sum(row["loss"] for row in rows[-10:]) / len(rows[-10:])
    return {"steps": rows[-1]["step"], "minutes": rows[-1]["minutes"], "final_loss": round(loss, 4)}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/sana-emoji-pixel-art", "folder of the runs", takes_model=True)
    parser.add_argument("--pictures", type=int, default=384, help="how many to learn from")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--prompts", type=int, default=24, help="how many to judge by")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args(argv)
    art = EmojiArt(args.data)
    images = args.out / "pictures"
    if not (images / "metadata.jsonl").exists():
        taught = [label for label in art.labels if label in TAUGHT] or art.labels
        write_images(PixelScenes(art, RESOLUTION, seed=6, labels=taught), images, args.pictures)
    loras = {
        "lora": bundle(train(images, args.out / "lora", args.model, args.steps), args.out / "bundle"),
        "lora_int4": train(images, args.out / "lora-int4", args.model, args.steps, "int4"),
    }
    report = {
        **environment(),
        "training": {
            "pictures": args.pictures,
            "objects": len(TAUGHT),
            "lora": summary(args.out / "lora"),
            "lora_trained_on_4_bit_base": summary(args.out / "lora-int4"),
        },
        "judged": {"prompts": args.prompts, "objects": len(KEPT_OUT)},
        "figures": judge(art, args.model, loras, args.out, args.prompts),
    }
    print(json.dumps(report, indent=1))
    write_results("lora_pixel_art", report, args.results)


if __name__ == "__main__":
    main()
