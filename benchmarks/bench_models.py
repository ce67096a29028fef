"""Seconds and memory of the models at their true sizes: ours and diffusers', in turn, in one process.

    python -m benchmarks.bench_models [--only transformer autoencoder video image] [--cases NAME ...]

Random weights; both classes use the same memory for them. The transformer's text is a prompt of 32 tokens of 300 and
an empty negative prompt; what depends on the text alone is computed before the steps are timed in ours, and in every
step in diffusers', as in their pipelines. Writes `benchmarks/results/<device>/models.json` case by case, so that a
run may be cut off and continued; cases there are measured again only when named. On a CPU with instructions for bf16
the file is named after them, such as `models-avx512_bf16.json`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    RESULTS,
    alternating_times,
    environment,
    named_by_processor,
    summary,
    write_results,
)
from benchmarks.models import (
    AUTOENCODER,
    SANA_VIDEO,
    TRANSFORMERS,
    pipelines,
    step_inputs,
    twins,
    video_step_inputs,
)
from diffusers_sana.evaluation.machine import peak_memory, synchronize


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a cyberpunk cat with a neon sign that says Sana, rain on the street behind it, soft light, many details"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def step_case(model: str, size: int, dtype: str, compiled: bool = False, device: str = DEVICE) -> dict[str, Any]:
    """One denoising step, guided."""
    ours, theirs = twins("SanaTransformer2DModel", TRANSFORMERS[model], device, DTYPES[dtype])
    inputs = step_inputs(size, device, DTYPES[dtype])
    with torch.no_grad():
        text = ours.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        if compiled:
            ours.compile_repeated_blocks(fullgraph=True, dynamic=False)
            theirs = torch.compile(theirs, dynamic=False)
    return {
        "diffusers": lambda: theirs(**inputs).sample,
        "diffusers_sana": lambda: ours(inputs["hidden_states"], None, inputs["timestep"], text_context=text).sample,
    }


def autoencoder_case(
    half: str, size: int, dtype: str, config: dict[str, Any] = AUTOENCODER, device: str = DEVICE
) -> dict[str, Any]:
    """One image of `size` pixels a side."""
    ours, theirs = twins("AutoencoderDC", config, device, DTYPES[dtype])
    torch.manual_seed(0)
    shape = (1, 32, size // 32, size // 32) if half == "decode" else (1, 3, size, size)
    x = torch.randn(shape).to(device, DTYPES[dtype])
    return {
        "diffusers": lambda: getattr(theirs, half)(x, return_dict=False)[0],
        "diffusers_sana": lambda: getattr(ours, half)(x, return_dict=False)[0],
    }


def video_case(
    height: int, width: int, frames: int, dtype: str, config: dict[str, Any] = SANA_VIDEO, device: str = DEVICE
) -> dict[str, Any]:
    """One denoising step of a video, guided, in blocks of true width."""
    ours, theirs = twins("SanaVideoTransformer3DModel", config, device, DTYPES[dtype])
    inputs = video_step_inputs(config, height, width, frames, device, DTYPES[dtype])
    with torch.no_grad():
        text = ours.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    return {
        "diffusers": lambda: theirs(**inputs).sample,
        "diffusers_sana": lambda: ours(inputs["hidden_states"], None, inputs["timestep"], text_context=text).sample,
    }


def image_case(
    model: str, size: int, dtype: str, steps: int = 20, device: str = DEVICE, **parts: dict[str, Any] | None
) -> dict[str, Any]:
    """From a new prompt to pixels: text encoder, steps, decoding. The instruction is the same from run to run.

    `parts` are sizes of the other models, see `pipelines`.
    """
    pipes = pipelines(TRANSFORMERS[model], device, DTYPES[dtype], **parts)
    count = iter(range(10**6))

    def run(pipe: Any) -> Callable[[], torch.Tensor]:
        return lambda: (
            pipe(
                f"{PROMPT}, number {next(count)}",
                height=size,
                width=size,
                num_inference_steps=steps,
                use_resolution_binning=False,
                generator=torch.Generator("cpu").manual_seed(0),
                output_type="pt",
            ).images
        )

    return {name: run(pipe) for name, pipe in pipes.items()}


# Name -> kind, function, arguments, rounds after the first. Where half precision is slow, one call takes minutes.
CASES: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple, int]] = {
    "sana-0.6b step 512px bf16": ("transformer", step_case, ("sana-0.6b", 512, "bf16"), 3),
    "sana-0.6b step 512px fp32": ("transformer", step_case, ("sana-0.6b", 512, "fp32"), 5),
    "sana-0.6b step 1024px bf16": ("transformer", step_case, ("sana-0.6b", 1024, "bf16"), 1),
    "sana-0.6b step 1024px fp32": ("transformer", step_case, ("sana-0.6b", 1024, "fp32"), 3),
    "dc-ae decode 1024px bf16": ("autoencoder", autoencoder_case, ("decode", 1024, "bf16"), 0),
    "dc-ae decode 1024px fp32": ("autoencoder", autoencoder_case, ("decode", 1024, "fp32"), 1),
    "sana-video, 2 blocks, step 480x832, 9 frames fp32": ("video", video_case, (480, 832, 9, "fp32"), 3),
    "sana-video, 2 blocks, step 256x448, 33 frames fp32": ("video", video_case, (256, 448, 33, "fp32"), 3),
    "sana-0.6b image 512px bf16": ("image", image_case, ("sana-0.6b", 512, "bf16"), 0),
    "sana-0.6b step 1024px fp32 compiled": ("compiled", step_case, ("sana-0.6b", 1024, "fp32", True), 3),
    "dc-ae decode 512px fp32": ("autoencoder", autoencoder_case, ("decode", 512, "fp32"), 3),
    "dc-ae encode 512px fp32": ("autoencoder", autoencoder_case, ("encode", 512, "fp32"), 3),
    "sana-0.6b step 1024px bf16 compiled": ("compiled", step_case, ("sana-0.6b", 1024, "bf16", True), 1),
}


def measure(functions: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of each, their ratios, and how far apart the outputs are.

    Memory is read in the first calls; they are timed where there are no others.
    """
    outputs, memory, times = {}, {}, {}
    with torch.no_grad():
        for name, function in functions.items():
            with peak_memory() as peak:
                start = time.perf_counter()
                outputs[name] = function()
                synchronize()
                times[name] = [time.perf_counter() - start]
            memory[name] = peak["mib"]
        if rounds:
            times = alternating_times(functions, rounds, warmup=0)
    ours, theirs = outputs["diffusers_sana"].double(), outputs["diffusers"].double()
    return {
        **summary(times, baseline="diffusers"),
        "peak_mib": memory,
        "memory_ratio": memory["diffusers_sana"] / memory["diffusers"] if memory["diffusers"] else None,
        "difference": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = sorted({kind for kind, *_ in CASES.values()})
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds of cases")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[], help="cases to run, also where measured")
    parser.add_argument("--rounds", type=int, help="timed calls of each class; by default as many as a case needs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    name_of_file = named_by_processor("models")
    path = args.results / DEVICE / f"{name_of_file}.json"
    report = {**environment(), "cases": {}}
    if path.exists():
        report["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    for name, (kind, make, arguments, rounds) in CASES.items():
        if name in args.cases or (not args.cases and kind in args.only and name not in report["cases"]):
            row = {
                "commit": report["commit"],
                **measure(make(*arguments), rounds if args.rounds is None else args.rounds),
            }
            report["cases"][name] = row
            print(f"{name}: {row['speedup']:.2f}x, memory {row['memory_ratio']:.2f}x, {row['seconds']}")
            write_results(name_of_file, report, args.results)


if __name__ == "__main__":
    main()
