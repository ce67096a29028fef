"""Distils the bundled checkpoint into one that generates in one to four steps, within a time budget, on a CPU.

    python -m examples.train_emoji.sprint --data outputs/emoji.zip --out outputs/sana-emoji-sprint --minutes 40

Images are composed as for the checkpoint itself. Afterwards the student at 1, 2 and 4 steps is judged on held-out
prompts beside its teacher at 2, 4 and 20: `OUT/evaluation.json`, and a row of images each in `OUT/held_out.png`. The
same command goes on where it stopped; `--minutes` counts all of it.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import SCMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import environment
from diffusers_sana import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel
from diffusers_sana.schedulers.trigflow import STEP_ANGLES
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes import sprint
from diffusers_sana.training.recipes.options import SprintTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders

from .common import device, generate, load_pipeline, make_parser, make_settings, write_report
from .data import COMMON_OBJECTS, EmojiArt, EmojiScenes, LatentScenes
from .evaluate import held_out_scenes, prompt_following
from .models import RESOLUTION


def train(
    art: EmojiArt, pipe: SanaPipeline, out: Path, minutes: float, batch_size: int = 32, store: int = 512
) -> Path:
    """Distils `pipe`; returns the folder of the student's pipeline. `store` images are encoded at a time."""
    labels = art.among(COMMON_OBJECTS)
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=8, labels=labels)
    latents = LatentScenes(scenes, pipe.vae.to(device()), store, renewed=batch_size // 8)
    settings = make_settings(
        out,
        minutes,
        learning_rate=6e-5,  # with 3e-4 images fell apart after 50 steps
        discriminator_learning_rate=3e-4,
        warmup_steps=20,
        max_grad_norm=1.0,
        ema_decay=0.98,
        tangent_warmup_steps=300,
        misaligned_pairs=False,
        log_every=5,
    )
    config = SprintTrainingConfig(**settings)
    with nullcontext() if device() == "cuda" else sdpa_kernel(SDPBackend.MATH):  # as in run.py
        sprint.train(config, latents.batches(batch_size), pipe.transformer, Encoders.of(pipe))
    return out / "model"


def judge(teacher: SanaPipeline, student: SanaSprintPipeline, art: EmojiArt, out: Path, singles: int = 52) -> dict:
    """Prompt following on held-out prompts, at each number of steps of the student and of the teacher."""
    labels = art.among(COMMON_OBJECTS)
    scenes = held_out_scenes(labels, singles=singles, pairs=0)
    prompts = [scene.prompt for scene in scenes]
    images = {f"teacher_{steps}_steps": generate(teacher, prompts, num_inference_steps=steps) for steps in (2, 4, 20)}
    for steps, angles in STEP_ANGLES.items():
        images[f"student_{steps}_steps"] = generate(student, prompts, timesteps=angles)
    columns = min(16, len(prompts))
    out.mkdir(parents=True, exist_ok=True)
    save_image_grid(torch.cat([row[:columns] for row in images.values()]), out / "held_out.png", columns=columns)
    report = environment() | {"rows": list(images)}
    return write_report(report | prompt_following(images, scenes, EmojiScenes(art, RESOLUTION, labels=labels)), out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/sana-emoji-sprint", minutes=40, takes_model=True)
    parser.add_argument("--student", type=Path, help="folder with a distilled `transformer`, to judge it only")
    args = parser.parse_args(argv)
    art = EmojiArt(args.data)
    teacher = load_pipeline(args.model).to(device())
    folder = args.student or train(art, teacher, args.out, args.minutes)
    transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
    parts = teacher.components | {"transformer": transformer, "scheduler": SCMScheduler()}
    student = SanaSprintPipeline(**parts).to(device())
    student.set_progress_bar_config(disable=True)
    print(json.dumps(judge(teacher, student, art, args.out), indent=1))


if __name__ == "__main__":
    main()
