"""Cases of `bench_gpu` about VILA-U: images against the floor that the bandwidth sets, caches, compilation, text.

Random weights of the released sizes in bf16, made on the device (15 GB). Estimated, not measured: at 3 TB/s the floor
of an image is 1.5 s; eager PyTorch launches about 1800 kernels a cell, which takes longer than that. All cases but
the last should take 75 s, and the last one about a minute, most of it for compiling.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.harness import alternate, copy_bandwidth
from benchmarks.vila_u import LAYOUT_384, image_bytes, prompts, question, vila_u
from diffusers_sana.evaluation.machine import peak_memory
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig


Report = dict[str, Any]
RELEASED: dict[str, Any] = {}  # the defaults
TEXT_TOKENS = 64
# Ways to generate an image: arguments of `generate`.
DYNAMIC: Report = {"cache_implementation": "dynamic"}
STATIC: Report = {"cache_implementation": "static"}
COMPILED: Report = STATIC | {"compile_config": CompileConfig(mode="reduce-overhead", fullgraph=True)}


@torch.no_grad()
def images(
    config: VilaUConfig,
    device: str,
    batch: int,
    ways: dict[str, Report],
    warmup: int = 1,
) -> Report:
    """Codes of `batch` guided images, and their pixels.

    Args:
        ways: names and arguments of `generate` to time in turn.
        warmup: untimed calls of each.

    Returns:
        Seconds per image of each way, of decoding, and of the floor of `image_bytes` at the bandwidth of a copy; how
        many floors each way takes; peak memory beyond the weights.
    """
    model, inputs = vila_u(config, device, torch.bfloat16), prompts(config, batch, device)
    read = image_bytes(model, 2 * batch, inputs["input_ids"].shape[1])
    bandwidth = copy_bandwidth(device, 2**30 if device == "cuda" else 2**20)
    functions: dict[str, Callable[[], Any]] = {
        name: partial(model.generate, **inputs, generation_mode="image", **options) for name, options in ways.items()
    }
    with peak_memory() as peak:
        seconds = alternate(functions, rounds=1, warmup=warmup)
        shape = (batch, config.vision_config.num_image_tokens, config.vision_config.num_codebooks)
        codes = torch.zeros(shape, dtype=torch.long, device=device)
        decode = alternate({"decode": lambda: model.decode_image_tokens(codes)}, rounds=1)["decode"]
    floor = sum(read.values()) / bandwidth
    return {
        "seconds_per_image": {name: value / batch for name, value in seconds.items()},
        "decode_seconds_per_image": decode / batch,
        "bytes_read": read,
        "gigabytes_per_second": bandwidth / 1e9,
        "floor_seconds_per_image": floor / batch,
        "times_the_floor": {name: value / floor for name, value in seconds.items()},
        "peak_mib": peak["mib"],
    }


@torch.no_grad()
def text(config: VilaUConfig, device: str) -> Report:
    """Tokens a second after a prompt with an image, from both caches."""
    model, inputs = vila_u(config, device, torch.bfloat16), question(config, 1, device)

    def run(cache: str, tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(
            **inputs,
            do_sample=False,
            cache_implementation=cache,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            disable_compile=True,
        )

    lengths = {"first": 1, "all": TEXT_TOKENS}
    seconds = alternate(
        {f"{cache} {name}": run(cache, count) for cache in ("dynamic", "static") for name, count in lengths.items()},
        rounds=1,
    )
    return {
        "prompt_tokens": inputs["input_ids"].shape[1],
        "first_token_seconds": {cache: seconds[f"{cache} first"] for cache in ("dynamic", "static")},
        "tokens_per_second": {
            cache: (TEXT_TOKENS - 1) / (seconds[f"{cache} all"] - seconds[f"{cache} first"])
            for cache in ("dynamic", "static")
        },
    }


def cases(
    device: str = "cuda", released: dict[str, Any] = RELEASED, layout_384: dict[str, Any] = LAYOUT_384
) -> Iterator[tuple[str, Callable[[], Report]]]:
    """Name and function of every case, what matters most first; tests give tiny sizes and a CPU."""
    ways = {"dynamic": DYNAMIC, "static": STATIC}
    yield "vila-u 256px batch 1", lambda: images(VilaUConfig(**released), device, 1, ways)
    yield "vila-u text", lambda: text(VilaUConfig(**released), device)
    for batch in (4, 16):
        yield (
            f"vila-u 256px batch {batch}",
            lambda batch=batch: images(VilaUConfig(**released), device, batch, {"static": STATIC}, warmup=0),
        )
    yield "vila-u 384px batch 1", lambda: images(VilaUConfig(**layout_384), device, 1, {"static": STATIC}, warmup=0)
    yield "vila-u 256px batch 1 compiled", lambda: images(VilaUConfig(**released), device, 1, {"compiled": COMPILED})
