"""Everything that only a GPU can tell, in one unattended run of a few minutes.

    python -m benchmarks.bench_gpu [--minutes 10] [--case-minutes 2.5] [--only WORD ...] [--results FOLDER]

First the cases that a default of this package depends on, each with that default in `decides`: a step of Sana-1.6B at
1024 px in every way to run it, 4-bit layers against the vendor's bf16 product, the same step in 4 bits, each kernel,
compiled models, 512 px. Then other sizes, the autoencoder, images per second beside a transformer of the size of
FLUX.1-dev with its autoencoder, whole images; FLUX at 4096 px and VILA-U last.

Random weights of the true sizes, bf16. `seconds` is what a caller waits; `gpu_seconds` and `launch_seconds` are the
GPU's and the host's shares of it (`gpu_timing.py`); `error` is relative to the same weights in fp32. The results are
written after every case to `FOLDER/<device>/gpu.json`; cases that failed, that took too long or that the time did not
allow are named there with the reason.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks import vila_u_gpu
from benchmarks.bench_models import autoencoder_case, image_case, measure, step_case
from benchmarks.gpu_timing import costs, error, in_fp32, rotating
from benchmarks.harness import RESULTS, alternate, copy_bandwidth, environment, write_results
from benchmarks.isolated import run_isolated
from benchmarks.kernel_benchmark import load, operations, run_on_gpu
from benchmarks.models import (
    AUTOENCODER,
    TINY_AUTOENCODER,
    TINY_GEMMA,
    TRANSFORMERS,
    random_model,
    step_inputs,
    twins,
)
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.pipelines.acceleration.cuda_graphs import CudaGraphs
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.api import quantize, set_compute_mode
from diffusers_sana.quantizers.svdquant.config import LayerConfig, SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.compute_mode import best_mode
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layer


STEPS = 20
MODES = ("w4a4", "w4a8", "w4a16")
Report = dict[str, Any]
Functions = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Scale:
    """Where the cases run, and whether at the true sizes or, for a dry run, at tiny ones.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tiny: sizes of a dry run.
    """

    device: str = "cuda"
    tiny: bool = False

    def model(self, name: str) -> str:
        """Name of the sizes of a transformer."""
        return "tiny" if self.tiny else name

    def number(self, wanted: int) -> int:
        """Pixels a side, tokens or channels."""
        return min(wanted, 64) if self.tiny else wanted

    def rounds(self, wanted: int) -> int:
        """Timed calls."""
        return 1 if self.tiny else wanted

    @property
    def compilation(self) -> dict[str, Any]:
        """Arguments of `torch.compile`; a dry run only traces."""
        return {"dynamic": False, "backend": "eager" if self.tiny else "inductor"}


def ceilings(scale: Scale) -> Report:
    """Bandwidth of a device copy and speed of a large matrix product: the limits of the rooflines."""
    side = scale.number(8192)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=scale.device) for _ in range(2))
    seconds = costs({"matmul": lambda: a @ b})["matmul"]["gpu_seconds"]
    return {
        "gigabytes_per_second": copy_bandwidth(scale.device, 2**20 if scale.tiny else 2**30) / 1e9,
        "teraflops": 2 * side**3 / seconds / 1e12,
    }


@torch.no_grad()
def compare(functions: Functions, baseline: str, reference: torch.Tensor, decides: str, rounds: int) -> Report:
    """Seconds that a caller waits, the shares of GPU and host, and errors, of ways to compute the same.

    Args:
        functions: called without arguments.
        baseline: what the others are so many times faster than.
        reference: the result in fp32.
        decides: which default follows from the fastest, and what it is now.
        rounds: timed calls of each.
    """
    errors = {name: error(function(), reference) for name, function in functions.items()}
    seconds = alternate(functions, rounds)
    return {
        "decides": decides,
        "fastest": min(seconds, key=seconds.__getitem__),
        "seconds": seconds,
        "speedup": {name: seconds[baseline] / value for name, value in seconds.items()},
        "error": errors,
        "costs": costs(functions, rounds=rounds, replays=["graph"]),
    }


class Step:
    """A guided step of Sana, ours and diffusers', on the same weights and inputs.

    Args:
        scale: where and how large.
        model: name of a transformer.
        size: pixels a side.
    """

    def __init__(self, scale: Scale, model: str, size: int) -> None:
        sizes = TRANSFORMERS[scale.model(model)]
        self.ours, self.theirs = twins("SanaTransformer2DModel", sizes, scale.device, torch.bfloat16)
        self.inputs = step_inputs(scale.number(size), scale.device, torch.bfloat16)

    def of_theirs(self) -> torch.Tensor:
        """diffusers' step."""
        return self.theirs(**self.inputs).sample

    @torch.no_grad()
    def of(self, transformer: Any, mode: str = "auto") -> Callable[[], torch.Tensor]:
        """A step of one of our transformers, whose text is done before, in a kernel mode."""
        text = transformer.encode_text(self.inputs["encoder_hidden_states"], self.inputs["encoder_attention_mask"])
        arguments = (self.inputs["hidden_states"], None, self.inputs["timestep"])

        def run() -> torch.Tensor:
            with kernel_mode(mode):
                return transformer(*arguments, text_context=text).sample

        return run

    @torch.no_grad()
    def replayed(self) -> Callable[[], torch.Tensor]:
        """Ours as one CUDA graph; without a GPU, ours."""
        inputs = self.inputs
        text = self.ours.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        arguments = {"hidden_states": inputs["hidden_states"], "timestep": inputs["timestep"]}
        arguments |= {"encoder_hidden_states": None, "text_context": text, "return_dict": False}
        if inputs["hidden_states"].is_cuda:
            return partial(CudaGraphs(self.ours), **arguments)
        return lambda: self.ours(**arguments)[0]

    @torch.no_grad()
    def reference(self) -> torch.Tensor:
        """The step in fp32, by diffusers."""
        return copy.deepcopy(self.theirs).float()(**in_fp32(self.inputs)).sample


def every_way(scale: Scale, model: str, size: int) -> Report:
    """A step without compilation: diffusers', ours in both kernel modes, ours as a CUDA graph."""
    step = Step(scale, model, size)
    functions: Functions = {
        "diffusers": step.of_theirs,
        "torch": step.of(step.ours, "torch"),
        "triton": step.of(step.ours),
        "graph": step.replayed(),
    }
    decides = "`enable_cuda_graphs` by default if `graph` is the fastest, now on; kernel mode `auto`, now Triton"
    report = compare(functions, "diffusers", step.reference(), decides, scale.rounds(5))
    with torch.no_grad():
        return report | {"graph_is_exact": torch.equal(functions["graph"](), functions["triton"]())}


def compiled_step(scale: Scale, model: str, size: int) -> Report:
    """A step of ours compiled block by block, and diffusers' compiled whole."""
    step = Step(scale, model, size)
    reference = step.reference()
    step.ours.compile_repeated_blocks(fullgraph=True, **scale.compilation)
    theirs = torch.compile(step.theirs, **scale.compilation)
    functions: Functions = {"diffusers": lambda: theirs(**step.inputs).sample, "compiled": step.of(step.ours)}
    decides = (
        "what the docs advise on `torch.compile`; compare with `triton` and `graph` of the case that is not compiled"
    )
    return compare(functions, "diffusers", reference, decides, scale.rounds(5))


def quantized_step(scale: Scale, model: str, size: int, precision: str) -> Report:
    """A step in bf16 and in 4 bits, in every compute mode of one quantized model."""
    step = Step(scale, model, size)
    functions: Functions = {"diffusers bf16": step.of_theirs, "bf16": step.of(step.ours)}
    quantized = copy.deepcopy(step.ours)
    quantize(quantized, SVDQuantConfig(precision, smoothing="none"), progress=False)
    for mode in MODES:
        alike = copy.deepcopy(quantized)
        set_compute_mode(alike, mode)
        functions[mode] = step.of(alike)
    return compare(functions, "bf16", step.reference(), decides_mode(scale, precision), scale.rounds(3))


def quantized_linear(scale: Scale, tokens: int, in_features: int, out_features: int, precision: str) -> Report:
    """One layer in every compute mode against the vendor's bf16 product, over several weights."""
    shape = [scale.number(size) for size in (out_features, in_features)]
    options = LayerConfig(precision=precision, smoothing="none")
    dense = nn.Linear(shape[1], shape[0], device=scale.device, dtype=torch.bfloat16)
    layer = quantized_layer(dense, decompose([dense.weight.detach()], options)[0][0])

    def make() -> dict[str, Any]:
        """A set of inputs, with a copy of the weights, which together exceed the cache."""
        layers = {mode: copy.deepcopy(layer) for mode in MODES}
        for mode, alike in layers.items():
            alike.set_compute_mode(mode)
        x = torch.randn(scale.number(tokens), shape[1], device=scale.device, dtype=torch.bfloat16)
        return {"x": x, "layers": layers | {"bf16": copy.deepcopy(dense)}}

    def run(name: str, x: torch.Tensor, layers: dict[str, nn.Module]) -> torch.Tensor:
        return layers[name](x)

    inputs = rotating(make)
    functions = {name: partial(run, name) for name in ("bf16", *MODES)}
    with torch.no_grad():
        reference = copy.deepcopy(dense).float()(inputs[0]["x"].float())
        errors = {name: error(function(**inputs[0]), reference) for name, function in functions.items()}
    row = costs(functions, inputs, scale.rounds(10))
    seconds = {name: value["gpu_seconds"] for name, value in row.items()}
    return {
        "decides": decides_mode(scale, precision),
        "fastest": min(seconds, key=seconds.__getitem__),
        "faster_than_bf16": {name: seconds["bf16"] / value for name, value in seconds.items()},
        "error": errors,
        "costs": row,
    }


def decides_mode(scale: Scale, precision: str) -> str:
    """What the fastest of the compute modes decides."""
    return f"`compute_mode='auto'` of {precision} on this GPU, now {best_mode(torch.device(scale.device), precision)}"


def sana_throughput(scale: Scale, size: int) -> Report:
    """Images per second of Sana-0.6B: 20 guided steps and one decoding, one image at a time."""
    step = measure_ours(steps(scale, "sana-0.6b", size))
    decode = measure_ours(autoencoder(scale, "decode", size))
    return {"step": step, "decode": decode, "images_per_second": 1 / (STEPS * step + decode)}


def measure_ours(functions: Functions) -> float:
    """Median seconds of our half of a case."""
    with torch.no_grad():
        return alternate({"ours": functions["diffusers_sana"]}, rounds=3)["ours"]


def steps(scale: Scale, model: str, size: int) -> Functions:
    """A step of both classes."""
    return step_case(scale.model(model), scale.number(size), "bf16", device=scale.device)


def autoencoder(scale: Scale, half: str, size: int) -> Functions:
    """Encoding or decoding by both classes."""
    config = TINY_AUTOENCODER if scale.tiny else AUTOENCODER
    return autoencoder_case(half, scale.number(size), "bf16", config, scale.device)


def flux_throughput(scale: Scale, size: int) -> Report:
    """Images per second of a FLUX.1-dev-size transformer (12 B, guidance as an input) and its f8 autoencoder."""
    size = scale.number(size)
    side = size // 16  # latents of 8 pixels, packed two by two
    widths = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    options: dict[str, Any] = widths if scale.tiny else {}
    model = random_model(
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True, **options), scale.device, torch.bfloat16
    )

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=scale.device, dtype=torch.bfloat16)

    inputs = {
        "hidden_states": random(1, side * side, 64),
        "encoder_hidden_states": random(1, 512, model.config.joint_attention_dim),
        "pooled_projections": random(1, model.config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=scale.device, dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device=scale.device),
        "img_ids": torch.zeros(side * side, 3, device=scale.device),
        "txt_ids": torch.zeros(512, 3, device=scale.device),
    }
    with torch.no_grad():
        step = alternate({"step": partial(model, **inputs)}, rounds=2)["step"]
        vae = random_model(partial(flux_autoencoder, 32 if scale.tiny else 1), scale.device, torch.bfloat16)
        vae.enable_tiling()
        latents = random(1, 16, size // 8, size // 8)
        decode = alternate({"decode": lambda: vae.decode(latents).sample}, rounds=1)["decode"]
    return {"step": step, "decode": decode, "images_per_second": 1 / (STEPS * step + decode)}


def flux_autoencoder(narrower: int = 1) -> diffusers.AutoencoderKL:
    """The f8c16 autoencoder of FLUX.1-dev, or one so many times narrower."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // narrower for width in (128, 256, 512, 512)),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=max(1, 32 // narrower),
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def compiled_decode(scale: Scale, size: int) -> Functions:
    """Both decoders compiled."""
    config, side = TINY_AUTOENCODER if scale.tiny else AUTOENCODER, scale.number(size) // 32
    ours, theirs = twins("AutoencoderDC", config, scale.device, torch.bfloat16)
    z = torch.randn(1, 32, side, side, device=scale.device, dtype=torch.bfloat16)
    for model in (ours, theirs):
        model.decoder = torch.compile(model.decoder, **scale.compilation)
    return {name: (lambda m=m: m.decode(z).sample) for name, m in (("diffusers", theirs), ("diffusers_sana", ours))}


def images(scale: Scale, size: int) -> Functions:
    """Whole images by both pipelines."""
    parts = {"text_encoder": TINY_GEMMA, "autoencoder": TINY_AUTOENCODER} if scale.tiny else {}
    return image_case(scale.model("sana-0.6b"), scale.number(size), "bf16", device=scale.device, **parts)


def cases(scale: Scale = Scale()) -> Iterator[tuple[str, Callable[[], Report]]]:
    """Name and function of every case, those that decide a default first."""

    def measured(make: Callable[..., Functions], rounds: int, *arguments: Any) -> Callable[[], Report]:
        return lambda: measure(make(scale, *arguments), scale.rounds(rounds))

    yield "ceilings", partial(ceilings, scale)
    yield "ways sana-1.6b 1024px", partial(every_way, scale, "sana-1.6b", 1024)
    shapes = {"flux": (4608, 3072, 12288), "sana-1.6b": (2048, 2240, 2240), "sana-1.6b ff": (2048, 2240, 11200)}
    for name, shape in shapes.items():
        yield f"linear {name} {'x'.join(map(str, shape))} int4", partial(quantized_linear, scale, *shape, "int4")
    yield "step sana-1.6b 1024px int4", partial(quantized_step, scale, "sana-1.6b", 1024, "int4")
    for operation in operations():
        yield f"kernel {operation}", partial(kernel, scale, operation)
    yield "ways sana-0.6b 512px", partial(every_way, scale, "sana-0.6b", 512)
    yield "ways sana-1.6b 1024px compiled", partial(compiled_step, scale, "sana-1.6b", 1024)
    yield "decode 1024px", measured(autoencoder, 3, "decode", 1024)
    for name, shape in shapes.items():
        yield f"linear {name} {'x'.join(map(str, shape))} nvfp4", partial(quantized_linear, scale, *shape, "nvfp4")
    yield "step sana-1.6b 1024px nvfp4", partial(quantized_step, scale, "sana-1.6b", 1024, "nvfp4")
    for model in ("sana-0.6b", "sana-1.6b"):
        for size in (512, 1024, 2048, 4096):
            yield f"step {model} {size}px", measured(steps, 3 if size < 4096 else 1, model, size)
    yield "decode 1024px compiled", measured(compiled_decode, 3, 1024)
    yield "encode 1024px", measured(autoencoder, 3, "encode", 1024)
    for size in (512, 1024):
        yield f"image sana-0.6b {size}px", measured(images, 2, size)
    for size in (1024, 4096):
        yield f"throughput sana-0.6b {size}px", partial(sana_throughput, scale, size)
    yield "throughput flux 1024px", partial(flux_throughput, scale, 1024)
    for size in (2048, 4096):
        for half in ("decode", "encode"):
            yield f"{half} {size}px", measured(autoencoder, 1, half, size)
    yield "throughput flux 4096px", partial(flux_throughput, scale, 4096)
    yield from vila_u_gpu.cases(scale.device)


def kernel(scale: Scale, operation: str) -> Report:
    """One operation of `kernels/` at the shapes of the models."""
    return run_on_gpu(load(operation), scale.rounds(20), with_compiled=False, device=scale.device, tiny=scale.tiny)


def main(
    argv: list[str] | None = None, make_cases: Callable[[], Iterator[tuple[str, Callable[[], Report]]]] = cases
) -> None:
    """The command line; tests give other cases, as a function at the top of a module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no case begins or goes on after this time")
    parser.add_argument("--case-minutes", type=float, default=2.5, help="a case that takes longer fails")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only cases with one of these words")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the results are written"
    )
    args = parser.parse_args(argv)
    if make_cases is cases and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU; `python -m benchmarks.bench_models` runs on a CPU.")
    start = time.monotonic()
    report: Report = {**environment(), "cases": {}, "not run": {}, "failed": {}}
    chosen_cases = partial(chosen, make_cases, args.only)
    for name, state, value in run_isolated(chosen_cases, 60 * args.minutes, 60 * args.case_minutes):
        report["cases" if state == "done" else state][name] = value
        path = write_results("gpu", report, args.results)
        print(f"{time.monotonic() - start:6.1f} s  {name}: {state}: {value}", flush=True)
    print(path, flush=True)


def chosen(
    make_cases: Callable[[], Iterator[tuple[str, Callable[[], Report]]]], words: list[str]
) -> list[tuple[str, Callable[[], Report]]]:
    """The cases whose name has one of the words; without words, all."""
    return [(name, case) for name, case in make_cases() if not words or any(word in name for word in words)]


if __name__ == "__main__":
    main()
