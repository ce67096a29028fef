"""What deeper compression gains a diffusion transformer: the same DiT on latents of f8, f32 and f64 autoencoders.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.bench_dc_ae_dit [--clock cpu]

The comparison of DC-AE's paper (arXiv 2410.10733) in kind: images of 512 pixels, fp32, a DiT of four blocks, and
autoencoders of the published layouts with a quarter of their channels; all weights are random. Training, sampling
with guidance and decoding of all three run in turn in one process. With `--clock cpu`, seconds are processor time:
what this process computed, and not how long it waited for others. Writes `benchmarks/results/cpu/dc_ae_dit.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from benchmarks.harness import RESULTS, alternating_times, environment, write_results
from diffusers_sana import AutoencoderDC
from diffusers_sana.evaluation.machine import peak_memory
from diffusers_sana.training.objectives.flow_matching import (
    interpolate,
    sample_euler,
    sample_sigmas,
    timesteps_of,
    velocity_target,
)
from diffusers_sana.training.optimizers import make_adamw


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TRANSFORMER = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64}
IMAGE_SIZE, TRAIN_BATCH, STEPS, NO_CLASS = 512, 4, 20, 1000


def f8_autoencoder() -> AutoencoderKL:
    """Stable Diffusion's, with a quarter of its channels."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def dc_autoencoder(stages: int, latent_channels: int) -> AutoencoderDC:
    """The `in` and `mix` layout, with a quarter of its channels; compresses `2 ** (stages - 1)` times a side."""
    widths = (32, 64, 128, 128, 256, 256, 512)[:stages]
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3)
    return AutoencoderDC(
        latent_channels=latent_channels,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 4, 8, 2, 2, 2, 2)[:stages],
        decoder_layers_per_block=(0, 5, 10, 2, 2, 2, 2)[:stages],
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * (stages - 3),
        decoder_act_fns=("relu",) * 3 + ("silu",) * (stages - 3),
    )


# Name -> autoencoder, latent channels, compression a side, patch size.
CASES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "f8, patch 2": (f8_autoencoder, 4, 8, 2),
    "f32, patch 1": (lambda: dc_autoencoder(6, 32), 32, 32, 1),
    "f64, patch 1": (lambda: dc_autoencoder(7, 128), 128, 64, 1),
}


def training_step(transformer: nn.Module, latents: Tensor) -> Callable[[], None]:
    """One step of flow matching on `latents` `[B, C, h, h]`, as examples/train_dc_ae_dit.py takes it."""
    optimizer = make_adamw(transformer.parameters(), 1e-4, (0.9, 0.999), 0.0)
    labels = torch.arange(len(latents))

    def step() -> None:
        transformer.train()
        noise, sigmas = torch.randn_like(latents), sample_sigmas(len(latents), 1.0)
        noisy = interpolate(latents, noise, sigmas)
        velocity = transformer(noisy, timesteps_of(sigmas), labels, return_dict=False)[0]
        F.mse_loss(velocity, velocity_target(latents, noise)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(transformer: nn.Module, noise: Tensor) -> Callable[[], Tensor]:
    """Latents of one image from `noise` `[1, C, h, h]`, guided: two evaluations a step."""
    labels = torch.tensor([0, NO_CLASS])

    def guided(latents: Tensor, sigmas: Tensor) -> Tensor:
        timesteps = timesteps_of(sigmas.repeat(2))
        full, empty = transformer(latents.repeat(2, 1, 1, 1), timesteps, labels, return_dict=False)[0].chunk(2)
        return empty + 4 * (full - empty)

    def sample() -> Tensor:
        transformer.eval()
        return sample_euler(guided, noise, STEPS, shift=1.0)

    return sample


def decoding(vae: nn.Module, latents: Tensor, image_size: int) -> Callable[[], Tensor]:
    """Pixels of `latents` `[1, C, h, h]`.

    Raises:
        ValueError: for an autoencoder that does not make images of `image_size`.
    """

    @torch.no_grad()
    def decode() -> Tensor:
        return vae.decode(latents).sample

    if (shape := decode().shape) != (1, 3, image_size, image_size):
        raise ValueError(f"the images must have {image_size} pixels a side, got {tuple(shape)}.")
    return decode


def measure(rounds: int, clock: Callable[[], float], image_size: int) -> dict[str, Any]:
    """Seconds, images a second and MiB of each case, and how many times faster it is than the first."""
    functions: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (autoencoder, channels, compression, patch) in CASES.items():
        torch.manual_seed(0)
        side = image_size // compression
        sizes = {"in_channels": channels, "out_channels": channels, "sample_size": side, "patch_size": patch}
        transformer = DiTTransformer2DModel(**sizes, **TRANSFORMER)
        latents = torch.randn(TRAIN_BATCH, channels, side, side)
        functions[f"{name} train"] = training_step(transformer, latents)
        functions[f"{name} sample"] = sampling(transformer, latents[:1])
        functions[f"{name} decode"] = decoding(autoencoder().eval(), latents[:1], image_size)
        rows[name] = {
            "latents": [channels, side, side],
            "tokens": (side // patch) ** 2,
            "transformer_parameters": transformer.num_parameters(),
        }
    memory = {}
    for name, function in functions.items():  # also the warm-up
        with peak_memory() as peak:
            function()
        memory[name] = peak["mib"]
    times = alternating_times(functions, rounds, warmup=0, clock=clock)
    baseline = next(iter(CASES))
    for name, row in rows.items():
        for what, images in (("train", TRAIN_BATCH), ("sample", 1), ("decode", 1)):
            own, first = times[f"{name} {what}"], times[f"{baseline} {what}"]
            ratios = sorted(theirs / ours for theirs, ours in zip(first, own, strict=True))
            row[what] = {
                "seconds": statistics.median(own),
                "images_per_second": images / statistics.median(own),
                "speedup": statistics.median(ratios),
                "speedup_range": [ratios[0], ratios[-1]],
                "peak_mib": memory[f"{name} {what}"],
            }
        row["images_per_second"] = 1 / (row["sample"]["seconds"] + row["decode"]["seconds"])
    return rows


def main(argv: list[str] | None = None, image_size: int = IMAGE_SIZE) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each, after one that is not timed")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others compute on the same cores")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    report = {
        **environment(),
        "clock": args.clock,
        "rounds": args.rounds,
        "image_size": image_size,
        "transformer": TRANSFORMER,
        "train_batch": TRAIN_BATCH,
        "steps": STEPS,
        "cases": measure(args.rounds, CLOCKS[args.clock], image_size),
    }
    write_results("dc_ae_dit", report, args.results)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
