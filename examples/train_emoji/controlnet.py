"""Trains a ControlNet that makes the bundled checkpoint follow edges, within minutes on a CPU.

    python -m examples.train_emoji.controlnet --data outputs/emoji.zip --out outputs/sana-emoji-edges --minutes 10

Images are composed as for the checkpoint itself; the control image is their edges by Sobel's filters. Afterwards it
is judged on held-out scenes: `OUT/held_out.png` has a row of edges, one of images generated from the prompts alone,
and one of images that follow the edges too; `OUT/evaluation.json` says how far the edges of both agree with those
asked for. The same command goes on where it stopped.
"""

import json
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

from .common import device, load_pipeline, make_parser, make_settings, write_report
from .data import EmojiArt, EmojiScenes, LatentScenes, Scene
from .evaluate import held_out_scenes
from .models import FLOW_SHIFT, RESOLUTION


NUM_LAYERS = 4  # of the transformer's 8


class EdgeScenes(LatentScenes):
    """Endless batches of captioned latents, as in `LatentScenes`, each with the latents of its edges."""

    @torch.no_grad()
    def encode(self, scenes: list[Scene]) -> Tensor:
        """Scaled latents `[B, 2 C, h, w]`: of the images, then of their edges."""
        images = self.scenes.render(scenes).to(self.vae.device, self.vae.dtype)
        both = torch.cat([images, sobel_edges(images).to(images.dtype)])
        latents = self.vae.encode(both).latent.float() * self.vae.config.scaling_factor
        return torch.cat(latents.chunk(2), dim=1)

    def batches(self, batch_size: int) -> Iterator[dict]:
        """`{"latents": [B, C, h, w], "control_latents": [B, C, h, w], "text": list of B captions}`."""
        for batch in super().batches(batch_size):
            latents, edges = batch["latents"].chunk(2, dim=1)
            yield batch | {"latents": latents, "control_latents": edges}


def train(
    art: EmojiArt, pipe: SanaPipeline, out: Path, minutes: float, batch_size: int = 64, store: int = 2048
) -> Path:
    """Trains the ControlNet for `pipe`; returns its folder. `store` images are encoded at a time."""
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=4)
    latents = EdgeScenes(scenes, pipe.vae.to(device()), store, renewed=batch_size // 8)
    settings = make_settings(
        out,
        minutes,
        learning_rate=1e-3,
        warmup_steps=50,
        ema_decay=0.99,
        flow_shift=FLOW_SHIFT,
    )
    controlnet = SanaControlNetModel.from_transformer(pipe.transformer, NUM_LAYERS)
    config, batches = ControlNetTrainingConfig(**settings), latents.batches(batch_size)
    train_controlnet(config, batches, controlnet, pipe.transformer, Encoders.of(pipe))
    return out / "model"


@torch.no_grad()
def judge(
    pipe: SanaPipeline, controlnet: SanaControlNetModel, art: EmojiArt, out: Path, count: int = 16, steps: int = 20
) -> dict:
    """How far generated edges agree with those asked for: mean cosine, with and without the ControlNet."""
    scenes = held_out_scenes(art.labels, singles=count, pairs=0)
    edges = sobel_edges(EmojiScenes(art, RESOLUTION, seed=5).render(scenes))
    steered = SanaControlNetPipeline(**pipe.components, controlnet=controlnet.to(pipe.device)).to(device())
    rows, figures = [edges], {}
    for name, scale in (("prompt_alone", 0.0), ("with_edges", 1.0)):
        images = steered(
            [scene.prompt for scene in scenes],
            control_image=edges,
            controlnet_conditioning_scale=scale,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
            output_type="pt",
        ).images
        images = images.float().cpu() * 2 - 1
        rows.append(images)
        edge_maps = (sobel_edges(images) / 2 + 0.5).flatten(1), (edges / 2 + 0.5).flatten(1)
        figures[name] = round(F.cosine_similarity(*edge_maps).mean().item(), 4)
    out.mkdir(parents=True, exist_ok=True)
    save_image_grid(torch.cat(rows), out / "held_out.png", columns=count)
    return write_report(environment() | {"mean_cosine_of_edges": figures, "scenes": count}, out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/sana-emoji-edges", minutes=10, takes_model=True)
    parser.add_argument("--controlnet", type=Path, help="folder of a trained one, to judge it only")
    args = parser.parse_args(argv)
    art = EmojiArt(args.data)
    pipe = load_pipeline(args.model)
    folder = args.controlnet or train(art, pipe, args.out, args.minutes)
    controlnet = SanaControlNetModel.from_pretrained(folder, dtype=torch.float32)
    print(json.dumps(judge(pipe, controlnet, art, args.out), indent=1))


if __name__ == "__main__":
    main()
