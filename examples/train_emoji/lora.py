"""Trains the bundled LoRA that makes the emoji checkpoint generate pixel art, within minutes on one core of a CPU.

    python -m examples.train_emoji.lora --data outputs/emoji-256.zip --out outputs/sana-emoji-pixel-art

The images are emoji scenes in few large pixels and few colors, written as an ordinary captioned folder.
`examples/train_sana_lora.py` learns from that, on the 16-bit base and on the base in 4 bits. A quarter of the objects
is kept out and judged. One large pixel is 16 small ones wide.
`OUT/lora` and `OUT/lora-int4` are the runs, which go on where they stopped; `OUT/bundle` is the first one's LoRA in
bf16. The figures are in `benchmarks/results/<device>/lora_pixel_art.json`.
"""

import json
import random
import zlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import quantize
from diffusers_sana.checkpoints import EMOJI_PROBE
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.files import read_json_lines
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.lora import run as train_lora
from diffusers_sana.training.recipes.options import LoraDataOptions, LoraModelOptions, LoraTrainingConfig

from .common import bundle_lora, generate, load_pipeline, make_parser, resumable
from .judge import accuracy, shrink
from .scenes import RESOLUTION, Art, Scene, Scenes, held_out_scenes, render


SUFFIX = ", pixel art"  # of every prompt
PIXEL = 16  # small pixels a large one is wide
LEVELS = 6  # of each color: a palette of 216


def is_kept_out(word: str) -> bool:
    """Whether the LoRA is judged by this object, one of four, and never taught it."""
    return zlib.crc32(word.encode()) % 4 == 0


def objects(art: Art, kept_out: bool) -> list[str]:
    """The objects of the art that the LoRA is judged by, or those that it is taught."""
    return [word for word in art.objects if is_kept_out(word) == kept_out]


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


def write_images(art: Art, folder: Path, scenes: list[Scene]) -> None:
    """The scenes as pixel art, and `metadata.jsonl`, with captions that end in `SUFFIX`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(6), []
    for index, scene in enumerate(scenes):
        pixels = ((pixelate(render(art, [scene]))[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:04d}.png")
        rows.append(json.dumps({"file_name": f"{index:04d}.png", "text": scene.caption(rng) + SUFFIX}))
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
        flow_shift=1.0,  # the sharp sides of pixels come late, at little noise
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


@torch.no_grad()
def judge(art: Art, base: str, loras: dict[str, Path], out: Path, count: int = 24, steps: int = 20) -> dict:
    """Figures of objects that no LoRA was shown, and an image of them, `OUT/held_out.png`.

    Its rows: without LoRA; with it; base in 4 bits and the LoRA that was trained on it; the true images through the
    autoencoder, and as they are.

    Args:
        art: the emoji.
        base: pipeline folder.
        loras: folders, of "lora" and "lora_int4", the latter trained on the base in 4 bits.
        out: folder for the image.
        count: prompts.
        steps: of the sampler.
    """
    scenes = held_out_scenes(objects(art, kept_out=True), {"object": count})
    prompts = [scene.prompt + SUFFIX for scene in scenes]
    pipe = load_pipeline(base)
    true = pixelate(render(art, scenes))
    images = {"without_lora": generate(pipe, prompts, num_inference_steps=steps)}
    pipe.load_lora_weights(loras["lora"])
    images["lora"] = generate(pipe, prompts, num_inference_steps=steps)
    pipe.unload_lora_weights()
    quantize(pipe, progress=False)
    for name, folder in (("lora_on_4_bit_base", loras["lora"]), ("lora_trained_on_4_bit_base", loras["lora_int4"])):
        pipe.load_lora_weights(folder)
        images[name] = generate(pipe, prompts, num_inference_steps=steps)
        pipe.unload_lora_weights()
    decoded = torch.cat([pipe.vae.decode(pipe.vae.encode(part).latent).sample for part in true.split(8)])
    images |= {"truth_through_autoencoder": decoded.clamp(-1, 1), "truth": true}
    shown = ("without_lora", "lora", "lora_trained_on_4_bit_base", "truth_through_autoencoder", "truth")
    rows = [images[name][:12] for name in shown]
    save_image_grid(torch.cat(rows), out / "held_out.png", columns=min(12, count))
    probe = EmojiProbe.from_pretrained(EMOJI_PROBE).eval()
    return {
        name: {
            "variance_within_large_pixels": round(within_blocks(batch), 4),
            "differences_on_their_grid": round(on_grid(batch), 4),
            "object": accuracy(probe, (shrink(batch) + 1) / 2, scenes)["object"],
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
    parser.add_argument("--images", type=int, default=768, help="how many to learn from")
    parser.add_argument("--steps", type=int, default=800, help="of each training")
    parser.add_argument("--prompts", type=int, default=24, help="how many to judge by")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args(argv)
    art = Art(args.data)
    images, taught = args.out / "images", objects(art, kept_out=False)
    if not (images / "metadata.jsonl").exists():
        source = Scenes(taught, seed=6, kinds={"object": 1})
        write_images(art, images, [source.sample() for _ in range(args.images)])
    loras = {
        "lora": bundle_lora(train(images, args.out / "lora", args.model, args.steps), args.out / "bundle"),
        "lora_int4": train(images, args.out / "lora-int4", args.model, args.steps, "int4"),
    }
    report = {
        **environment(),
        "training": {
            "images": args.images,
            "objects": len(taught),
            "lora": summary(args.out / "lora"),
            "lora_trained_on_4_bit_base": summary(args.out / "lora-int4"),
        },
        "judged": {"prompts": args.prompts, "objects": len(objects(art, kept_out=True))},
        "figures": judge(art, args.model, loras, args.out, args.prompts),
    }
    print(json.dumps(report, indent=1))
    write_results("lora_pixel_art", report, args.results)


if __name__ == "__main__":
    main()
