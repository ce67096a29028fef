"""Distils the bundled checkpoint into one that generates in one to four steps, within a time budget, on a CPU.

    python -m examples.train_emoji.sprint --data outputs/emoji-256.zip --latents outputs/sana-emoji/latents.safetensors

The student is a LoRA of its teacher, a tenth of the bytes. Afterwards the student at 1, 2 and 4 steps is judged on
held-out prompts beside itself before training, and beside its teacher at 2, 4 and 20: `OUT/evaluation.json`, and a row
of images each in `OUT/held_out.png`. `OUT/bundle` has the LoRA in bf16. The same command goes on where it stopped;
`--minutes` counts all of the training.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import environment
from diffusers_sana import SanaPipeline, SanaSprintPipeline
from diffusers_sana.checkpoints import EMOJI_PROBE
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.models.transformers.sprint_student import make_student
from diffusers_sana.schedulers.trigflow import STEP_ANGLES
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes import sprint
from diffusers_sana.training.recipes.options import SprintTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders

from .common import bundle_lora, device, generate, load_pipeline, make_parser, make_settings, write_report
from .judge import accuracy, shrink
from .latents import latent_batches, load_latents, taught_scenes
from .scenes import Art, held_out_scenes


RANK = 16


def train(art: Art, pipe: SanaPipeline, latents: Path, out: Path, minutes: float, batch_size: int = 16) -> Path:
    """Distils `pipe` on the encoded scenes in the file `latents`; returns the folder of the student's LoRA."""
    scenes = taught_scenes(art.objects)
    encoded = load_latents(latents, pipe.vae.to(device()), art, scenes)
    settings = make_settings(
        out,
        minutes,
        lora_rank=RANK,
        learning_rate=6e-4,
        discriminator_learning_rate=3e-4,
        warmup_steps=20,
        max_grad_norm=1.0,
        ema_decay=0.98,
        tangent_warmup_steps=300,
        misaligned_pairs=False,
        log_every=5,
    )

    def batches(used: int) -> Iterator[dict]:
        return latent_batches(scenes, encoded, batch_size, used)

    # On a CPU the fused attention's backward pass is the slowest operation of the step.
    with nullcontext() if device() == "cuda" else sdpa_kernel(SDPBackend.MATH):
        sprint.train(SprintTrainingConfig(**settings), batches, pipe.transformer, Encoders.of(pipe))
    return out / "model"


def load_student(teacher: SanaPipeline, lora: Path) -> SanaSprintPipeline:
    """The pipeline of the student whose LoRA is in the folder `lora`, without progress bars."""
    student = SanaSprintPipeline.from_teacher(teacher, lora)
    student.set_progress_bar_config(disable=True)
    return student.to(device())


@torch.no_grad()
def judge(teacher: SanaPipeline, student: SanaSprintPipeline, probe: EmojiProbe, art: Art, out: Path) -> dict:
    """Accuracy on the held-out prompts by steps: of the teacher, and of the student before and after training."""
    scenes = held_out_scenes(art.objects)
    prompts = [scene.prompt for scene in scenes]
    images = {f"teacher_{steps}_steps": generate(teacher, prompts, num_inference_steps=steps) for steps in (2, 4, 20)}
    untrained = SanaSprintPipeline(**student.components | {"transformer": make_student(teacher.transformer)})
    untrained.set_progress_bar_config(disable=True)
    for name, pipe in (("untrained", untrained), ("student", student)):
        for steps, angles in STEP_ANGLES.items():
            images[f"{name}_{steps}_steps"] = generate(pipe, prompts, timesteps=angles)
    out.mkdir(parents=True, exist_ok=True)
    shown = slice(None, None, max(1, len(scenes) // 12))
    columns = len(scenes[shown])
    save_image_grid(torch.cat([row[shown] for row in images.values()]), out / "held_out.png", columns=columns)
    figures = {name: accuracy(probe, (shrink(row) + 1) / 2, scenes) for name, row in images.items()}
    return write_report(environment() | {"prompts": len(prompts), "rows": list(images), **figures}, out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/sana-emoji-sprint", minutes=60, takes_model=True)
    parser.add_argument("--latents", type=Path, default=Path("outputs/sana-emoji/latents.safetensors"))
    parser.add_argument("--judge", type=Path, default=EMOJI_PROBE, help="folder of the network that judges")
    parser.add_argument("--student", type=Path, help="folder of a student's LoRA, to judge it only")
    args = parser.parse_args(argv)
    art, teacher = Art(args.data), load_pipeline(args.model).to(device())
    folder = args.student
    if folder is None:
        folder = bundle_lora(train(art, teacher, args.latents, args.out, args.minutes), args.out / "bundle")
    probe = EmojiProbe.from_pretrained(args.judge).eval()
    print(json.dumps(judge(teacher, load_student(teacher, folder), probe, art, args.out), indent=1))


if __name__ == "__main__":
    main()
