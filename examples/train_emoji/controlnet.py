"""Trains the bundled ControlNet, which follows edges, within a time budget, on a CPU.

    python -m examples.train_emoji.controlnet --data outputs/emoji-256.zip --minutes 60

A full prompt leaves nothing for edges to add: it says what is where, and an object always looks the same. So prompts
here name objects, background and style, and edges say how many objects there are, how large and where. Two prompts in
five are empty: there edges say everything but colors.

Scenes and their edges, by the Sobel operator, are encoded once, into `OUT`. Afterwards the edges of images of held-out
scenes are compared with those asked for, with and without the ControlNet: `OUT/evaluation.json`, and the images in
`OUT/held_out.png`. The same command goes on where it stopped; `--minutes` counts all of the training.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import environment
from diffusers_sana import SanaControlNetModel, SanaControlNetPipeline, SanaPipeline
from diffusers_sana.images import sobel_edges
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.controlnet import train as train_controlnet
from diffusers_sana.training.recipes.options import ControlNetTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders

from .common import device, generate, load_pipeline, make_parser, make_settings, write_report
from .latents import encode, identity, latent_batches, load_latents, taught_scenes
from .scenes import Art, Scene, held_out_scenes, render, with_article


NUM_LAYERS = 2  # of the transformer's 8
SCENES = 12_000  # that it learns from
EMPTY = 0.4  # of the prompts
GUIDANCE = 2.0  # of the judged images; more makes edges stronger than those asked for


def open_prompt(scene: Scene) -> str:
    """The scene's prompt without numbers, sizes and positions."""
    objects = " and ".join(with_article(word) for word in sorted(set(scene.objects)))
    return f"{objects} on {with_article(scene.color)} background, {scene.style} style"


def open_caption(scene: Scene, rng: random.Random) -> str:
    """For training: `open_prompt`, or, of a fraction `EMPTY`, nothing."""
    return "" if rng.random() < EMPTY else open_prompt(scene)


def edges_of(images: Tensor) -> Tensor:
    """Edge maps `[B, 3, H, W]` in [-1, 1] of images."""
    return sobel_edges(images).to(images.dtype)


def train(art: Art, pipe: SanaPipeline, out: Path, minutes: float, batch_size: int = 48, count: int = SCENES) -> Path:
    """Trains the ControlNet for `pipe` on `count` scenes; returns its folder."""
    taught, vae = taught_scenes(art.objects), pipe.vae.to(device())
    scenes = random.Random(4).sample(taught, min(count, len(taught)))
    views = {"scenes": identity, "edges": edges_of}
    encoded = [load_latents(out / f"{name}.safetensors", vae, art, scenes, view) for name, view in views.items()]
    both = torch.cat(encoded, dim=1)

    def batches(used: int) -> Iterator[dict]:
        """`{"latents": [B, C, h, w], "control_latents": [B, C, h, w], "text": list of B captions}`."""
        for batch in latent_batches(scenes, both, batch_size, used, caption=open_caption):
            shown, control = batch["latents"].chunk(2, dim=1)
            yield batch | {"latents": shown, "control_latents": control}

    settings = make_settings(
        out, minutes, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99, flow_shift=pipe.scheduler.config.flow_shift
    )
    controlnet = SanaControlNetModel.from_transformer(pipe.transformer, NUM_LAYERS)
    config = ControlNetTrainingConfig(**settings)
    train_controlnet(config, batches, controlnet, pipe.transformer, Encoders.of(pipe))
    return out / "model"


@torch.no_grad()
def judge(pipe: SanaPipeline, controlnet: SanaControlNetModel, art: Art, out: Path, steps: int = 20) -> dict:
    """How far generated edges agree with those asked for: mean cosines over all held-out scenes, and of each kind.

    Rows: the open prompt alone; edges alone; both; and, as the highest cosine there is, true images through the
    autoencoder.
    """
    scenes = held_out_scenes(art.objects)
    true = render(art, scenes)
    edges = edges_of(true)
    steered = SanaControlNetPipeline(**pipe.components, controlnet=controlnet.to(pipe.device)).to(device())
    steered.set_progress_bar_config(disable=True)
    rows, prompts = {"edges": edges}, [open_prompt(scene) for scene in scenes]
    for name, texts, scale in (
        ("prompt_alone", prompts, 0.0),
        ("edges_alone", [""] * len(scenes), 1.0),
        ("prompt_and_edges", prompts, 1.0),
    ):
        rows[name] = generate(
            steered,
            texts,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            control_image=edges,
            controlnet_conditioning_scale=scale,
        )
    latents = encode(pipe.vae, art, scenes) / pipe.vae.config.scaling_factor
    decoded = [pipe.vae.decode(part.to(pipe.device, pipe.vae.dtype)).sample.clamp(-1, 1) for part in latents.split(8)]
    rows["true_through_autoencoder"] = torch.cat(decoded).float().cpu()
    asked = (edges / 2 + 0.5).flatten(1)
    of_kind = {kind: [scene.kind == kind for scene in scenes] for kind in dict.fromkeys(x.kind for x in scenes)}
    figures = {}
    for name in [row for row in rows if row != "edges"]:
        cosines = F.cosine_similarity((edges_of(rows[name]) / 2 + 0.5).flatten(1), asked)
        figures[name] = {"all": round(cosines.mean().item(), 4)}
        figures[name] |= {kind: round(cosines[chosen].mean().item(), 4) for kind, chosen in of_kind.items()}
    out.mkdir(parents=True, exist_ok=True)
    shown = slice(None, None, max(1, len(scenes) // 12))
    columns = len(scenes[shown])
    save_image_grid(torch.cat([images[shown] for images in rows.values()]), out / "held_out.png", columns=columns)
    return write_report(environment() | {"mean_cosine_of_edges": figures, "scenes": len(scenes)}, out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/sana-emoji-edges", minutes=60, takes_model=True)
    parser.add_argument("--controlnet", type=Path, help="folder of a trained one, to judge it only")
    args = parser.parse_args(argv)
    art, pipe = Art(args.data), load_pipeline(args.model)
    folder = args.controlnet or train(art, pipe, args.out, args.minutes)
    controlnet = SanaControlNetModel.from_pretrained(folder, dtype=torch.float32)
    print(json.dumps(judge(pipe, controlnet, art, args.out), indent=1))


if __name__ == "__main__":
    main()
