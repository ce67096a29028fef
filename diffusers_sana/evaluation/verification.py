"""Proof on the user's own machine: a checkpoint run with diffusers' classes and with ours, from the same seeds.

    report = verify("sana-emoji")
    print(summary(report))

Both sides load the checkpoint one after the other, so that each has the memory to itself.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffusers_sana import SVDQuantConfig
from diffusers_sana import quantize as quantize_pipeline
from diffusers_sana.arguments import find_device
from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_SPRINT
from diffusers_sana.checks import check_integer
from diffusers_sana.evaluation.kernel_checks import checked_kernels, relative_error
from diffusers_sana.evaluation.machine import device_name, peak_memory, synchronize, versions
from diffusers_sana.evaluation.report import table
from diffusers_sana.evaluation.similarity import psnr
from diffusers_sana.kernels.dispatch import current_kernel_mode
from diffusers_sana.kernels.external import products_described
from diffusers_sana.loading import checkpoint_path, find_pipeline_class, pipeline_class_name, sprint_components
from diffusers_sana.quantizers.svdquant.layers.compute_mode import best_mode


PIPELINES = ("SanaPipeline", "SanaSprintPipeline")  # that both packages have
FORWARD_LIMIT = 1e-5  # fp32, equal weights, another order of summation
LATENTS_LIMIT = 1e-3  # the same after all steps, each of which amplifies what the one before differed by
HALF_FACTOR = 1.1  # half precision: error to fp32 over that of diffusers' classes in the same dtype
OVERFLOW_FLOAT16 = ("text_encoder", "vae")  # our pipelines keep these in bfloat16, diffusers' cards say to


@dataclass
class Side:
    """What one package makes of the checkpoint; tensors are on the CPU.

    Attributes:
        forward: output of the transformer for the first inputs that diffusers' pipeline gave to it.
        latents, images: of each seed; images in [0, 1].
        step_seconds: of the steps of all images but the first.
        image_seconds: of all images.
        peak_mib: of loading and generating, weights included; None where it cannot be measured.
        weight_bytes: of the transformer.
    """

    forward: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    image_seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    weight_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """Time and memory, for JSON. The first image, which also warms up, is listed separately."""
        return {
            "seconds_per_step": statistics.median(self.step_seconds),
            "seconds_per_image": statistics.median(self.image_seconds[1:]),
            "seconds_of_first_image": self.image_seconds[0],
            "peak_mib": self.peak_mib,
            "transformer_bytes": self.weight_bytes,
        }


def verify(
    model: str,
    *,
    quantize: str | None = None,
    prompt: str = "an apple on a blue background",
    num_images: int = 3,
    steps: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Runs a Sana or SANA-Sprint with diffusers' classes and with ours, and compares what they compute and cost.

    Args:
        model: bundled name, folder, or id of a Hub repository.
        quantize: "int4", "nvfp4" or "int8" also quantizes our pipeline and compares its images with those in 16 or 32
            bits.
        prompt: of all images; seeds are 0, 1, ...
        num_images: at least 2, because the first warms up and is not timed.
        steps: at least 2; default: the pipeline's.
        device: default: the GPU, if there is one.
        dtype: "float32", "bfloat16" or "float16"; default: bfloat16 on a GPU, float32 on a CPU.
        variant: of the files of a Hub repository, such as "fp16".

    Returns:
        The report, ready for JSON: `settings`, `device`, `versions`, the figures of `diffusers` and `diffusers_sana`,
        `differences`, `kernels`, `quantized` where asked for, and `checks`, each with `value`, `limit` and `passed`.

    Raises:
        ValueError: the model is no Sana or SANA-Sprint, or there are too few images or steps to time them.
        OSError: there is no such model.
    """
    name = pipeline_class_name(model)
    if name not in PIPELINES:
        raise ValueError(f"`model` must be a Sana or a SANA-Sprint, which both packages have; {model} is a {name}")
    check_integer("num_images", num_images, at_least=2)  # the first warms up
    if steps is not None:
        check_integer("steps", steps, at_least=2)  # the first also encodes the prompt
    device = find_device(device)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    is_half = dtype != "float32"
    call = {"prompt": prompt} | ({} if steps is None else {"num_inference_steps": steps})
    places: dict[str, Any] = {"model": checkpoint_path(model), "device": device, "dtype": dtype, "variant": variant}
    own_class = find_pipeline_class(model)  # imported before memory is measured

    with _exact_fp32():
        theirs, ours, exact = Side(), Side(), None
        with peak_memory(device) as memory:
            pipe = _load(getattr(diffusers, name), **places)
            inputs = _generate(pipe, theirs, num_images, call)
        theirs.peak_mib = memory.get("mib")
        theirs.forward = _forward(pipe.transformer, inputs)
        if is_half:
            exact = _forward(pipe.transformer.float(), inputs)
        del pipe
        _free()
        with peak_memory(device) as memory:
            pipe = _load(own_class, **places)
            _generate(pipe, ours, num_images, call)
        ours.peak_mib = memory.get("mib")
        ours.forward = _forward(pipe.transformer, inputs)
        kernels = _kernels(pipe, call)
        quantized = None
        if quantize:
            quantized, more = _quantized(pipe, quantize, ours, num_images, call)
            kernels += [check for check in more if check not in kernels]

    differences = {
        "forward": relative_error(ours.forward, theirs.forward),
        "latents": [relative_error(*pair) for pair in zip(ours.latents, theirs.latents, strict=True)],
        "psnr_db": _psnr(ours.images, theirs.images),
    }
    if exact is not None:
        differences["forward_to_fp32"] = {
            "diffusers": relative_error(theirs.forward, exact),
            "diffusers_sana": relative_error(ours.forward, exact),
        }
    report = {
        "settings": {
            "model": model,
            "pipeline": name,
            "variant": variant,
            "dtype": dtype,
            "prompt": prompt,
            "seeds": num_images,
            "steps": len(ours.step_seconds) // (num_images - 1) + 1,
            "pixels": list(ours.images[0].shape[-2:]),
            "quantize": quantize,
        },
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "kernel_mode": current_kernel_mode(),
        "w4a4_products": products_described(current_kernel_mode()),
        "versions": versions(),
        "diffusers": theirs.figures(),
        "diffusers_sana": ours.figures(),
        "differences": differences,
        "kernels": kernels,
        "checks": _checks(differences, kernels, torch.finfo(getattr(torch, dtype)).eps),
    }
    return report | ({"quantized": quantized} if quantized else {})


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """Convolutions of cuDNN in fp32 where fp32 is asked for; PyTorch's default rounds their inputs to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _load(pipeline_class: type[Any], model: str, device: str, dtype: str, variant: str | None) -> Any:
    """A pipeline of either package on its device, in the same dtypes."""
    default = getattr(torch, dtype)
    dtypes = {"default": default}
    if dtype == "float16":
        dtypes |= dict.fromkeys(OVERFLOW_FLOAT16, torch.bfloat16)
    parts: dict[str, Any] = {}
    if model == SANA_EMOJI_SPRINT:  # bundled without what it shares with sana-emoji
        model, parts = SANA_EMOJI, sprint_components(pipeline_class, default)
    pipe = pipeline_class.from_pretrained(model, dtype=dtypes, variant=variant, **parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generate(pipe: Any, side: Side, num_images: int, call: dict[str, Any]) -> dict[str, Any]:
    """Fills in images, latents and times; returns the first inputs of the transformer."""
    inputs: dict[str, Any] = {}

    def keep_inputs(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not inputs:
            inputs.update({name: _to(value, "cpu") for name, value in kwargs.items()})
            inputs[""] = tuple(_to(value, "cpu") for value in args)

    hook = pipe.transformer.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    side.weight_bytes = sum(value.nbytes for value in pipe.transformer.state_dict().values())
    size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    try:
        for seed in range(num_images):
            ends: list[float] = []
            last: list[Tensor] = []

            def after_step(
                _pipe: Any, _step: int, _t: Any, tensors: dict, ends: list = ends, last: list = last
            ) -> dict:
                synchronize()
                ends.append(time.perf_counter())
                last[:] = [tensors["latents"]]
                return {}

            synchronize()
            start = time.perf_counter()
            image = pipe(
                **call,
                height=size,
                width=size,
                use_resolution_binning=False,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="pt",
                callback_on_step_end=after_step,
                return_dict=False,
            )[0]
            synchronize()
            side.image_seconds.append(time.perf_counter() - start)
            side.latents.append(last[0].float().cpu())
            side.images.append(image.float().cpu())
            if seed:  # the first step also encodes the prompt
                side.step_seconds += [after - before for before, after in pairwise(ends)]
    finally:
        hook.remove()
    return inputs


def _to(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A copy of a tensor, floating point numbers in `dtype`; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None, copy=True)


@torch.no_grad()
def _forward(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    """The transformer's first output, in fp32 on the CPU."""
    device, dtype = transformer.device.type, transformer.dtype
    named = {name: _to(value, transformer.device, dtype) for name, value in inputs.items() if name}
    args = [_to(value, transformer.device, dtype) for value in inputs[""]]
    with torch.autocast(device, enabled=False):
        return transformer(*args, **named | {"return_dict": False})[0].float().cpu()


def _kernels(pipe: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    """What runs in a call of two steps, which shows every operation of a longer one, and how exact it is."""
    size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    options = call | {"num_inference_steps": 2, "height": size, "width": size, "use_resolution_binning": False}
    with checked_kernels() as checks:
        pipe(**options, generator=torch.Generator("cpu").manual_seed(0), output_type="pt")
    return [check.to_dict() for check in checks]


def _quantized(
    pipe: Any, precision: str, ours: Side, num_images: int, call: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Quantizes the pipeline and generates the same images again: figures and kernels."""
    start = time.perf_counter()
    quantize_pipeline(pipe, SVDQuantConfig(precision=precision), progress=False)
    seconds, side = time.perf_counter() - start, Side()
    _generate(pipe, side, num_images, call)
    psnrs = _psnr(side.images, ours.images)
    figures = side.figures()
    del figures["peak_mib"]  # the original weights were in memory too
    mode = best_mode(pipe.transformer.device, precision)
    return (
        {"precision": precision, "mode": mode, "seconds_to_quantize": seconds, "psnr_db": psnrs, **figures},
        _kernels(pipe, call),
    )


def _psnr(images: list[Tensor], others: list[Tensor]) -> list[float | None]:
    """Of each pair, in dB; None where all pixels are equal, which JSON has no number for."""
    values = psnr(torch.cat(images), torch.cat(others)).tolist()
    return [None if value == float("inf") else value for value in values]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checks(differences: dict[str, Any], kernels: list[dict[str, Any]], eps: float) -> list[dict[str, Any]]:
    """The figures that have a limit."""
    checks = []

    def add(name: str, value: float, limit: float) -> None:
        checks.append({"name": name, "value": value, "limit": limit, "passed": value <= limit})

    if "forward_to_fp32" in differences:
        errors = differences["forward_to_fp32"]
        limit = HALF_FACTOR * errors["diffusers"] + eps / 2
        add("one forward of the transformer, error to fp32", errors["diffusers_sana"], limit)
    else:
        add("one forward of the transformer, relative difference", differences["forward"], FORWARD_LIMIT)
        add("latents after all steps, largest relative difference", max(differences["latents"]), LATENTS_LIMIT)
    for kernel in kernels:
        if kernel["error"] is not None:
            add(f"{kernel['operation']} {kernel['shapes'][0]}, error of the kernel", kernel["error"], kernel["limit"])
    return checks


def summary(report: dict[str, Any]) -> str:
    """The report as tables for a terminal, which are Markdown too."""
    theirs, ours, differences = (report[key] for key in ("diffusers", "diffusers_sana", "differences"))
    settings = report["settings"]
    pixels = " x ".join(map(str, settings["pixels"]))
    parts = [
        f"{settings['model']} ({settings['pipeline']}), {pixels} px, {settings['steps']} steps, {settings['dtype']}, "
        f"{settings['seeds']} images\n"
        f"{report['device']}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + f"\nkernel mode {report['kernel_mode']!r}; products in w4a4: {report['w4a4_products']}"
    ]
    rows = [
        ["seconds per step", *(f"{side['seconds_per_step']:.4g}" for side in (theirs, ours))],
        ["seconds per image", *(f"{side['seconds_per_image']:.4g}" for side in (theirs, ours))],
        ["peak memory, MiB", *(_mib(side["peak_mib"]) for side in (theirs, ours))],
        ["transformer weights, MiB", *(_mib(side["transformer_bytes"] / 2**20) for side in (theirs, ours))],
    ]
    if "forward_to_fp32" in differences:
        errors = differences["forward_to_fp32"]
        rows.append(["one forward, error to fp32", *(f"{errors[s]:.2e}" for s in ("diffusers", "diffusers_sana"))])
    header = ["", "diffusers", "diffusers_sana"]
    if four := report.get("quantized"):
        header.append(f"{four['precision']} ({four['mode']})")
        cells = [f"{four['seconds_per_step']:.4g}", f"{four['seconds_per_image']:.4g}", ""]
        cells += [_mib(four["transformer_bytes"] / 2**20), *[""] * (len(rows) - 4)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    parts.append(table(header, rows))
    rows = [
        ["one forward of the transformer, relative", f"{differences['forward']:.2e}"],
        ["final latents, relative, largest", f"{max(differences['latents']):.2e}"],
        ["PSNR of the images, dB, lowest", _lowest(differences["psnr_db"])],
    ]
    if four:
        rows.append([f"PSNR of {four['precision']} to {settings['dtype']}, dB, lowest", _lowest(four["psnr_db"])])
    parts.append(table(["difference", ""], rows))
    parts.append(_kernel_table(report["kernels"]))
    failed = [check for check in report["checks"] if not check["passed"]]
    lines = [f"FAILED: {c['name']}: {c['value']:.2e}, at most {c['limit']:.2e}" for c in failed]
    lines.append(f"{len(report['checks']) - len(failed)} of {len(report['checks'])} checks passed.")
    if not any(kernel["error"] is not None for kernel in report["kernels"]):
        lines.append("No kernel ran here, only PyTorch references.")
    return "\n\n".join([*parts, "\n".join(lines)])


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    """A row per operation and what runs it, with the shape that is furthest from its reference."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in kernels:
        groups.setdefault((kernel["operation"], kernel["runs"]), []).append(kernel)
    rows = []
    for (operation, runs), group in sorted(groups.items()):
        worst = max(group, key=lambda kernel: (kernel["error"] or 0) / (kernel["limit"] or 1))
        against = worst["why"]
        if worst["error"] is not None:
            against = f"{worst['error']:.1e} at {worst['shapes'][0]}; the reference: {worst['reference_error']:.1e}"
        rows.append([operation, len(group), sum(kernel["calls"] for kernel in group), runs, against])
    return table(["operation", "shapes", "calls", "runs", "largest error to its reference in float64, or why"], rows)


def _mib(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _lowest(values: list[float | None]) -> str:
    finite = [value for value in values if value is not None]
    return f"{min(finite):.1f}" if finite else "all pixels equal"
