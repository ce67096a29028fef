"""Sana-0.6B and DC-AE on a CPU beside OpenVINO, ONNX Runtime, SDNQ and torch.compile: seconds, memory, error.

    pip install openvino nncf onnxruntime onnx onnxscript sdnq
    python -m benchmarks.bench_rivals [--cases NAME ...] [--rounds 3]

Everyone has the same random weights, with outliers in 1 % of the input channels, and one guided step or one decoding
to do. All that loaded take turns in one process. Whoever is not installed or fails is named in the results with the
reason. A method's own way to choose and calibrate is kept: OpenVINO's full INT8 is calibrated on two other inputs, its
weight compression and the rest see no data. Writes `benchmarks/results/cpu/rivals.json`, case by case; on a CPU with
instructions for bf16 the file is named after them.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, alternating_times, environment, named_by_processor, write_results
from benchmarks.models import AUTOENCODER, TRANSFORMERS, step_inputs, twins
from benchmarks.quantized import add_outliers
from diffusers_sana import quantize
from diffusers_sana._compat import version_of
from diffusers_sana.evaluation.machine import peak_memory
from diffusers_sana.quantizers.svdquant.api import set_compute_mode
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig


PACKAGES = ("openvino", "nncf", "onnxruntime", "sdnq")
STEPS = {"step 512px": ("sana-0.6b", 512, 8), "step 1024px": ("sana-0.6b", 1024, 4)}  # sizes, side, blocks
Run = Callable[[], Any]


class Step(nn.Module):
    """diffusers' transformer with positional inputs and one output, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        return self.model(latents, text, timestep, encoder_attention_mask=mask, return_dict=False)[0]


class Decoder(nn.Module):
    """diffusers' autoencoder, latents to pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents, return_dict=False)[0]


def openvino_run(model: nn.Module, inputs: tuple[Tensor, ...], kind: str) -> Run:
    """The model in OpenVINO, in "fp32", "bf16" (a hint), "int8 weights", "int4 weights", or "int8" throughout."""
    import openvino

    converted = openvino.convert_model(model, example_input=inputs, input=[list(x.shape) for x in inputs])
    arrays = [x.numpy() for x in inputs]
    if kind.endswith("weights"):
        import nncf

        modes = {"int8 weights": {"mode": nncf.CompressWeightsMode.INT8_ASYM}}
        modes["int4 weights"] = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64, "all_layers": True}
        converted = nncf.compress_weights(converted, **modes[kind])
    elif kind == "int8":
        import nncf

        generator = torch.Generator().manual_seed(1)
        others = [[torch.randn(arrays[0].shape, generator=generator).numpy(), *arrays[1:]] for _ in range(2)]
        converted = nncf.quantize(
            converted, nncf.Dataset(others), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(others)
        )
    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_PRECISION_HINT"] = "bf16" if kind == "bf16" else "f32"
    compiled = openvino.compile_model(converted, "CPU", hints)
    return lambda: torch.from_numpy(compiled(arrays)[0].copy())


def onnxruntime_run(model: nn.Module, inputs: tuple[Tensor, ...], kind: str) -> Run:
    """The model in ONNX Runtime: "fp32", or "int8" by its dynamic quantization."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(model, inputs, path, dynamo=True, external_data=True, verbose=False)
        if kind == "int8":
            quantize_dynamic(path, Path(folder, "int8.onnx"), weight_type=QuantType.QInt8, per_channel=True)
            path = Path(folder, "int8.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])


def sdnq_run(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Run:
    """The model quantized by SDNQ, whose matrix products are OpenVINO's where that is installed."""
    from sdnq import sdnq_post_load_quant

    quantized = sdnq_post_load_quant(copy.deepcopy(model), quant_conv=True, **options)
    quantized = quantized[0] if isinstance(quantized, tuple) else quantized
    return lambda: quantized(*inputs)


def rivals(model: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Name, and what makes a function of no arguments."""
    yield "diffusers", lambda: lambda: model(*inputs)
    compiled = torch.compile(model, dynamic=False)
    yield "diffusers, torch.compile", lambda: lambda: compiled(*inputs)
    for kind in ("fp32", "bf16", "int8 weights", "int4 weights", "int8"):
        yield f"openvino {kind}", lambda kind=kind: openvino_run(model, inputs, kind)
    for kind in ("fp32", "int8"):
        yield f"onnxruntime {kind}", lambda kind=kind: onnxruntime_run(model, inputs, kind)
    yield "sdnq int8", lambda: sdnq_run(model, inputs, weights_dtype="int8", use_quantized_matmul=True)
    yield "sdnq int4 + svd", lambda: sdnq_run(model, inputs, weights_dtype="int4", use_svd=True)


def step_case(model: str, size: int, num_layers: int) -> tuple[dict[str, Callable[[], Run]], str]:
    """Everyone's guided step, and the name of the one that is exact."""
    config = TRANSFORMERS[model] | {"num_layers": num_layers}
    ours, theirs = twins("SanaTransformer2DModel", config, "cpu", torch.float32)
    add_outliers(theirs)
    inputs = tuple(step_inputs(size, "cpu", torch.float32).values())
    latents, text, timestep, mask = inputs

    def our_run(precision: str | None = None, mode: str = "", compiled: bool = False) -> Run:
        mine = copy.deepcopy(ours)
        if precision is not None:
            quantize(mine, SVDQuantConfig(precision=precision), progress=False)
            set_compute_mode(mine, mode)
        context = mine.encode_text(text, mask)
        if compiled:
            mine.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return lambda: mine(latents, None, timestep, text_context=context).sample

    functions = dict(rivals(Step(theirs), inputs))
    functions["diffusers_sana"] = our_run
    functions["diffusers_sana, compiled"] = lambda: our_run(compiled=True)
    functions["diffusers_sana int4 w4a8"] = lambda: our_run("int4", "w4a8")
    functions["diffusers_sana int4 w4a8, compiled"] = lambda: our_run("int4", "w4a8", compiled=True)
    functions["diffusers_sana int8 w8a8"] = lambda: our_run("int8", "w8a8")
    return functions, "diffusers"


def decode_case(size: int, config: dict[str, Any] = AUTOENCODER) -> tuple[dict[str, Callable[[], Run]], str]:
    """Everyone's decoding of one image; nobody is quantized."""
    ours, theirs = twins("AutoencoderDC", config, "cpu", torch.float32)
    torch.manual_seed(0)
    latents = torch.randn(1, 32, size // 32, size // 32)
    functions = dict(rivals(Decoder(theirs), (latents,)))
    functions = {
        name: run for name, run in functions.items() if "int" not in name and not name.endswith("torch.compile")
    }
    functions["diffusers_sana"] = lambda: lambda: ours.decode(latents, return_dict=False)[0]
    return functions, "diffusers"


CASES: dict[str, Callable[[], tuple[dict[str, Callable[[], Run]], str]]] = {
    **{name: (lambda sizes=sizes: step_case(*sizes)) for name, sizes in STEPS.items()},
    "decode 512px": lambda: decode_case(512),
}


def measure(makers: dict[str, Callable[[], Run]], exact: str, rounds: int) -> dict[str, Any]:
    """Median seconds and peak memory of a call of each, relative error to the exact one, and who failed.

    Memory is what the first call needs beyond the loaded model, and, where it compiles, the second.
    """
    functions, outputs, failed = {}, {}, {}
    memory: dict[str, float | None] = {}
    for name, make in makers.items():
        try:
            run = make()
            if "compile" in name:
                run()
            with peak_memory() as peak:
                outputs[name] = run().float()
        except Exception as error:  # of other packages
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            continue
        functions[name], memory[name] = run, peak.get("mib")
        print(name, "is ready", flush=True)
    seconds = {
        name: statistics.median(values) for name, values in alternating_times(functions, rounds, warmup=0).items()
    }
    reference = outputs[exact].double()
    return {
        "rounds": rounds,
        "seconds": seconds,
        "peak_mib": memory,
        "error": {
            name: ((out.double() - reference).norm() / reference.norm()).item() for name, out in outputs.items()
        },
        "failed": failed,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # it would compile for minutes
    name_of_file = named_by_processor("rivals")
    path = args.results / "cpu" / f"{name_of_file}.json"
    report: dict[str, Any] = environment()
    report["versions"] |= {name: version_of(name) for name in PACKAGES}
    report["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    with torch.no_grad():
        for name in args.cases:
            report["cases"][name] = measure(*CASES[name](), args.rounds)
            print(name, json.dumps(report["cases"][name], indent=1), flush=True)
            write_results(name_of_file, report, args.results)


if __name__ == "__main__":
    main()
