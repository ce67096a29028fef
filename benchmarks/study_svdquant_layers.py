"""Single layers in 4 bits: errors of SVDQuant on kinds of layers for which those of deepcompressor's code are known.

    python -m benchmarks.study_svdquant_layers [--seeds 0 1 2]

Four kinds of a random layer: a Gaussian weight with a low-rank part and a few elements of eight times their size, and
correlated inputs, with outliers in some channels. The error is that of the output for held-out inputs, relative to the
output. Each layer is fitted for the mode in which it computes; "fitted for w4a8" computes in all modes as it is.

deepcompressor's figures were measured with its own code on the same layers of seed 0 (int4, rank 32; 512 of the
calibration rows, a grid of 8, at most 40 iterations, no GPTQ). For other seeds, "published algorithm" has the figures
of `published`, which follows the same description with all calibration rows. Writes
`benchmarks/results/<device>/svdquant_layers.json`, layer by layer; a later run adds to it.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose, fit_weight, relative_error
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.config import LayerConfig, SVDQuantConfig


MODES = ("w4a4", "w4a16")  # those for which deepcompressor's figures are known
DEEPCOMPRESSOR = {  # measured with deepcompressor itself, at seed 0
    "attention": {"w4a4": 0.0398, "w4a16": 0.0262},
    "glu": {"w4a4": 0.0656, "w4a16": 0.0341},
    "text": {"w4a4": 0.0119, "w4a16": 0.0079},
    "plain": {"w4a4": 0.1038, "w4a16": 0.0663},
}
SHAPES = {"attention": (384, 384), "glu": (600, 320), "text": (384, 512), "plain": (384, 384)}  # K, N
ROWS = 2048
VARIANTS: dict[str, dict[str, Any]] = {
    "no data": {},
    "calibrated": {},
    "calibrated, best, no rotation": {"quality": "best", "rotation": "none"},
    "calibrated, best": {"quality": "best"},
}


class Layer(NamedTuple):
    """A weight `[N, K]` in bf16, and inputs `[ROWS, K]` for calibration and for the measurement."""

    weight: Tensor
    calibration: Tensor
    held_out: Tensor


def make_layer(kind: str, seed: int) -> Layer:
    """A random layer of a kind, and its inputs."""
    inputs, outputs = SHAPES[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = normal(inputs, inputs // 8) / math.sqrt(inputs // 8)
    sizes = torch.exp(0.5 * normal(inputs))
    order = torch.randperm(inputs, generator=generator)

    weight = normal(outputs, inputs) / math.sqrt(inputs)
    weight = weight * torch.exp(0.3 * normal(outputs, 1)) * torch.exp(0.2 * normal(1, inputs))
    weight += 0.6 * normal(outputs, 8) @ normal(8, inputs) / math.sqrt(inputs) / math.sqrt(8)
    count = weight.numel() // 2000
    rows = torch.randint(outputs, (count,), generator=generator)
    columns = torch.randint(inputs, (count,), generator=generator)
    weight[rows, columns] *= 8

    def activations() -> Tensor:
        x = 0.7 * normal(ROWS, inputs // 8) @ directions.t() + 0.7 * normal(ROWS, inputs)
        if kind == "plain":
            return x
        x = x * sizes
        if kind == "attention":
            x[:, order[: inputs // 100]] *= 20
        elif kind == "glu":
            x = x * F.silu(2 * normal(ROWS, inputs))
            x[:, order[:5]] *= 15
        else:
            x[:, order[:2]] *= 300
            x[:, order[2:8]] *= 25
        return x

    return Layer(weight.bfloat16(), activations(), activations())


def published(layer: Layer, mode: str, grid: int = 8, iterations: int = 40) -> QuantizedWeight:
    """SVDQuant as its authors published it: every candidate of a grid with one SVD, then refits while it improves."""
    weight, rows = layer.weight.float(), layer.calibration
    smallest = LayerConfig(refinements=0, mode=mode)
    spans = [tensor.abs().amax(0) for tensor in (rows, weight)]
    exponents = [(0.0, 0.0), *((i / grid, b) for i in range(1, grid) for b in (0.0, 1 - i / grid))]
    scores = {}
    for a, b in exponents:
        smooth = (spans[0] ** a / spans[1] ** b).bfloat16().float()
        item = fit_weight(weight, smooth, torch.bfloat16, smallest)
        scores[relative_error(item, weight, rows, mode)] = smooth
    smooth = scores[min(scores)]
    best, found = math.inf, fit_weight(weight, smooth, torch.bfloat16, smallest)
    item = found
    for _ in range(iterations):
        error = relative_error(item, weight, rows, mode)
        if error > best:
            break
        best, found = error, item
        rest = (weight * smooth - item.residual()).double()
        left, values, right = torch.linalg.svd(rest, full_matrices=False)
        up, down = (left[:, :32] * values[:32]).bfloat16(), (right[:32] / smooth).bfloat16()
        residual = weight * smooth - up.float() @ (down.float() * smooth)
        plain = fit_weight(residual / smooth, smooth, torch.bfloat16, LayerConfig(rank=0, mode=mode))
        item = QuantizedWeight(plain.qweight, plain.wscales, None, plain.smooth_factor, down, up)
    return found


def measure(layer: Layer, variant: str, seed: int) -> dict[str, Any]:
    """Errors of a variant: for each mode of a layer that was fitted for it, and of all modes of the usual layer."""
    x = layer.calibration
    data = {} if variant == "no data" else {"inputs": x, "largest": x.abs().amax(0), "hessian": x.t() @ x}
    facts: dict[str, Any] = {}
    for mode in (*MODES, *(["w4a8"] if variant == "calibrated" else [])):
        config = SVDQuantConfig(compute_mode=mode, seed=seed, **VARIANTS[variant]).for_layer("w4a4")
        start = time.perf_counter()
        (item,), (report,) = decompose([layer.weight], config, **data)
        facts[mode] = {
            "error": held_out_error(layer, item, mode),
            "exponents": report.exponents,
            "gptq": report.gptq,
            "rotated": report.rotated,
            "seconds": time.perf_counter() - start,
        }
        if mode == "w4a8":
            facts["fitted for w4a8"] = {other: held_out_error(layer, item, other) for other in (*MODES, mode)}
    return facts


def held_out_error(layer: Layer, item: QuantizedWeight, mode: str) -> float:
    """The relative error of the output."""
    return relative_error(item, layer.weight.float(), layer.held_out, mode)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    path = args.results / "cpu" / "svdquant_layers.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    cases: dict[str, Any] = earlier["cases"]
    report = {**environment(), "deepcompressor": DEEPCOMPRESSOR, "cases": cases}
    if "command" in earlier:
        report["command"] = f"{earlier['command']}; {report['command']}"
    for seed in args.seeds:
        for kind in args.kinds:
            layer = make_layer(kind, seed)
            case = cases.setdefault(f"{kind}, seed {seed}", {})
            if "published algorithm" not in case:
                items = {mode: published(layer, mode) for mode in MODES}
                case["published algorithm"] = {mode: held_out_error(layer, item, mode) for mode, item in items.items()}
            for variant in args.variants:
                case[variant] = measure(layer, variant, seed)
            print(kind, seed, json.dumps(case), flush=True)
            write_results("svdquant_layers", report, args.results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
