"""What training recipes gain on the bundled checkpoint within minutes: results/cpu/recipes.json.

    make recipes RECIPE_MINUTES=3
    python -m benchmarks.recipes --recipes nft dpo --minutes 10

Each recipe trains for `--minutes` on prompts of the bundled checkpoint, or on images that it generates of these. Each
declares one figure that it is to raise, of single images of other prompts, measured before and after with equal seeds
and noise. The mean gain has an interval of 95 %, a bootstrap over images. The command ends with an error where one
includes 0 or lies below it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import SanaControlNetModel, SanaPipeline, sobel_edges
from diffusers_sana.checkpoints import SANA_EMOJI, VILA_U_EMOJI
from diffusers_sana.evaluation.checks import Check, read_checks
from diffusers_sana.evaluation.config import PROMPTS
from diffusers_sana.evaluation.images import generate_missing
from diffusers_sana.evaluation.judges import SceneJudge
from diffusers_sana.evaluation.significance import interval_of_gains
from diffusers_sana.training.objectives.flow_matching import interpolate, timesteps_of, velocity_target
from diffusers_sana.training.recipes import controlnet, dpo, image_prompt, lora, nft
from diffusers_sana.training.recipes.options import (
    CaptionedDataOptions,
    ControlNetDataOptions,
    ControlNetModelOptions,
    ControlNetTrainingConfig,
    DpoDataOptions,
    DpoModelOptions,
    DpoTrainingConfig,
    ImagePromptModelOptions,
    ImagePromptTrainingConfig,
    LoraDataOptions,
    LoraModelOptions,
    LoraTrainingConfig,
    NftDataOptions,
    NftModelOptions,
    NftTrainingConfig,
)
from diffusers_sana.training.recipes.text_to_image import encode_images


BATCH = 8  # images generated at a time
LEVELS = (0.3, 0.6, 0.9)  # noise levels of held-out errors
Scores = Sequence[float]


@dataclass
class Bench:
    """What all recipes start from.

    Attributes:
        out: folder of their runs, and of images.
        model: pipeline folder.
        minutes, max_steps: of each training, whichever is first.
        images: number of images that the checkpoint generates to train on.
        held_out: number of prompts that are measured.
        steps: denoising steps of images.
    """

    out: Path
    model: str = SANA_EMOJI
    minutes: float = 3.0
    max_steps: int = 100_000
    images: int = 48
    held_out: int = 40
    steps: int = 20
    checks: list[Check] = field(default_factory=lambda: read_checks(PROMPTS["emoji"]))

    @cached_property
    def taught(self) -> list[Check]:
        """Prompts to train on: every second one."""
        return self.checks[::2]

    @cached_property
    def measured(self) -> list[Check]:
        """Other prompts, to measure with."""
        return self.checks[1::2][: self.held_out]

    @property
    def prompts(self) -> list[str]:
        """The texts of `measured`."""
        return [check.prompt for check in self.measured]

    def pipeline(self) -> SanaPipeline:
        """The checkpoint, in fp32."""
        pipe = SanaPipeline.from_pretrained(self.model, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def resolution(self) -> int:
        """Side of its images."""
        pipe = self.pipeline()
        return pipe.transformer.config.sample_size * pipe.vae_scale_factor

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """Settings of a training."""
        common = {"output_dir": str(self.out / name), "max_minutes": self.minutes, "max_steps": self.max_steps}
        return common | {"sample_minutes": 1e9, "save_minutes": 1e9, "lr_schedule": "cosine"} | changes

    def generate(self, pipe: Any, prompts: Sequence[str], seed: int = 1000, **options: Any) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1], each with another seed."""
        made = []
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
            size = {"height": self.resolution, "width": self.resolution}
            made.append(pipe(part, generator=generators, output_type="pt", **size, **options).images.float())
        return torch.cat(made)

    @cached_property
    def data(self) -> Path:
        """A captioned folder of images that the checkpoint generates of the taught prompts."""
        folder, pipe = self.out / "images", self.pipeline()
        prompts = [self.taught[index % len(self.taught)].prompt for index in range(self.images)]

        def generate(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            return pipe(texts, generator=generators, num_inference_steps=self.steps).images

        settings = {"model": self.model, "steps": self.steps}
        paths = generate_missing(generate, prompts, list(range(self.images)), folder, settings, BATCH)
        rows = zip(paths, prompts, strict=True)
        lines = [json.dumps({"file_name": path.name, "text": prompt}) for path, prompt in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    @cached_property
    def prompts_file(self) -> Path:
        """The taught prompts, one a line."""
        path = self.out / "prompts.txt"
        path.write_text("\n".join(check.prompt for check in self.taught) + "\n", encoding="utf-8")
        return path


def colorfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How far the colors of images `[N, 3, H, W]` in [0, 1] are from gray, `[N]`; a reward that needs no weights."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def gain_of_lora(bench: Bench) -> tuple[Scores, Scores]:
    """`train_sana_lora.py` on images without color."""
    gray = bench.out / "gray"
    gray.mkdir(parents=True, exist_ok=True)
    for path in bench.data.glob("*.png"):
        Image.open(path).convert("L").convert("RGB").save(gray / path.name)
    (gray / "metadata.jsonl").write_bytes((bench.data / "metadata.jsonl").read_bytes())
    config = LoraTrainingConfig(**bench.settings("lora", rank=8, mix_ffn=True, learning_rate=2e-3))
    data = LoraDataOptions(data=str(gray), resolution=bench.resolution, batch_size=BATCH)
    lora.run(config, data, LoraModelOptions(pretrained=bench.model))
    pipe, options = bench.pipeline(), {"num_inference_steps": bench.steps}
    before = -colorfulness(bench.generate(pipe, bench.prompts, **options), bench.prompts)
    pipe.load_lora_weights(bench.out / "lora" / "model")
    after = -colorfulness(bench.generate(pipe, bench.prompts, **options), bench.prompts)
    return before.tolist(), after.tolist()


def gain_of_controlnet(bench: Bench) -> tuple[Scores, Scores]:
    """`train_sana_controlnet.py`, by the edges of the images."""
    pipe = bench.pipeline()
    layers = max(1, pipe.transformer.config.num_layers // 2)
    settings = {"learning_rate": 1e-3, "warmup_steps": 20, "caption_dropout": 0.8}
    config = ControlNetTrainingConfig(**bench.settings("controlnet", **settings))
    data = ControlNetDataOptions(data=str(bench.data), resolution=bench.resolution, batch_size=BATCH, num_workers=0)
    controlnet.run(config, data, ControlNetModelOptions(pretrained=bench.model, num_layers=layers))
    net = SanaControlNetModel.from_pretrained(bench.out / "controlnet" / "model", dtype=torch.float32).eval()
    images = bench.generate(pipe, bench.prompts, num_inference_steps=bench.steps) * 2 - 1
    figures = []
    for branch in (None, net):
        errors = []
        for index in range(len(images)):
            image = images[index : index + 1]
            control = encode_images(pipe.vae, sobel_edges(image))
            errors.append(velocity_error(pipe, encode_images(pipe.vae, image), control, branch, seed=index))
        figures.append([-error for error in errors])
    return figures[0], figures[1]


@torch.no_grad()
def velocity_error(pipe: Any, latents: Tensor, control: Tensor, branch: Any, seed: int) -> float:
    """The mean squared error of the velocity of one image `[1, C, h, w]` without a caption, at some noise levels."""
    levels = torch.tensor(LEVELS)
    shape = len(levels), *latents.shape[1:]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    clean, embeds, mask = (
        each.expand(len(levels), *each.shape[1:]) for each in (latents, *pipe.encode_prompt("")[:2])
    )
    noisy, times = interpolate(clean, noise, levels), timesteps_of(levels)
    text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "return_dict": False}
    samples = None
    if branch is not None:
        scaled = times * branch.config.get("timestep_scale", 1.0)
        cond = control.expand(len(levels), -1, -1, -1)
        samples = branch(noisy, timestep=scaled, controlnet_cond=cond, **text)[0]
    scaled = times * pipe.transformer.config.timestep_scale
    velocity = pipe.transformer(noisy, timestep=scaled, controlnet_block_samples=samples, **text)[0]
    return float((velocity - velocity_target(clean, noise)).square().mean())


def gain_of_nft(bench: Bench) -> tuple[Scores, Scores]:
    """`train_sana_nft.py`, with colorfulness as the reward: the checkpoint is right about the prompts."""
    steps = max(1, bench.steps // 2)
    config = NftTrainingConfig(
        **bench.settings("nft", rank=16, learning_rate=1e-3, lr_schedule="constant"),
        group_size=8,
        rollout_steps=steps,
        levels_per_image=2,
    )
    data = NftDataOptions(prompts=str(bench.prompts_file), resolution=bench.resolution, batch_size=2)
    nft.run(config, data, NftModelOptions(pretrained=bench.model, reward=("benchmarks.recipes:colorfulness",)))
    pipe, options = bench.pipeline(), {"num_inference_steps": steps, "guidance_scale": 1.0}
    before = colorfulness(bench.generate(pipe, bench.prompts, **options), bench.prompts)
    pipe.load_lora_weights(bench.out / "nft" / "model")
    return before.tolist(), colorfulness(bench.generate(pipe, bench.prompts, **options), bench.prompts).tolist()


def gain_of_dpo(bench: Bench) -> tuple[Scores, Scores]:
    """`train_sana_dpo.py` on pairs of images that the checkpoint generates, the more colorful one preferred."""
    config = DpoTrainingConfig(**bench.settings("dpo", rank=16, learning_rate=5e-4))
    data = DpoDataOptions(
        prompts=str(bench.prompts_file),
        group_size=2,
        rollout_steps=bench.steps,
        resolution=bench.resolution,
        batch_size=BATCH // 2,
    )
    reward = ("benchmarks.recipes:colorfulness",)
    dpo.run(config, data, DpoModelOptions(pretrained=bench.model, reward=reward))
    pipe, options = bench.pipeline(), {"num_inference_steps": bench.steps}
    before = colorfulness(bench.generate(pipe, bench.prompts, **options), bench.prompts)
    pipe.load_lora_weights(bench.out / "dpo" / "model")
    return before.tolist(), colorfulness(bench.generate(pipe, bench.prompts, **options), bench.prompts).tolist()


def gain_of_image_prompt(bench: Bench) -> tuple[Scores, Scores]:
    """`train_sana_image_prompt.py` by the features of the bundled VILA-U: images from an image alone, without text."""
    config = ImagePromptTrainingConfig(**bench.settings("image_prompt", learning_rate=2e-3, caption_dropout=0.8))
    data = CaptionedDataOptions(data=str(bench.data), resolution=bench.resolution, batch_size=BATCH, num_workers=0)
    model = ImagePromptModelOptions(pretrained=bench.model, image_encoder=VILA_U_EMOJI)
    image_prompt.run(config, data, model)
    pipe, judge = bench.pipeline(), SceneJudge(bench.measured)
    shown = bench.generate(pipe, bench.prompts, num_inference_steps=bench.steps)
    options = {"num_inference_steps": bench.steps, "guidance_scale": 2.0}
    before = judge(bench.generate(pipe, [""] * len(shown), seed=2000, **options), bench.prompts)
    pipe.load_ip_adapter(bench.out / "image_prompt" / "model", image_encoder_folder=VILA_U_EMOJI)
    images = [
        bench.generate(pipe, [""], seed=2000 + number, ip_adapter_image=image, **options)
        for number, image in enumerate(shown)
    ]
    return before.tolist(), judge(torch.cat(images), bench.prompts).tolist()


@dataclass(frozen=True)
class Recipe:
    """A recipe and the figure that it is to raise.

    Attributes:
        figure: what it is, the higher the better.
        run: trains, and returns the figure of each held-out image before and after.
    """

    figure: str
    run: Callable[[Bench], tuple[Scores, Scores]]


RECIPES = {
    "lora": Recipe("grayness of images, after training on gray ones: minus the range of their colors", gain_of_lora),
    "controlnet": Recipe(
        "minus the error of the velocity without a caption, given the edges of the image", gain_of_controlnet
    ),
    "image_prompt": Recipe("share right of what an image shows, from that image without text", gain_of_image_prompt),
    "nft": Recipe("colorfulness of images without guidance, after rewarding it", gain_of_nft),
    "dpo": Recipe("colorfulness of images, after preferring colorful ones", gain_of_dpo),
}


def measure(recipe: Recipe, bench: Bench) -> dict[str, Any]:
    """Trains, and returns the figures: both means, the mean gain, and its interval of 95 %."""
    started = time.perf_counter()
    before, after = recipe.run(bench)
    gains = [later - earlier for earlier, later in zip(before, after, strict=True)]
    return {
        "figure": recipe.figure,
        "images": len(gains),
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "gain": sum(gains) / len(gains),
        "interval": list(interval_of_gains(after, before)),
        "seconds": round(time.perf_counter() - started),
    }


def run(bench: Bench, recipes: dict[str, Recipe], results: Path) -> dict[str, dict[str, Any]]:
    """Measures the recipes, and writes what is known after each; returns those whose gain is not sure."""
    found = {}
    for name, recipe in recipes.items():
        found[name] = measure(recipe, bench)
        print(name, json.dumps(found[name]), flush=True)
        settings = {"minutes": bench.minutes, "train_images": bench.images, "steps": bench.steps}
        write_results("recipes", environment() | settings | {"recipes": found}, results)
    return {name: row for name, row in found.items() if row["interval"][0] <= 0}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each training; default: 3")
    parser.add_argument("--images", type=int, default=48, help="images to train on; default: 48")
    parser.add_argument("--held-out", type=int, default=40, help="prompts to measure with; default: 40")
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"), help="new folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.out, minutes=args.minutes, images=args.images, held_out=args.held_out)
    failed = run(bench, {name: RECIPES[name] for name in args.recipes}, args.results)
    if failed:
        lines = [f"{name}: gain {row['gain']:.4f}, interval {row['interval']}" for name, row in failed.items()]
        sys.exit("no sure gain by " + "; ".join(lines))


if __name__ == "__main__":
    main()
