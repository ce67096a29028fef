"""Trains the bundled checkpoint from nothing, unattended, within a time budget.

    python -m examples.train_emoji.run --data outputs/emoji.zip --out outputs/sana-emoji --minutes 25

Stages, each resumed where it stopped when the command is given again: autoencoder (phase 1: all of it; phase 3: the
decoder's head against a discriminator), then transformer and text encoder together, then the held-out evaluation.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_sana import AutoencoderDC
from examples import train_dc_ae

from .data import EmojiArt, EmojiScenes
from .models import RESOLUTION, make_autoencoder


@dataclass(frozen=True)
class Preset:
    """What depends on the machine. Learning rates are for these batch sizes."""

    mixed_precision: str
    autoencoder_batch: int
    autoencoder_rate: float
    sana_batch: int
    sana_rate: float
    ema_decay: float
    compile: bool


PRESETS = {
    "cpu": Preset("bf16", 16, 8e-4, 64, 1e-3, 0.999, False),
    "cuda": Preset("bf16", 128, 1e-3, 512, 1e-3, 0.9995, True),
}
# Shares of the time budget.
AUTOENCODER, REFINEMENT, SANA = 0.5, 0.05, 0.45


def resumable(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step_*[0-9]"))


def train_autoencoder(preset: Preset, art: EmojiArt, out: Path, minutes: float) -> Path:
    """Phase 1 of DC-AE; returns the folder of the model."""
    scenes = EmojiScenes(art, RESOLUTION, seed=1)
    config = train_dc_ae.DCAETrainingConfig(
        output_dir=str(out),
        max_minutes=minutes,
        max_steps=10_000_000,
        learning_rate=preset.autoencoder_rate,
        lr_schedule="cosine",
        warmup_steps=100,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        mixed_precision=preset.mixed_precision,
        ema_decay=preset.ema_decay,
        compile=preset.compile,
        perceptual_weight=0.1,
        perceptual_crop=64,
        perceptual_every=2,
        resume=resumable(out),
    )
    train_dc_ae.train(config, scenes.autoencoder_batches(preset.autoencoder_batch), make_autoencoder())
    return out / "model"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji.zip"), help="what prepare_data wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/sana-emoji"), help="folder for all stages")
    parser.add_argument("--minutes", type=float, default=25, help="time budget of the training in all")
    args = parser.parse_args(argv)
    preset = PRESETS["cuda" if torch.cuda.is_available() else "cpu"]
    art = EmojiArt(args.data)
    train_autoencoder(preset, art, args.out / "autoencoder", AUTOENCODER * args.minutes)


if __name__ == "__main__":
    main()
