"""Sana-0.6B in 4 bits beside 16 bits and other quantizers: seconds a step, bytes, errors, time to quantize.

    python -m benchmarks.bench_quantized [--only errors steps whole layer] [--rounds 1]

Random weights of the true sizes, with outliers in 1 % of the input channels of every layer (for the errors PyTorch's
own initialization, elsewhere Gaussian). Other quantizers run if
they are installed (`pip install --no-deps sdnq optimum-quanto torchao`), eagerly, with their own choice of layers and
their 1x1 convolutions. Writes `benchmarks/results/<device>/quantized.json`.

    errors   the first 8 blocks, 512 px, calibrated on one input and measured on another, against fp32
    steps    the first blocks, one guided step, every method in turn
    whole    all 28 blocks: time to quantize without data, bytes in memory and on disk
    layer    one expanding layer of the MLP in every mode, eager and compiled; in `quantized_layer.json`
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

import diffusers_sana
from benchmarks.harness import RESULTS, alternating_times, environment, write_results
from benchmarks.models import MAX_TOKENS, TEXT_WIDTH, TRANSFORMERS, step_inputs, twins
from benchmarks.quantized import (
    PEERS,
    add_outliers,
    config_for,
    quantize_on,
    resident_bytes,
    tensor_bytes,
    with_peer,
)
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.api import quantize, set_compute_mode
from diffusers_sana.quantizers.svdquant.config import RANKS, LayerConfig, SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("w4a4", "w4a8", "w4a16")


class ErrorCase(NamedTuple):
    precision: str
    method: str
    calibrated: bool


ERROR_CASES = [
    ErrorCase("int4", "naive", calibrated=False),
    ErrorCase("int4", "smoothing only", calibrated=True),
    ErrorCase("int4", "low rank only", calibrated=False),
    ErrorCase("int4", "svdquant", calibrated=False),
    ErrorCase("int4", "svdquant", calibrated=True),
    ErrorCase("int4", "svdquant + gptq", calibrated=True),
    ErrorCase("nvfp4", "naive", calibrated=False),
    ErrorCase("nvfp4", "svdquant", calibrated=True),
]
TIMED_PEERS = ("quanto int4", "sdnq int4 + svd", "torchao int4")
LAYER = (512, 1152, 5760)  # tokens of a guided step at 512 px, input and output features
STEPS = {"512px": (512, 8), "1024px": (1024, 4)}  # side, blocks


def models(num_layers: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Ours and diffusers' over the same weights, with outliers."""
    ours, theirs = twins(
        "SanaTransformer2DModel", TRANSFORMERS["sana-0.6b"] | {"num_layers": num_layers}, DEVICE, dtype
    )
    add_outliers(theirs)
    return ours, theirs


def relative_error(model: nn.Module, inputs: dict[str, Any], reference: torch.Tensor) -> float:
    """Of the output, against fp32."""
    out = model(**inputs).sample.float()
    return ((out - reference).norm() / reference.norm()).item()


def errors() -> dict[str, Any]:
    """Relative output error of each method at the model's level."""
    torch.manual_seed(0)
    ours = diffusers_sana.SanaTransformer2DModel(**TRANSFORMERS["sana-0.6b"] | {"num_layers": 8}).eval()
    add_outliers(ours)

    def inputs(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        latents, text = torch.randn(2, 32, 16, 16), torch.randn(2, MAX_TOKENS, TEXT_WIDTH)
        return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.full((2,), 500.0)}

    reference = ours(**inputs(2)).sample
    half = {key: value.bfloat16() for key, value in inputs(2).items()}
    rows: dict[str, Any] = {}
    for precision, name, calibrated in ERROR_CASES:
        model = copy.deepcopy(ours)
        if calibrated:
            quantize_on(model, config_for(name, precision), partial(model, **inputs(1)))
        else:
            quantize(model, config_for(name, precision), progress=False)
        for mode in MODES:
            set_compute_mode(model, mode)
            case = f"{precision} {name}, {'calibrated' if calibrated else 'no data'}, {mode}"
            rows[case] = relative_error(model, inputs(2), reference)
            print(case, rows[case], flush=True)
    theirs = diffusers.SanaTransformer2DModel(**TRANSFORMERS["sana-0.6b"] | {"num_layers": 8}).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.to(torch.bfloat16)
    rows["diffusers bf16"] = relative_error(theirs, half, reference)
    for name in PEERS:
        peer = with_peer(theirs, name, half)
        rows[name] = peer if isinstance(peer, str) else relative_error(peer, half, reference)
        print(name, rows[name], flush=True)
    return rows


def step_case(size: int, num_layers: int, rounds: int) -> dict[str, Any]:
    """Seconds of a guided step of every method, in turn, and how many times faster than diffusers' bf16 it is."""
    ours, theirs = models(num_layers, torch.bfloat16)
    inputs = step_inputs(size, DEVICE, torch.bfloat16)
    single = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in inputs.items()}
    single_model = copy.deepcopy(theirs).float()
    quantized = {mode: copy.deepcopy(ours) for mode in ("w4a8", "w4a16")}
    for mode, model in quantized.items():
        quantize(model, SVDQuantConfig(smoothing="none"), progress=False)  # as fast as with smoothing
        set_compute_mode(model, mode)

    def our_step(model: Any) -> Callable[[], Any]:
        text = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        return lambda: model(inputs["hidden_states"], None, inputs["timestep"], text_context=text)

    functions: dict[str, Callable[[], Any]] = {
        "diffusers bf16": lambda: theirs(**inputs),
        "diffusers fp32": lambda: single_model(**single),
        "diffusers_sana bf16": our_step(ours),
        **{f"diffusers_sana int4 {mode}": our_step(model) for mode, model in quantized.items()},
    }
    failed: dict[str, str] = {}
    for name in TIMED_PEERS:
        peer = with_peer(theirs, name, inputs)
        if isinstance(peer, str):
            failed[name] = peer
        else:
            functions[name] = partial(peer, **inputs)
    times = alternating_times(functions, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "blocks": num_layers,
        "rounds": rounds,
        "seconds": median,
        "faster_than_diffusers_bf16": {name: median["diffusers bf16"] / value for name, value in median.items()},
        "failed": failed,
    }


def whole() -> dict[str, Any]:
    """The whole model, without data."""
    ours, _ = models(28, torch.bfloat16)
    facts: dict[str, Any] = {"bf16_bytes": tensor_bytes(ours)}
    for precision in ("int4", "nvfp4"):
        model = copy.deepcopy(ours)
        start = time.perf_counter()
        diffusers_sana.quantize(model, SVDQuantConfig(precision=precision), progress=False)
        row: dict[str, Any] = {"quantize_seconds": time.perf_counter() - start, "bytes": tensor_bytes(model)}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            row["disk_bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
        set_compute_mode(model, "w4a8")
        with torch.no_grad():
            model(**step_inputs(512, DEVICE, torch.bfloat16))
        row["w4a8_resident_bytes"] = resident_bytes(model)
        row["share_of_bf16"] = row["bytes"] / facts["bf16_bytes"]
        facts[precision] = row
        print(precision, row, flush=True)
    return facts


def layer(rounds: int) -> dict[str, Any]:
    """Processor time of one layer in every mode, eager and compiled, in turn; other jobs hardly change it."""
    tokens, features, outputs = LAYER
    torch.manual_seed(0)
    weight = torch.randn(outputs, features).bfloat16()
    x, bias = torch.randn(tokens, features).bfloat16(), torch.zeros(outputs, dtype=torch.bfloat16)
    functions: dict[str, Callable[[], Any]] = {}
    for precision, modes in (("int4", ("w4a8", "w4a16")), ("int8", ("w8a8", "w8a16"))):
        config = LayerConfig(precision, RANKS[precision], smoothing="none", refinements=0)
        (item,), _ = decompose([weight], config)
        for mode in modes:
            name, eager = f"{precision} {mode}", SVDQuantLinear(item, bias, mode)
            compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, dynamic=False)
            functions |= {f"{name} eager": partial(eager, x), f"{name} compiled": partial(compiled, x)}
    times = alternating_times(functions, rounds, clock=time.process_time)
    return {
        "tokens": tokens,
        "input_features": features,
        "output_features": outputs,
        "rounds": rounds,
        "processor_seconds": {name: statistics.median(values) for name, values in times.items()},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("errors", "steps", "whole", "layer")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    path = args.results / DEVICE / "quantized.json"
    report = environment()
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8")) | report

    def steps() -> dict[str, Any]:
        return {case: step_case(*sizes, args.rounds) for case, sizes in STEPS.items()}

    for kind, run in (("errors", errors), ("steps", steps), ("whole", whole)):
        if kind in args.only:
            with torch.no_grad():
                report[kind] = run()
            print(kind, json.dumps(report[kind], indent=1), flush=True)
            write_results("quantized", report, args.results)
    if "layer" in args.only:
        with torch.no_grad():
            facts = layer(args.rounds)
        print(write_results("quantized_layer", environment() | facts, args.results))


if __name__ == "__main__":
    main()
