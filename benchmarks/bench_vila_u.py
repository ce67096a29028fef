"""VILA-U on a CPU at a reduced size: images the official way and ours, text, and the image tokenizer.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.bench_vila_u [--only images deep text tokenizer]

Random weights of a small model with the grid, the codes a cell and about the fraction of depth transformer of the
released one. Both ways run in turn in one process over the same weights; before that, their best codes in fp32 must be
the same. With `--clock cpu`, seconds are processor time: what this process computed, and not how long it waited for
others. Writes `benchmarks/results/cpu/vila_u.json`, case by case; cases there are measured again only when named.

    images   from ids to pixels, guided: prompts, codes, decoding
    deep       the same with 16 codes a cell, as the 384 pixel model has them, and a quarter of the cells
    text       tokens a second after a prompt with an image, one by one from a full cache
    tokenizer  pixels to codes and codes to pixels
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, alternating_times, environment, summary, write_results
from benchmarks.official_vila_u import official_images
from benchmarks.vila_u import REDUCED, deeper, image_bytes, prompts, question, vila_u
from diffusers_sana.evaluation.machine import peak_memory
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TEXT_TOKENS = 32
# Name -> kind, dtype, batch, rounds after the first.
CASES: dict[str, tuple[str, str, int, int]] = {
    "image fp32": ("images", "fp32", 1, 3),
    "128px image, 16 codes a cell fp32": ("deep", "fp32", 1, 3),
    "text fp32": ("text", "fp32", 1, 3),
    "encode fp32": ("tokenizer", "fp32", 1, 3),
    "decode fp32": ("tokenizer", "fp32", 1, 3),
    "text bf16": ("text", "bf16", 1, 3),
    "encode bf16": ("tokenizer", "bf16", 1, 3),
    "decode bf16": ("tokenizer", "bf16", 1, 1),
    "4 images fp32": ("images", "fp32", 4, 0),
    "image bf16": ("images", "bf16", 1, 0),
    "4 images bf16": ("images", "bf16", 4, 0),
}


def our_images(model: Any, inputs: dict[str, Tensor], do_sample: bool) -> tuple[Tensor, Tensor]:
    """Codes `[N, T, D]` and pixels of one image for each prompt."""
    codes = model.generate(**inputs, generation_mode="image", do_sample=do_sample)
    return codes, model.decode_image_tokens(codes)


def images(sizes: dict[str, Any], dtype: str, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of `batch` images, sampled with the default settings, both ways.

    Raises:
        ValueError: in fp32, the best codes of the two ways differ; nothing is timed then.
    """
    config = VilaUConfig(**sizes)
    model, inputs = vila_u(config, "cpu", DTYPES[dtype]), prompts(config, batch, "cpu")
    same = None
    if dtype == "fp32":
        ours, theirs = (way(model, inputs, do_sample=False)[0] for way in (our_images, official_images))
        if not torch.equal(ours, theirs):
            raise ValueError(f"the two ways agree on {(ours == theirs).float().mean():.1%} of the codes only")
        same = {"codes": ours.numel(), "distinct": ours.unique().numel()}
    functions = {
        "official way": partial(official_images, model, inputs, do_sample=True),
        "diffusers_sana": partial(our_images, model, inputs, do_sample=True),
    }
    memory, times = first_calls(functions, clock)
    if rounds:
        times = alternating_times(functions, rounds, warmup=0, clock=clock)
    row = summary(times, baseline="official way")
    cells = batch * config.vision_config.num_image_tokens
    return {
        **row,
        "same_best_codes": same,
        "cells_per_second": {name: cells / seconds for name, seconds in row["seconds"].items()},
        "peak_mib": memory,
        "bytes_at_least": image_bytes(model, 2 * batch, inputs["input_ids"].shape[1]),
    }


def text(sizes: dict[str, Any], dtype: str, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of `TEXT_TOKENS` tokens after an image and a question; the prompt is read in the first."""
    config = VilaUConfig(**sizes)
    model, inputs = vila_u(config, "cpu", DTYPES[dtype]), question(config, batch, "cpu")
    generate = partial(model.generate, **inputs, do_sample=False, min_new_tokens=TEXT_TOKENS)
    functions = {
        "first token": partial(generate, min_new_tokens=1, max_new_tokens=1),
        "diffusers_sana": partial(generate, max_new_tokens=TEXT_TOKENS),
    }
    row = alone(functions, rounds, clock)
    row["prompt_tokens"] = inputs["input_ids"].shape[1]
    seconds = row["seconds"]["diffusers_sana"] - row["seconds"]["first token"]
    row["tokens_per_second"] = batch * (TEXT_TOKENS - 1) / seconds
    return row


def tokenizer(
    sizes: dict[str, Any], dtype: str, batch: int, rounds: int, clock: Callable[[], float], half: str
) -> dict[str, Any]:
    """Images a second of the vision tower: `half` is "encode" or "decode"."""
    config = VilaUConfig(**sizes)
    tower, vision = vila_u(config, "cpu", DTYPES[dtype]).model.vision_tower, config.vision_config
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch, 3, vision.image_size, vision.image_size, generator=generator) * 2 - 1
    codes = tower.encode_to_codes(pixels.to(DTYPES[dtype]))
    halves = {
        "encode": lambda: tower.encode_to_codes(pixels.to(DTYPES[dtype])),
        "decode": lambda: tower.decode_codes(codes),
    }
    row = alone({"diffusers_sana": halves[half]}, rounds, clock)
    return {**row, "images_per_second": batch / row["seconds"]["diffusers_sana"]}


def alone(functions: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds and memory where nothing is compared."""
    memory, times = first_calls(functions, clock)
    if rounds:
        times = alternating_times(functions, rounds, warmup=0, clock=clock)
    ours = times["diffusers_sana"]
    return {
        "rounds": len(ours),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "seconds_range": [min(ours), max(ours)],
        "peak_mib": memory,
    }


def first_calls(
    functions: dict[str, Callable[[], Any]], clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Peak memory in MiB and seconds of one call of each."""
    memory, times = {}, {}
    for name, function in functions.items():
        with peak_memory() as peak:
            start = clock()
            function()
            times[name] = [clock() - start]
        memory[name] = peak["mib"]
    return memory, times


@torch.no_grad()
def measure(name: str, sizes: dict[str, Any], rounds: int | None, clock: Callable[[], float]) -> dict[str, Any]:
    """One of `CASES`."""
    kind, dtype, batch, usual_rounds = CASES[name]
    run: dict[str, Callable[..., dict[str, Any]]] = {
        "images": images,
        "deep": lambda sizes, *arguments: images(deeper(sizes), *arguments),
        "text": text,
        "tokenizer": partial(tokenizer, half=name.split()[0]),
    }
    torch.manual_seed(0)
    return run[kind](sizes, dtype, batch, usual_rounds if rounds is None else rounds, clock)


def main(argv: list[str] | None = None, sizes: dict[str, Any] = REDUCED) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = sorted({kind for kind, *_ in CASES.values()})
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds of cases")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[], help="cases to run, also where measured")
    parser.add_argument("--rounds", type=int, help="timed calls of each; by default as many as a case needs")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others compute on the same cores")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    path = args.results / "cpu" / "vila_u.json"
    report = {**environment(), "clock": args.clock, "sizes": sizes, "cases": {}}
    if path.exists():
        report["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    for name, (kind, *_) in CASES.items():
        if name in args.cases or (not args.cases and kind in args.only and name not in report["cases"]):
            row = measure(name, sizes, args.rounds, CLOCKS[args.clock])
            report["cases"][name] = {"commit": report["commit"], **row}
            print(f"{name}: {row}", flush=True)
            write_results("vila_u", report, args.results)


if __name__ == "__main__":
    main()
