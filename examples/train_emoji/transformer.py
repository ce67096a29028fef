"""Trains the transformer for 256 px and its text encoder on the latents of the autoencoder, within a time budget.

    python -m examples.train_emoji.transformer --data outputs/emoji-256.zip --vae outputs/autoencoder/phase_3/model

The scenes are encoded once, into `OUT/latents.safetensors`. Under `OUT/sana` are log, samples of held-out prompts and
checkpoints; stop at any time, the same command goes on. At the end the pipeline, in bf16, is in `OUT/pipeline`.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_sana import AutoencoderDC
from diffusers_sana.prompts.encoding import complex_human_instruction
from diffusers_sana.training.recipes import sana
from diffusers_sana.training.recipes.options import SanaTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders

from .common import assemble, device, make_settings
from .latents import latent_batches, load_latents, taught_scenes
from .models import make_text_encoder, make_transformer
from .scenes import Art, Scenes
from .tokenizer import make_tokenizer, texts


BATCH_SIZE = {"cpu": 48, "cuda": 512}
# How often a batch has each kind of scene: pairs are learned last.
KINDS = {"object": 0.28, "small": 0.03, "position": 0.1, "pair": 0.5, "count": 0.09}
SAMPLES = 15  # held-out prompts in the sample grids
SETTINGS: Mapping[str, Any] = {
    # After six minutes of one core, rate 6e-4: loss 0.70; AdamW at 1.5e-3: 0.79; with patches of 2 x 2 latents: 0.76.
    # After a hundred steps: 0.96 at 6e-4, 0.86 at 1.2e-3, 0.84 at 2.4e-3.
    "optimizer": "muon",
    "warmup_steps": 100,
    "max_grad_norm": 1.0,
    "ema_decay": 0.999,
    "flow_shift": 3.0,  # what stands where is decided at high noise levels
    "train_text_encoder": True,
    "keep_checkpoints": 1,
}
MACHINES: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"learning_rate": 1.5e-3},
    "cuda": {
        "learning_rate": 1e-3,
        "mixed_precision": "bf16",
        "compile": True,  # on a core of a CPU it is no faster
        "sample_minutes": 1.0,
        "save_minutes": 1.0,
    },
}


def train(art: Art, vae: ModelMixin, out: Path, minutes: float, **changes: Any) -> Path:
    """Trains for `minutes` in all; returns the folder of the pipeline. `changes` are of the settings."""
    machine, scenes = device(), taught_scenes(art.objects)
    latents = load_latents(out / "latents.safetensors", vae, art, scenes)
    tokenizer = make_tokenizer(texts(art.objects), complex_human_instruction())
    shown = Scenes(art.objects, seed=1)
    prompts = tuple(shown.sample(held_out=True).prompt for _ in range(SAMPLES))
    settings = {**SETTINGS, **MACHINES[machine], "sample_prompts": prompts, **changes}
    config = SanaTrainingConfig(**make_settings(out / "sana", minutes, **settings))
    transformer = make_transformer()
    encoders = Encoders(vae=vae, text_encoder=make_text_encoder(tokenizer), tokenizer=tokenizer)

    def batches(used: int) -> Iterator[dict]:
        return latent_batches(scenes, latents, BATCH_SIZE[machine], used, KINDS)

    # On a CPU the fused attention's backward pass is the slowest operation of the step.
    with nullcontext() if machine == "cuda" else sdpa_kernel(SDPBackend.MATH):
        sana.train(config, batches, transformer, encoders)
    return out / "sana" / "model"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji-256.zip"), help="what prepare_data wrote")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/sana-emoji"), help="folder of latents, run, pipeline"
    )
    parser.add_argument("--minutes", type=float, default=180, help="time budget of the training in all")
    args = parser.parse_args(argv)
    vae = AutoencoderDC.from_pretrained(args.vae, dtype=torch.float32).to(device())
    art = Art(args.data, device())
    trained = train(art, vae, args.out, args.minutes)
    assemble(trained, args.vae, texts(art.objects), args.out / "pipeline")


if __name__ == "__main__":
    main()
