"""Distils the bundled checkpoint into one that draws in one to four steps, within a time budget, on a CPU.

    python -m examples.train_emoji.sprint --data outputs/emoji.zip --out outputs/sana-emoji-sprint --minutes 40

Pictures are composed as for the checkpoint itself. Afterwards the student at 1, 2 and 4 steps is judged on held-out
prompts beside its teacher at 2, 4 and 20: `OUT/evaluation.json`, and a row of pictures each in `OUT/held_out.png`. The
same command goes on where it stopped; `--minutes` counts all of it.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import SCMScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import environment
from diffusers_sana import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.schedulers.trigflow import STEP_ANGLES
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes import sprint
from diffusers_sana.training.recipes.options import SprintTrainingConfig

from .data import COMMON_OBJECTS, EmojiArt, EmojiScenes, LatentScenes
from .evaluate import held_out_scenes, prompt_following
from .models import RESOLUTION
from .run import device, resumable


def train(
    art: EmojiArt,
    pipe: SanaPipeline,
    out: Path,
    minutes: float,
    batch_size: int = 32,
    store: int = 512,
    **changes: Any,
) -> Path:
    """Distils `pipe`; returns the folder of the student's pipeline. `store` pictures are encoded at a time."""
    labels = [label for label in COMMON_OBJECTS if label in art.index] or art.labels
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=8, labels=labels)
    latents = LatentScenes(scenes, pipe.vae.to(device()), store, renewed=batch_size // 8)
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_minutes": minutes,
        "max_steps": 10_000_000,
        "learning_rate": 6e-5,  # with 3e-4 pictures fell apart after 50 steps
        "discriminator_learning_rate": 3e-4,
        "lr_schedule": "cosine",
        "warmup_steps": 20,
        "betas": (0.9, 0.99),
        "max_grad_norm": 1.0,
        "ema_decay": 0.98,
        "tangent_warmup_steps": 300,
        "misaligned_pairs": False,
        "log_every": 5,
        "resume": resumable(out),
    }
    config = SprintTrainingConfig(**settings | changes)
    parts = (pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.vae)
    with nullcontext() if device() == "cuda" else sdpa_kernel(SDPBackend.MATH):  # as in run.py
        sprint.train(config, latents.batches(batch_size), *parts)
    return out / "model"


def draw(pipe: Any, prompts: list[str], **arguments: Any) -> Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1]; the seed of a prompt is its number."""
    parts = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        parts.append(pipe(part, generator=generators, output_type="pt", **arguments).images)
    return torch.cat(parts).float().cpu() * 2 - 1


def judge(teacher: SanaPipeline, student: SanaSprintPipeline, art: EmojiArt, out: Path, singles: int = 52) -> dict:
    """Prompt following on held-out prompts, at each number of steps of the student and of the teacher."""
    labels = [label for label in COMMON_OBJECTS if label in art.index] or art.labels
    scenes = held_out_scenes(labels, singles=singles, pairs=0)
    prompts = [scene.prompt for scene in scenes]
    pictures = {f"teacher_{steps}_steps": draw(teacher, prompts, num_inference_steps=steps) for steps in (2, 4, 20)}
    for steps, angles in STEP_ANGLES.items():
        pictures[f"student_{steps}_steps"] = draw(student, prompts, timesteps=angles)
    columns = min(16, len(prompts))
    out.mkdir(parents=True, exist_ok=True)
    save_image_grid(torch.cat([row[:columns] for row in pictures.values()]), out / "held_out.png", columns=columns)
    report = environment() | {"rows": list(pictures)}
    report |= prompt_following(pictures, scenes, EmojiScenes(art, RESOLUTION, labels=labels))
    (out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji.zip"), help="what prepare_data wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/sana-emoji-sprint"), help="folder of the run")
    parser.add_argument("--model", default=SANA_EMOJI, help="pipeline folder of the teacher")
    parser.add_argument("--minutes", type=float, default=40, help="time budget of the training")
    parser.add_argument("--student", type=Path, help="folder with a distilled `transformer`, to judge it only")
    args = parser.parse_args(argv)
    art = EmojiArt(args.data)
    teacher = SanaPipeline.from_pretrained(args.model, torch_dtype=torch.float32).to(device())
    teacher.set_progress_bar_config(disable=True)
    folder = args.student or train(art, teacher, args.out, args.minutes)
    transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    parts = teacher.components | {"transformer": transformer, "scheduler": SCMScheduler()}
    student = SanaSprintPipeline(**parts).to(device())
    student.set_progress_bar_config(disable=True)
    print(json.dumps(judge(teacher, student, art, args.out), indent=1))


if __name__ == "__main__":
    main()
