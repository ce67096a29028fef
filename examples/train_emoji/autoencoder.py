"""Trains the autoencoder for 256 px in the three phases of DC-AE (arXiv 2410.10733), within a time budget.

    python -m examples.train_emoji.autoencoder --data outputs/emoji-256.zip --out outputs/autoencoder --minutes 600

Phase 1 trains all of it on squares of 128 px, phase 2 the layers next to the latents on whole scenes, phase 3 the
decoder against a discriminator, for sharp edges. A core of a CPU takes hours, mostly for phase 1;
`--phase` runs one alone. Everything under OUT is written as it goes. Stop it at any time: the same command goes on
exactly where it stopped.

`--init FOLDER` trains on from any autoencoder of this size, with a fresh optimizer and another warm-up.
`--judge FOLDER` trains nothing: it writes the figures of a model to
`benchmarks/results/<device>/emoji_autoencoder.json`, and scenes above their reconstructions to `OUT/judged.png`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import AutoencoderDC
from diffusers_sana.training.config import option
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.dc_ae import train as train_dc_ae
from diffusers_sana.training.recipes.options import DCAETrainingConfig

from .common import device, resumable
from .models import make_autoencoder
from .scenes import Art, Scenes, image_batches, render


JUDGED = 64  # scenes


@dataclass(frozen=True)
class Phase:
    """What a phase trains on, and its settings of the recipe `dc_ae` beside those that belong to its number.

    Attributes:
        share: of the time budget of all phases.
        side: of the images in pixels. Squares of 128 px on the token grid show the tokens of whole scenes, but little
            background: twice as much to learn for the same work.
        batch_size: on a CPU and on a GPU.
        learning_rate: on a CPU, and for the larger batches of a GPU.
    """

    share: float
    side: int
    batch_size: Mapping[str, int]
    learning_rate: Mapping[str, float]
    settings: Mapping[str, Any]


COMMON: Mapping[str, Any] = {
    "max_steps": 10_000_000,
    "optimizer": "muon",
    "lr_schedule": "cosine",  # lower rates show at once, so every run ends with them, also one that others go on from
    "warmup_steps": 100,
    "betas": (0.9, 0.99),
    "weight_decay": 0.0,
    "ema_decay": 0.999,
    "mse_weight": 1.0,
    "perceptual_weight": 0.0,
    "keep_checkpoints": 1,
}
MACHINES: Mapping[str, Mapping[str, Any]] = {
    "cpu": {},
    "cuda": {"mixed_precision": "bf16", "compile": True, "sample_minutes": 1.0, "save_minutes": 1.0},
}
SQUARES: Mapping[str, Any] = {"side": 128, "batch_size": {"cpu": 16, "cuda": 256}}
LATENTS = {"latent_weight": 0.01, "latent_noise": 0.05}  # near unit scale, and a decoder that bears small errors
PHASES = {
    # With 1.2e-3 the loss stayed where it was after 40 steps; lowered to 5e-4 it fell by a quarter in ten.
    1: Phase(share=0.7, **SQUARES, learning_rate={"cpu": 5e-4, "cuda": 1e-3}, settings=LATENTS),
    2: Phase(
        share=0.1,
        side=256,
        batch_size={"cpu": 8, "cuda": 128},
        learning_rate={"cpu": 2e-4, "cuda": 4e-4},
        settings={
            "trained_prefixes": (
                *("encoder.down_blocks.5.", "encoder.conv_out."),
                *("decoder.conv_in.", "decoder.up_blocks.5.", "decoder.up_blocks.4."),
            ),
            **LATENTS,
        },
    ),
    # The paper trains the last layers only. This decoder knows its images by heart, so all of it learns on, while the
    # latents stay as they are.
    3: Phase(
        share=0.2,
        **SQUARES,
        learning_rate={"cpu": 3e-4, "cuda": 3e-4},
        settings={
            "gan_weight": 0.03,
            "gan_warmup_steps": 200,
            "discriminator_channels": 32,
            "trained_prefixes": ("decoder.",),
        },
    ),
}


def begin(phase: int, out: Path, init: Path | None) -> ModelMixin:
    """The model that a new run begins with: that in `init`, that of the phase before, or an untrained one.

    Raises:
        ValueError: a phase after the first has nothing to begin with.
    """
    source = init or out / f"phase_{phase - 1}" / "model"
    if source.is_dir():
        return AutoencoderDC.from_pretrained(source, dtype=torch.float32)
    if init is not None:
        raise ValueError(f"`init` must be the folder of an autoencoder, got {init}, which is not a folder.")
    if phase > 1:
        raise ValueError(f"`phase` {phase} needs {source}. Train phase {phase - 1} first, or pass `init`.")
    return make_autoencoder()


@dataclass
class BatchOptions:
    """What a resumed phase must have as before, since steps count its images."""

    batch_size: int = option(1, "images per batch")


def train(phase: int, art: Art, out: Path, minutes: float, init: Path | None = None, **changes: Any) -> Path:
    """Trains a phase for `minutes` in all; returns the folder of its model. `changes` are of the settings."""
    chosen, run, machine = PHASES[phase], out / f"phase_{phase}", device()
    batch_size, resumed = chosen.batch_size[machine], resumable(run)
    model = make_autoencoder() if resumed else begin(phase, out, init)
    settings: dict[str, Any] = {
        "output_dir": str(run),
        "phase": phase,
        "max_minutes": minutes,
        "learning_rate": chosen.learning_rate[machine],
        "resume": resumed,
    }
    settings |= {**COMMON, **MACHINES[machine], **chosen.settings, **changes}

    def batches(used: int) -> Iterator[dict[str, Tensor]]:
        return image_batches(art, batch_size, chosen.side, seed=used)

    options = (BatchOptions(batch_size=batch_size),)
    train_dc_ae(DCAETrainingConfig(**settings), batches, model, options=options)
    return run / "model"


def gradient_energy(images: Tensor) -> Tensor:
    """Mean square of the differences of neighboring pixels, of images `[B, 3, H, W]`."""
    return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()


@torch.no_grad()
def judge(vae: ModelMixin, images: Tensor) -> tuple[dict[str, float], Tensor]:
    """Figures of the reconstructions of `images` `[B, 3, H, W]` in [-1, 1], and these.

    PSNR is the mean of those of the images; the gradient energy is that of the output over the input's.
    """
    latents = torch.cat([vae.encode(part).latent for part in images.split(8)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(8)]).clamp(-1, 1)
    error = (decoded - images).square().mean((1, 2, 3))
    return {
        "psnr_db": round((10 * torch.log10(4 / error)).mean().item(), 2),
        "gradient_energy": round((gradient_energy(decoded) / gradient_energy(images)).item(), 3),
        "latent_rms": round(latents.square().mean().sqrt().item(), 3),
    }, decoded


def judged_images(art: Art) -> Tensor:
    """The fixed scenes `[JUDGED, 3, 256, 256]`, of all kinds in the proportions of the training."""
    source = Scenes(art.objects, seed=123)
    return render(art, [source.sample(held_out=None) for _ in range(JUDGED)])


def report_on(folder: Path, art: Art, out: Path) -> dict[str, Any]:
    """The figures of the model in `folder`; scenes above their reconstructions go to `OUT/judged.png`."""
    vae = AutoencoderDC.from_pretrained(folder, dtype=torch.float32).to(art.device)
    images = judged_images(art)
    figures, decoded = judge(vae, images)
    shown = [part for start in (0, 8) for part in (images[start : start + 8], decoded[start : start + 8])]
    out.mkdir(parents=True, exist_ok=True)
    save_image_grid(torch.cat(shown).cpu(), out / "judged.png", columns=8)
    return environment() | {"scenes": len(images)} | figures


def train_phases(art: Art, out: Path, minutes: float, init: Path | None = None) -> Path:
    """Trains all phases for `minutes` in all; returns the folder of the model, which has its scaling factor."""
    folder = out
    for number, phase in PHASES.items():
        folder = train(number, art, out, minutes * phase.share, init if number == 1 else None)
    print(json.dumps(report_on(folder, art, out), indent=1))
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji-256.zip"), help="what prepare_data wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/autoencoder"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=600, help="time budget of what is trained into OUT")
    parser.add_argument("--phase", type=int, choices=PHASES, help="only this one; default: all in turn")
    parser.add_argument("--init", type=Path, help="folder of the autoencoder to begin with; default: an untrained one")
    parser.add_argument("--judge", type=Path, help="folder of an autoencoder to judge; trains nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures of `--judge`")
    args = parser.parse_args(argv)
    art = Art(args.data, device())
    if args.judge:
        report = report_on(args.judge, art, args.out)
        write_results("emoji_autoencoder", report, args.results)
        print(json.dumps(report, indent=1))
    elif args.phase:
        folder = train(args.phase, art, args.out, args.minutes, args.init)
        print(json.dumps(report_on(folder, art, folder.parent), indent=1))
    else:
        train_phases(art, args.out, args.minutes, args.init)


if __name__ == "__main__":
    main()
