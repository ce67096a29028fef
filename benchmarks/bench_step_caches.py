"""Seconds per image with each step cache, and how near the image is to the one without.

    python -m benchmarks.bench_step_caches [--model FOLDER] [--prompts 8]

The bundled checkpoint generates images of held-out prompts one by one in 20 steps, without a cache, in fewer steps,
and with each cache in turn. Writes `benchmarks/results/<device>/step_caches.json` and the figure of docs/caching.md.
For one thread on one core: `OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.bench_step_caches --clock cpu`.
"""

import argparse
import ast
import contextlib
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.utils import logging
from torch import Tensor

from benchmarks.harness import RESULTS, alternating_times, environment, write_results
from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from examples.train_emoji.common import captioned_grid
from examples.train_emoji.scenes import OBJECTS, held_out_scenes


STEPS = 20
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "step_caches.webp"
SHOWN = 4  # prompts in the figure
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# What is in the figure, from left to right.
COLUMNS = (
    "no cache",
    "no cache, 10 steps",
    "FirstBlockCache, threshold 0.2",
    "MagCache, threshold 0.06",
    "TaylorSeer, attention, every 2nd step",
    "PyramidAttentionBroadcast, both attentions",
    "FasterCache",
    "SeaCache, threshold 0.25",
)


def magnitude_ratios(pipe: SanaPipeline, prompts: list[str]) -> list[float]:
    """What MagCache must know of a checkpoint: its calibration, which prints them, over a few images."""
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pipe(prompts, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent")
    pipe.transformer.disable_cache()
    return ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


def variants(ratios: list[float]) -> dict[str, tuple[Any, int]]:
    """Name -> the cache's config or None, and the number of steps."""
    table: dict[str, tuple[Any, int]] = {"no cache": (None, STEPS)}
    table |= {f"no cache, {steps} steps": (None, steps) for steps in (16, 14, 12, 10)}
    configs: dict[str, Any] = {
        f"FirstBlockCache, threshold {threshold}": FirstBlockCacheConfig(threshold) for threshold in (0.1, 0.2, 0.3)
    }
    configs |= {
        f"MagCache, threshold {threshold}": MagCacheConfig(threshold, num_inference_steps=STEPS, mag_ratios=ratios)
        for threshold in (0.06, 0.24)
    }
    exact = {"taylor_factors_dtype": torch.float32}
    configs |= {
        "TaylorSeer, attention, every 2nd step": TaylorSeerCacheConfig(cache_interval=2, **exact),
        "TaylorSeer, lite, every 2nd step": TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True, **exact),
        "TaylorSeer, lite, every 3rd step": TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True, **exact),
        "PyramidAttentionBroadcast, cross-attention": PyramidAttentionBroadcastConfig(
            cross_attention_block_skip_range=2
        ),
        "PyramidAttentionBroadcast, both attentions": PyramidAttentionBroadcastConfig(
            cross_attention_block_skip_range=2, spatial_attention_block_skip_range=2
        ),
        "FasterCache": FasterCacheConfig(),
        "FasterCache, all times, every 2nd step": FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 950),
            unconditional_batch_timestep_skip_range=(-1, 950),
            unconditional_batch_skip_range=2,
        ),
    }
    configs |= {f"SeaCache, threshold {threshold}": SeaCacheConfig(threshold) for threshold in (0.1, 0.25)}
    return table | {name: (config, STEPS) for name, config in configs.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SANA_EMOJI, help="pipeline folder; default: the bundled one")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, on a shared machine")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args(argv)

    logging.set_verbosity_error()  # FasterCache calls itself experimental each time
    pipe = SanaPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    scenes = [scene.prompt for scene in held_out_scenes(list(OBJECTS))]
    prompts = scenes[: args.prompts]
    generated: dict[str, list[Tensor]] = {}

    def generating(name: str, config: Any, steps: int) -> Callable[[], None]:
        """A function that generates an image of another prompt at each call, with the prompt's seed."""
        numbers = itertools.cycle(range(len(prompts)))

        def generate_next() -> None:
            number = next(numbers)
            if config is not None:
                pipe.transformer.enable_cache(config)
            generator = torch.Generator().manual_seed(number)
            images = pipe(prompts[number], num_inference_steps=steps, generator=generator, output_type="pt").images
            if config is not None:
                pipe.transformer.disable_cache()
            generated.setdefault(name, []).append(images[0].float().cpu())

        return generate_next

    ratios = magnitude_ratios(pipe, scenes[-4:])
    functions = {name: generating(name, *variant) for name, variant in variants(ratios).items()}
    # The warm-up round generates the first prompt, so the timed rounds begin with the second and end with the first.
    times = alternating_times(functions, rounds=len(prompts), clock=CLOCKS[args.clock])
    reference = torch.stack(generated["no cache"][: len(prompts)])
    report = {
        **environment(),
        "clock": args.clock,
        "prompts": len(prompts),
        "steps": STEPS,
        "magnitude_ratios": [round(ratio, 4) for ratio in ratios],
        "variants": {},
    }
    for name in functions:
        errors = (torch.stack(generated[name][: len(prompts)]) - reference).square().mean(dim=(1, 2, 3))
        ratios_of_time = [plain / own for plain, own in zip(times["no cache"], times[name], strict=True)]
        report["variants"][name] = {
            "seconds": statistics.median(times[name]),
            "speedup": statistics.median(ratios_of_time),
            # None where every image is the same to the last bit.
            "psnr_db": None if not errors.any() else (-10 * errors.clamp(min=1e-10).log10()).mean().item(),
        }
    write_results("step_caches", report, args.results)
    rows = [(name, generated[name][number]) for number in range(min(SHOWN, len(prompts))) for name in COLUMNS]
    sheet = torch.stack([image for _, image in rows]) * 2 - 1
    captioned_grid(sheet, [name for name, _ in rows], args.figure, columns=len(COLUMNS))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
