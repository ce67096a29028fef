"""What the scripts that train on emoji share: options, settings, and images of prompts."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from diffusers_sana import AutoencoderDC, SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.cli.words import words_of
from diffusers_sana.evaluation.emoji_probe import EmojiProbe


def device() -> str:
    """Where images are composed and models trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resumable(folder: Path) -> bool:
    """Whether a stopped run in `folder` can go on."""
    return any((folder / "checkpoints").glob("step_*[0-9]"))


def make_settings(out: Path, minutes: float, **changes: Any) -> dict[str, Any]:
    """Settings of a training into `out` that ends after `minutes` in all, and goes on where it stopped."""
    return {
        "output_dir": str(out),
        "max_minutes": minutes,
        "max_steps": 10_000_000,
        "lr_schedule": "cosine",
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "resume": resumable(out),
        **changes,
    }


def make_parser(
    description: str | None,
    out: str,
    out_help: str = "folder of the run",
    minutes: float | None = None,
    takes_model: bool = False,
    data: str = "outputs/emoji-256.zip",
) -> argparse.ArgumentParser:
    """A parser of the options that scripts share.

    Args:
        description: of the script.
        out: default of `--out`, whose help is `out_help`.
        minutes: default of `--minutes`; None where there is no such option.
        takes_model: whether there is `--model`, the pipeline to start from.
        data: default of `--data`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(data), help="what prepare_data wrote")
    parser.add_argument("--out", type=Path, default=Path(out), help=out_help)
    if minutes is not None:
        parser.add_argument("--minutes", type=float, default=minutes, help="time budget of the training in all")
    if takes_model:
        parser.add_argument("--model", default=SANA_EMOJI, help="pipeline folder; default: the bundled one")
    return parser


def load_pipeline(folder: str) -> SanaPipeline:
    """The pipeline in fp32, without progress bars."""
    pipe = SanaPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble(sana: Path, vae_folder: Path, captions: list[str], out: Path) -> None:
    """Puts the trained parts together, in bf16: half the bytes. `words.txt` has the words of the captions."""
    vae = AutoencoderDC.from_pretrained(vae_folder, dtype=torch.bfloat16)
    pipe = SanaPipeline.from_pretrained(sana, vae=vae, dtype=torch.bfloat16)
    for part in (pipe, pipe.vae, pipe.transformer):
        part.register_to_config(_name_or_path="sana-emoji")  # and not the folder it came from
    pipe.save_pretrained(out)
    (out / "words.txt").write_text(" ".join(sorted(words_of(" ".join(captions)))) + "\n", encoding="utf-8")


def stored_batches(
    images: Callable[[int], tuple[Tensor, list]], size: int, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, list]]:
    """Endless batches of `images` out of a store of `size`, of which each renews as much as a quarter of a batch."""
    store, scenes = images(size)
    oldest, renewed = 0, batch_size // 4
    while True:
        places = slice(oldest, oldest + renewed)
        store[places], scenes[places] = images(renewed)
        oldest = (oldest + renewed) % size
        chosen = torch.randint(size, (batch_size,), generator=generator)
        yield store[chosen], [scenes[i] for i in chosen.tolist()]


def fit_probe(
    probe: EmojiProbe,
    batches: Iterator[tuple[Tensor, list]],
    answers: Callable[[EmojiProbe, list], dict[str, Tensor]],
    steps: int,
    rate: float = 3e-3,
) -> EmojiProbe:
    """Trains `probe` on images `[B, 3, H, W]` with their scenes, of which `answers` gives the right answers."""
    probe.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    progress = trange(steps, mininterval=5)
    for _ in progress:
        images, scenes = next(batches)
        logits, right = probe(images.contiguous(memory_format=torch.channels_last)), answers(probe, scenes)
        loss = sum(F.cross_entropy(logits[name], right[name], ignore_index=-1) for name in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return probe.eval()


def right_answers(probe: EmojiProbe, scenes: list, objects: list[tuple[str, ...]]) -> dict[str, Tensor]:
    """Index of the right answer `[B]` to each question about `scenes` of `objects`; -1 where there is none."""
    words = {
        "first": [names[0] for names in objects],
        "second": [names[1] if len(names) == 2 else None for names in objects],
        "number": [str(len(names)) for names in objects],
        "place": [
            scene.position.split(" ")[-1].replace("center", "") if len(names) == 1 else None
            for scene, names in zip(scenes, objects, strict=True)
        ],
        "color": [scene.color for scene in scenes],
        "style": [scene.style for scene in scenes],
    }
    return {
        name: torch.tensor([-1 if word is None else probe.answers[name].index(word) for word in column])
        for name, column in words.items()
    }


@torch.no_grad()
def generate(pipe: Any, prompts: list[str], batch_size: int = 16, **arguments: Any) -> Tensor:
    """Images `[B, 3, H, W]` in [-1, 1] of the prompts; the seed of a prompt is its number.

    Tensors among the arguments have one row per prompt.
    """
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        part = prompts[rows]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
        parts.append(pipe(part, generator=generators, output_type="pt", **own).images)
    return torch.cat(parts).float().cpu() * 2 - 1


def bundle_lora(lora: Path, out: Path) -> Path:
    """Copies the folder of a LoRA to `out`, its weights in bf16, which are half the bytes, and returns `out`."""
    with safe_open(lora / LORA_WEIGHT_NAME_SAFE, "pt") as file:
        weights = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118 not a dict
        metadata = file.metadata()
    shutil.copytree(lora, out, dirs_exist_ok=True)
    save_file(weights, out / LORA_WEIGHT_NAME_SAFE, metadata)
    return out


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
    sheet.save(path, quality=90)


def write_report(report: dict[str, Any], out: Path) -> dict[str, Any]:
    """Writes the figures of an evaluation into the folder `out`, as `evaluation.json`, and returns them."""
    (out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
