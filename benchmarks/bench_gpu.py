"""Everything that only a GPU can tell, in one unattended run of a few minutes.

    python -m benchmarks.bench_gpu [--minutes 10] [--case-minutes 2.5] [--only WORD ...] [--results FOLDER]

Sections, in the order of what matters most: what the machine can do at best; each kernel against its reference and
against that; 4-bit layers and steps; steps of Sana-0.6B and 1.6B; the autoencoder; compiled models; images per second
against a transformer of the size of FLUX.1-dev with its autoencoder; VILA-U; whole images.
Random weights of the true sizes, bf16. The results are written after every case to `FOLDER/<device>/gpu.json`; cases
that failed, that took too long or that the time did not allow are named there with the reason.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks import vila_u_gpu
from benchmarks.bench_models import autoencoder_case, measure, picture_case, step_case
from benchmarks.harness import RESULTS, alternate, copy_bandwidth, environment, write_results
from benchmarks.isolated import run_isolated
from benchmarks.kernel_benchmark import load, operations, run_on_gpu
from benchmarks.models import AUTOENCODER, TRANSFORMERS, random_model, step_inputs, twins
from diffusers_sana.pipelines.acceleration.cuda_graphs import CudaGraphs
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import LayerConfig, SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layer


STEPS = 20
Report = dict[str, Any]


def ceilings() -> Report:
    """Bandwidth of a device copy and speed of a large matrix product: the limits of the rooflines."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds = alternate({"matmul": lambda: a @ b}, rounds=10, warmup=3)
    return {
        "gigabytes_per_second": copy_bandwidth("cuda") / 1e9,
        "teraflops": 2 * 8192**3 / seconds["matmul"] / 1e12,
    }


def graphed_step(model: str, size: int) -> Report:
    """A step of ours launched kernel by kernel and replayed as one graph."""
    ours, _ = twins("SanaTransformer2DModel", TRANSFORMERS[model], "cuda", torch.bfloat16)
    inputs = step_inputs(size, "cuda", torch.bfloat16)
    with torch.no_grad():
        text = ours.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        arguments = {
            "hidden_states": inputs["hidden_states"],
            "encoder_hidden_states": None,
            "timestep": inputs["timestep"],
            "text_context": text,
            "return_dict": False,
        }
        graphs = CudaGraphs(ours)
        functions = {"eager": lambda: ours(**arguments)[0], "graph": lambda: graphs(**arguments)}
        seconds = alternate(functions, rounds=10, warmup=2)
        equal = torch.equal(functions["eager"](), functions["graph"]())
    return {"seconds": seconds, "speedup": seconds["eager"] / seconds["graph"], "equal": equal}


def quantized_step(model: str, size: int, precision: str) -> Report:
    """A step of ours in bf16 and in 4 bits, in every mode."""
    ours, theirs = twins("SanaTransformer2DModel", TRANSFORMERS[model], "cuda", torch.bfloat16)
    inputs = step_inputs(size, "cuda", torch.bfloat16)
    functions: dict[str, Callable[[], Any]] = {"diffusers bf16": lambda: theirs(**inputs).sample}

    def step(transformer: Any) -> Callable[[], Any]:
        text = transformer.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        return lambda: transformer(inputs["hidden_states"], None, inputs["timestep"], text_context=text).sample

    with torch.no_grad():
        functions["bf16"] = step(ours)
        for mode in ("w4a4", "w4a8", "w4a16"):
            quantized = copy.deepcopy(ours)
            quantize(quantized, SVDQuantConfig(precision, smoothing="none", compute_mode=mode), progress=False)
            functions[mode] = step(quantized)
        seconds = alternate(functions, rounds=5, warmup=2)
    return {"seconds": seconds, "faster_than_bf16": {name: seconds["bf16"] / value for name, value in seconds.items()}}


def quantized_linear(tokens: int, in_features: int, out_features: int, precision: str) -> Report:
    """One layer in every mode against the vendor's bf16 product."""
    dense = nn.Linear(in_features, out_features, device="cuda", dtype=torch.bfloat16)
    options = LayerConfig(precision=precision, smoothing="none")
    layer = quantized_layer(dense, decompose([dense.weight.detach()], options)[0][0])
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)

    def run(mode: str) -> Callable[[], Any]:
        alike = copy.deepcopy(layer)
        alike.set_compute_mode(mode)
        return lambda: alike(x)

    with torch.no_grad():
        functions = {"bf16": lambda: dense(x), **{mode: run(mode) for mode in ("w4a4", "w4a8", "w4a16")}}
        seconds = alternate(functions, rounds=20, warmup=3)
    return {"seconds": seconds, "faster_than_bf16": {name: seconds["bf16"] / value for name, value in seconds.items()}}


def sana_throughput(size: int) -> Report:
    """Images per second of Sana-0.6B: 20 guided steps and one decoding, one image at a time."""
    step = measure_ours(step_case("sana-0.6b", size, "bf16"))
    decode = measure_ours(autoencoder_case("decode", size, "bf16"))
    return {"step": step, "decode": decode, "images_per_second": 1 / (STEPS * step + decode)}


def measure_ours(functions: dict[str, Callable[[], torch.Tensor]]) -> float:
    """Median seconds of our half of a case."""
    with torch.no_grad():
        return alternate({"ours": functions["diffusers_sana"]}, rounds=3)["ours"]


def flux_throughput(size: int) -> Report:
    """Images per second of a FLUX.1-dev-size transformer (12 B, guidance as an input) and its f8 autoencoder."""
    side = size // 16  # latents of 8 pixels, packed two by two
    model = random_model(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), "cuda", torch.bfloat16)
    inputs = {
        "hidden_states": torch.randn(1, side * side, 64, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16),
        "pooled_projections": torch.randn(1, 768, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((1,), 0.5, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device="cuda"),
        "img_ids": torch.zeros(side * side, 3, device="cuda"),
        "txt_ids": torch.zeros(512, 3, device="cuda"),
    }
    with torch.no_grad():
        step = alternate({"step": partial(model, **inputs)}, rounds=2)["step"]
        vae = random_model(flux_autoencoder, "cuda", torch.bfloat16)
        vae.enable_tiling()
        latents = torch.randn(1, 16, size // 8, size // 8, device="cuda", dtype=torch.bfloat16)
        decode = alternate({"decode": lambda: vae.decode(latents).sample}, rounds=1)["decode"]
    return {"step": step, "decode": decode, "images_per_second": 1 / (STEPS * step + decode)}


def flux_autoencoder() -> diffusers.AutoencoderKL:
    """The f8c16 autoencoder of FLUX.1-dev."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def compiled_decode(size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Both decoders compiled."""
    ours, theirs = twins("AutoencoderDC", AUTOENCODER, "cuda", torch.bfloat16)
    z = torch.randn(1, 32, size // 32, size // 32, device="cuda", dtype=torch.bfloat16)
    ours.decoder = torch.compile(ours.decoder, dynamic=False)
    theirs.decoder = torch.compile(theirs.decoder, dynamic=False)
    return {name: (lambda m=m: m.decode(z).sample) for name, m in (("diffusers", theirs), ("diffusers_sana", ours))}


def cases() -> Iterator[tuple[str, Callable[[], Report]]]:
    """Name and function of every case, what matters most first."""
    yield "ceilings", ceilings
    for operation in operations():
        yield f"kernel {operation}", lambda operation=operation: run_on_gpu(load(operation), with_compiled=False)
    yield "step sana-1.6b 1024px", lambda: measure(step_case("sana-1.6b", 1024, "bf16"), 5)
    yield "decode 1024px", lambda: measure(autoencoder_case("decode", 1024, "bf16"), 3)
    for precision in ("int4", "nvfp4"):
        for shape in ((4096, 3072, 12288), (4096, 2240, 11200)):
            name = f"linear {'x'.join(map(str, shape))} {precision}"
            yield name, partial(quantized_linear, *shape, precision)
        yield f"step sana-1.6b 1024px {precision}", partial(quantized_step, "sana-1.6b", 1024, precision)
    for model in ("sana-0.6b", "sana-1.6b"):
        for size in (512, 1024):
            yield f"graph {model} {size}px", lambda model=model, size=size: graphed_step(model, size)
        for size in (512, 1024, 2048, 4096):
            if (model, size) != ("sana-1.6b", 1024):
                yield (
                    f"step {model} {size}px",
                    lambda model=model, size=size: measure(step_case(model, size, "bf16"), 3 if size < 4096 else 1),
                )
    yield "step sana-1.6b 1024px compiled", lambda: measure(step_case("sana-1.6b", 1024, "bf16", True), 5)
    yield "decode 1024px compiled", lambda: measure(compiled_decode(1024), 3)
    for size in (1024, 4096):
        yield f"throughput sana-0.6b {size}px", lambda size=size: sana_throughput(size)
        yield f"throughput flux {size}px", lambda size=size: flux_throughput(size)
    yield from vila_u_gpu.cases()
    yield "encode 1024px", lambda: measure(autoencoder_case("encode", 1024, "bf16"), 3)
    for size in (2048, 4096):
        for half in ("decode", "encode"):
            yield f"{half} {size}px", lambda half=half, size=size: measure(autoencoder_case(half, size, "bf16"), 1)
    for size in (512, 1024):
        yield f"picture sana-0.6b {size}px", lambda size=size: measure(picture_case("sana-0.6b", size, "bf16"), 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no case begins after this time")
    parser.add_argument("--case-minutes", type=float, default=2.5, help="a case that takes longer fails")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only cases with one of these words")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the results are written"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU; `python -m benchmarks.bench_models` runs on a CPU.")
    start = time.monotonic()
    report: Report = {**environment(), "cases": {}, "not run": {}, "failed": {}}
    for name, state, value in run_isolated(partial(chosen, args.only), 60 * args.minutes, 60 * args.case_minutes):
        report["cases" if state == "done" else state][name] = value
        path = write_results("gpu", report, args.results)
        print(f"{time.monotonic() - start:6.1f} s  {name}: {state}: {value}", flush=True)
    print(path, flush=True)


def chosen(words: list[str]) -> list[tuple[str, Callable[[], Report]]]:
    """The cases whose name has one of the words; without words, all."""
    return [(name, case) for name, case in cases() if not words or any(word in name for word in words)]


if __name__ == "__main__":
    main()
