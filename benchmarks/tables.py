"""Writes the tables of README.md and of the pages in docs/ from the committed results.

    python -m benchmarks.tables

A table stands between `<!-- table NAME -->` and `<!-- end -->`; `tests/test_docs.py` holds the pages to the results.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import emoji_tables
from benchmarks.markdown import provenance, render, results


DOCS = Path(__file__).parent.parent / "docs"
PAGES = (
    DOCS.parent / "README.md",
    DOCS / "performance.md",
    DOCS / "quantization.md",
    DOCS / "vila_u.md",
    DOCS / "caching.md",
    DOCS / "dc_ae_dit.md",
    DOCS / "serving.md",
    DOCS / "quantization_models.md",
    DOCS / "first_minutes.md",
    DOCS / "quantization_lora.md",
    DOCS / "video.md",
    DOCS / "checkpoints.md",
    DOCS / "evaluation.md",
    DOCS / "training.md",
)


def headline() -> str:
    """The most important figures, one per row, each with the file that it comes from."""
    names = ("pipeline", "quantized", "quantization_quality")
    pipeline, quantized, quality = (results(f"cpu/{name}") for name in names)
    models = results("cpu/models")["cases"]

    def seconds(case: dict[str, float], ours: str = "diffusers_sana", theirs: str = "diffusers") -> list[str]:
        return [f"{case[ours]:.2f} s", f"{theirs} {case[theirs]:.2f} s"]

    step, decode = models["sana-0.6b step 1024px fp32"], models["dc-ae decode 512px fp32"]
    blocks, sizes = quantized["steps"]["512px"]["seconds"], quantized["whole"]
    psnr = {
        name: f"{variant['psnr_db']:.1f} dB ({variant['bytes'] / 1e6:.1f} MB)"
        for name, variant in quality["variants"].items()
        if "psnr_db" in variant
    }
    peers = ", ".join(f"{peer} {psnr[f'{peer} w4a16']}" for peer in ("sdnq int4 + svd", "quanto int4"))
    rows = [
        ["image of the bundled Sana, 256 px, 20 steps, fp32", *seconds(pipeline["median_seconds"]), "pipeline"],
        ["guided step of Sana-0.6B, 1024 px, fp32", *seconds(step["seconds"]), "models"],
        [
            "memory of that step, beyond the weights",
            f"{step['peak_mib']['diffusers_sana']:.0f} MiB",
            f"diffusers {step['peak_mib']['diffusers']:.0f} MiB",
            "models",
        ],
        ["DC-AE decoding, 512 px, fp32", *seconds(decode["seconds"]), "models"],
        [
            "guided step of 8 blocks of Sana-0.6B, 512 px, 4 bits",
            *seconds(blocks, "diffusers_sana int4 w4a8", "diffusers fp32"),
            "quantized",
        ],
        [
            "weights of the Sana-0.6B transformer, 4 bits",
            f"{sizes['int4']['bytes'] / 1e6:.0f} MB",
            f"bf16 {sizes['bf16_bytes'] / 1e6:.0f} MB",
            "quantized",
        ],
        [
            f"PSNR of 4-bit images to bf16 ({quality['bf16_bytes'] / 1e6:.1f} MB), bundled Sana, w4a16, no data",
            psnr["int4 svdquant, no prompts w4a16"],
            peers,
            "quantization_quality",
        ],
    ]
    for row in rows:
        row[-1] = f"[{row[-1]}.json](benchmarks/results/cpu/{row[-1]}.json)"
    return render(["on a CPU", "diffusers_sana", "compared with", "device, versions, command"], rows)


def models_cpu() -> str:
    """Seconds, speed-up and memory of the models on a CPU without instructions for bf16."""
    return models("cpu/models")


def models_cpu_bf16() -> str:
    """The same on one with such instructions."""
    return models("cpu/models-avx512_bf16")


def models(name: str) -> str:
    """The table of a result file of `bench_models`."""
    report = results(name)
    rows = []
    for name, case in report["cases"].items():
        low, high = case["speedup_range"]
        spread = f" ({low:.2f}-{high:.2f})" if case["rounds"] > 1 else ""
        seconds, memory = case["seconds"], case["peak_mib"]
        rows.append(
            [
                name,
                f"{seconds['diffusers']:.1f}",
                f"{seconds['diffusers_sana']:.1f}",
                f"**{case['speedup']:.2f}x**{spread}",
                f"{memory['diffusers']:.0f}",
                f"{memory['diffusers_sana']:.0f}",
                f"{case['difference']:.0e}",
            ]
        )
    table = render(["case", "diffusers s", "ours s", "faster", "diffusers MiB", "ours MiB", "outputs differ by"], rows)
    return f"{table}\n\n{provenance(report)}"


def recipes() -> str:
    """What each recipe of training gains within minutes."""
    report = results("cpu/recipes")

    def row(name: str, found: dict[str, Any]) -> list[str]:
        low, high = found["interval"]
        gain = f"**{found['gain']:+.3f}** ({low:+.3f} to {high:+.3f})"
        return [name, found["figure"], f"{found['before']:.3f}", f"{found['after']:.3f}", gain]

    rows = [row(name, found) for name, found in report["recipes"].items()]
    table = render(["recipe", "figure", "before", "after", "gain, with its 95 % interval"], rows)
    size = f"{report['minutes']:g} minutes each, {report['train_images']} images to train on"
    return f"{table}\n\n{size}. {provenance(report)}"


def kernels_compiled() -> str:
    """Registers, shared memory and spills of every kernel: the most over its shapes, by architecture."""
    report = results("compile/kernels")
    architectures = list(report["shared_kib_limits"])
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in report["kernels"]:
        kernels.setdefault(row["kernel"].strip("_"), {}).setdefault(row["architecture"], []).append(row)

    def cell(rows: list[dict[str, Any]]) -> str:
        registers, shared, spilled = (
            max(row[key] for row in rows) for key in ("registers", "shared_kib", "spilled_bytes")
        )
        return f"{registers} / {shared:.0f}" + (f" / **{spilled} spilled**" if spilled else "")

    rows = [[f"`{name}`", *(cell(found[name_]) for name_ in architectures)] for name, found in sorted(kernels.items())]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{render(['kernel', *architectures], rows)}\n\n`{report['command']}`, {versions}."


def quantization_quality() -> str:
    """How far 4-bit images of the bundled checkpoint are from 16-bit ones."""
    return distances_from_bf16("quantization_quality")


def quantization_budgets() -> str:
    """The same of int8, and of budgets of bytes."""
    return distances_from_bf16("quantization_budgets")


def distances_from_bf16(name: str) -> str:
    """The table of a result file of `study_quantization`."""
    report = results(f"cpu/{name}")
    rows = [
        [name, f"{row['psnr_db']:.1f}", f"{row['ssim']:.3f}", f"{row['perceptual']:.3f}", f"{row['bytes'] / 1e6:.1f}"]
        if "failed" not in row
        else [name, row["failed"], "", "", ""]
        for name, row in report["variants"].items()
        if "ModuleNotFoundError" not in row.get("failed", "")  # not installed where this was measured
    ]
    table = render(["variant", "PSNR dB", "SSIM", "perceptual", "MB"], rows)
    return (
        f"{table}\n\n{report['prompts']} prompts; bf16 takes {report['bf16_bytes'] / 1e6:.1f} MB. {provenance(report)}"
    )


def quantized_errors() -> str:
    """Relative output errors of 8 blocks of Sana-0.6B with outliers."""
    report = results("cpu/quantized")
    modes = ("w4a4", "w4a8", "w4a16")
    ours: dict[str, dict[str, float]] = {}
    rows = []
    for name, error in report["errors"].items():
        variant, _, mode = name.rpartition(", ")
        if mode in modes:
            ours.setdefault(variant, {})[mode] = error
        else:
            rows.append([name, "", "", f"{error:.3f}" if isinstance(error, float) else error])
    rows = [[variant, *(f"{errors[mode]:.3f}" for mode in modes)] for variant, errors in ours.items()] + rows
    return f"{render(['variant', *modes], rows)}\n\n{provenance(report)}"


def svdquant_layers() -> str:
    """Relative output errors of single layers, beside those of deepcompressor."""
    report = results("cpu/svdquant_layers")
    variants = list(dict.fromkeys(name for case in report["cases"].values() for name in case))

    def pair(errors: dict[str, Any] | None) -> str:
        values = [errors[mode] for mode in ("w4a4", "w4a16")] if errors else []
        return " / ".join(f"{value['error'] if isinstance(value, dict) else value:.4f}" for value in values)

    rows = []
    for name, case in report["cases"].items():
        kind, _, seed = name.partition(", seed ")
        theirs = report["deepcompressor"][kind] if seed == "0" else None
        rows.append([name, pair(theirs), *(pair(case.get(variant)) for variant in variants)])
    return f"{render(['layer', 'deepcompressor', *variants], rows)}\n\n{provenance(report)}"


def quantized_formats() -> str:
    """Files of other runtimes, opened by their own packages."""
    report = results("cpu/formats")
    rows = [
        [
            row["check"],
            row["package"],
            f"{row['difference']:.1g}" if "difference" in row else f"failed: {row['failed']}",
        ]
        for row in report["rows"]
    ]
    return f"{render(['format', 'checked with', 'difference'], rows)}\n\n{provenance(report)}"


def quantized_steps() -> str:
    """Seconds of a guided step of the first blocks of Sana-0.6B."""
    report = results("cpu/quantized")
    cases = report["steps"]
    names = list(next(iter(cases.values()))["seconds"])
    rows = [
        [
            name,
            *(
                f"{case['seconds'][name]:.2f} s ({case['faster_than_diffusers_bf16'][name]:.1f}x)"
                for case in cases.values()
            ),
        ]
        for name in names
    ]
    header = ["method", *(f"{name}, {case['blocks']} blocks" for name, case in cases.items())]
    return f"{render(header, rows)}\n\n{provenance(report)}"


def quantized_size() -> str:
    """Bytes of the whole of Sana-0.6B, and the time to quantize it without data."""
    report = results("cpu/quantized")
    whole = report["whole"]
    rows = [["bf16", f"{whole['bf16_bytes'] / 1e6:.0f}", "1.00", "", "", ""]]
    for precision in ("int4", "nvfp4"):
        row = whole[precision]
        rows.append(
            [
                precision,
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['share_of_bf16']:.2f}",
                f"{row['disk_bytes'] / 1e6:.0f}",
                f"{row['w4a8_resident_bytes'] / 1e6:.0f}",
                f"{row['quantize_seconds']:.0f}",
            ]
        )
    header = ["weights", "MB", "of bf16", "MB on disk", "MB with the CPU's 8-bit copies", "seconds to quantize"]
    return f"{render(header, rows)}\n\n{provenance(report)}"


def quantized_layer() -> str:
    """Milliseconds of processor time of one layer in every mode, eager and compiled."""
    report = results("cpu/quantized_layer")
    seconds = report["processor_seconds"]
    modes = dict.fromkeys(name.rpartition(" ")[0] for name in seconds)
    rows = [[mode, *(f"{1e3 * seconds[f'{mode} {way}']:.0f} ms" for way in ("eager", "compiled"))] for mode in modes]
    return f"{render(['layer', 'eager', 'compiled'], rows)}\n\n{provenance(report)}"


def vila_u_images() -> str:
    """Images of a small VILA-U, the official way and ours."""

    def row(case: dict[str, Any]) -> list[str]:
        low, high = case["speedup_range"]
        spread = f" ({low:.2f}-{high:.2f})" if case["rounds"] > 1 else ""
        theirs, ours = (
            [
                f"{case[key][way]:.{digits}f}"
                for key, digits in (("seconds", 1), ("cells_per_second", 0), ("peak_mib", 0))
            ]
            for way in ("official way", "diffusers_sana")
        )
        best = case["same_best_codes"]
        same = f"all {best['codes']}" if best else "not compared"
        return [*theirs, *ours, f"**{case['speedup']:.2f}x**{spread}", same]

    sides = [f"{side} {what}" for side in ("official", "ours") for what in ("s", "cells/s", "MiB")]
    return vila_u_table([*sides, "faster", "same best codes"], row, compared=True)


def vila_u_others() -> str:
    """Text of the same VILA-U, and its image tokenizer."""

    def row(case: dict[str, Any]) -> list[str]:
        low, high = case["seconds_range"]
        unit = "tokens" if "tokens_per_second" in case else "images"
        pace = f"{case[f'{unit}_per_second']:.2g} {unit}/s"
        seconds, memory = case["seconds"]["diffusers_sana"], case["peak_mib"]["diffusers_sana"]
        return [pace, f"{seconds:.2f} ({low:.2f}-{high:.2f})", f"{memory:.0f}"]

    return vila_u_table(["pace", "s", "MiB"], row, compared=False)


def vila_u_table(header: list[str], row: Callable[[dict[str, Any]], list[str]], compared: bool) -> str:
    """A row for each of the cases that were, or were not, also measured the official way."""
    report = results("cpu/vila_u")
    cases = {name: case for name, case in report["cases"].items() if ("speedup" in case) == compared}
    table = render(["case", *header], [[name, *row(case)] for name, case in cases.items()])
    return f"{table}\n\n{timed_provenance(report)}"


def timed_provenance(report: dict[str, Any]) -> str:
    """Also says which clock."""
    return f"{provenance(report)} Seconds are {'processor' if report['clock'] == 'cpu' else 'wall'} time."


def step_caches() -> str:
    """What step caches gain and lose with the bundled checkpoint."""
    report = results("cpu/step_caches")
    rows = [
        [
            name,
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.2f}x",
            "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
        ]
        for name, row in report["variants"].items()
    ]
    table = render(["variant", "s per image", "faster", "PSNR dB"], rows)
    return (
        f"{table}\n\nMedians over {report['prompts']} prompts, {report['steps']} steps where nothing else is said. "
        f"{timed_provenance(report)}"
    )


def dc_ae_dit() -> str:
    """What a diffusion transformer gains from latents of deeper compression."""
    report = results("cpu/dc_ae_dit")
    rows = []
    for name, case in report["cases"].items():
        speeds = []
        for what in ("train", "sample"):
            low, high = case[what]["speedup_range"]
            spread = f" **{case[what]['speedup']:.1f}x** ({low:.1f}-{high:.1f})" if high > low else ""
            speeds.append(f"{case[what]['images_per_second']:.2f}{spread}")
        memory = " / ".join(f"{case[what]['peak_mib']:.0f}" for what in ("train", "sample", "decode"))
        decode, both = case["decode"]["seconds"], case["images_per_second"]
        rows.append([name, case["tokens"], *speeds, f"{decode:.2f}", f"{both:.2f}", memory])
    header = [
        "autoencoder, DiT",
        "tokens",
        "trained images/s",
        "sampled images/s",
        "s to decode one",
        "sampled and decoded",
    ]
    table = render([*header, "MiB: training, sampling, decoding"], rows)
    return (
        f"{table}\n\n{report['image_size']} pixels, {report['train_batch']} images a training step, {report['steps']}"
        f" guided steps a sample, medians of {report['rounds']} rounds. {timed_provenance(report)}"
    )


def serving() -> str:
    """A load test of the server: is any request lost?"""
    report = results("cpu/serving")
    rows = []
    for name, phase in report["phases"].items():
        outcomes, latency = phase["outcomes"], phase["latency_seconds"]
        refused = sum(outcomes.get(how, 0) for how in ("status 503", "connection refused", "cut off after refusals"))
        rows.append(
            [
                name,
                outcomes.get("image", 0),
                refused,
                f"**{phase['lost']}**",
                "" if refused else f"{phase['images_per_second']:.2f}",  # not while it is ending
                *(f"{latency[p]:.1f}" for p in ("p50", "p95", "p99")),
            ]
        )
    header = ["phase", "images", "refused", "lost", "images/s", "p50 s", "p95 s", "p99 s"]
    replicas = ", ".join(f"{count} of {model}" for model, count in report["replicas"].items())
    return f"{render(header, rows)}\n\n{report['clients']} clients, replicas: {replicas}. {provenance(report)}"


def published_models() -> str:
    """What quantization finds in the published models."""
    report = results("cpu/published_models")
    header = ["model", "parameters", "w4a4", "w4a16", "in 16 bit", "bf16", "4 bit", "of it", "largest layer in 16 bit"]

    def gigabytes(number: int) -> str:
        return f"{number / 1e9:.2f} GB"

    rows = [
        [
            name,
            f"{case['parameters'] / 1e9:.2f} B",
            case["w4a4"],
            case["w4a16"],
            case["layers_in_16_bit"],
            gigabytes(case["bf16_bytes"]),
            gigabytes(case["int4_bytes"]),
            f"{100 * case['int4_bytes'] / case['bf16_bytes']:.0f} %",
            next((f"`{layer}`, {size / 1e6:.0f} MB" for layer, size in case["largest_in_16_bit"].items()), ""),
        ]
        for name, case in report.items()
    ]
    return render(header, rows)


def adapters() -> str:
    """Errors of adapters of every kind, beside layers and fused."""
    report, rows = results("cpu/adapters"), []

    def error(case: dict[str, Any], name: str) -> str:
        return "refused" if case[name] is None else f"{case[name]:.0e}" if case[name] < 0.01 else f"{case[name]:.0%}"

    for kind, cases in report["cases"].items():
        cells = [error(cases[bits], how) for bits in ("16 bit", "4 bit") for how in ("beside", "fused")]
        rows.append([kind, *cells, cases["4 bit"].get("ranks", "")])
    header = ["kind", "16 bit, beside", "16 bit, fused", "4 bit, beside", "4 bit, fused", "ranks added"]
    return f"{render(header, rows)}\n\n{provenance(report)}"


def adapter_parts() -> str:
    """Errors of the part of a change that a 4-bit layer keeps, by what the part was chosen for."""
    report = results("cpu/adapters")["parts"]
    names = list(next(iter(report["errors"].values())))
    rows = [[layer, *(f"{errors[name]:.1%}" for name in names)] for layer, errors in report["errors"].items()]
    return f"{render(['layer', *names], rows)}\n\n{provenance(report)}"


def first_minutes() -> str:
    """What a new user waits for each result."""
    report = results("cpu/first_minutes")
    rows = [[step["result"], f"`{step['command']}`", f"{step['seconds']:.0f} s"] for step in report["steps"]]
    return f"{render(['result', 'command', 'after'], rows)}\n\n{provenance(report)}"


def host_cost() -> str:
    """Microseconds that a call of an operator takes on the host, with and without a gradient."""
    report = results("cpu/host_cost")
    ways, without, with_one = (
        report[f"{name}_us"] for name in ("registration", "operation", "operation_in_grad_mode")
    )
    rows = [
        ["the function, without an operator", ways["no operator"], ""],
        ["its operator of `torch.library.Library`", ways["Library, without"], ways["Library, with a gradient"]],
        ["its operator of `torch.library.custom_op`", "", ways["torch.library.custom_op"]],
        ["its operator of `torch.library.triton_op`", "", ways["torch.library.triton_op"]],
        *([f"the whole `{name}`", without[name], with_one[name]] for name in without if name != "x + x"),
    ]
    header = ["call", "µs without a gradient (`inference`)", "µs with a gradient (`default`)"]
    return f"{render(header, rows)}\n\n{provenance(report)}"


def long_video() -> str:
    """The largest memory of a stream by its length, and the state of the released model."""
    result = results("cpu/long_video")
    rows = [
        [f"tiny model, {seconds} seconds", f"{peak / 1e3:.1f} kB"]
        for seconds, peak in result["peak_bytes_by_seconds"].items()
    ]
    rows.append(["state alone of the 2B model, 480 x 832, bf16", f"{result['state_bytes_2b_480p'] / 1e6:.1f} MB"])
    return render(["video at 16 frames per second", "memory"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "published_models": published_models,
    "headline": headline,
    "models_cpu": models_cpu,
    "models_cpu_bf16": models_cpu_bf16,
    "recipes": recipes,
    "kernels_compiled": kernels_compiled,
    "quantization_quality": quantization_quality,
    "quantization_budgets": quantization_budgets,
    "quantized_errors": quantized_errors,
    "svdquant_layers": svdquant_layers,
    "quantized_formats": quantized_formats,
    "quantized_steps": quantized_steps,
    "quantized_size": quantized_size,
    "quantized_layer": quantized_layer,
    "vila_u_images": vila_u_images,
    "vila_u_others": vila_u_others,
    "step_caches": step_caches,
    "dc_ae_dit": dc_ae_dit,
    "serving": serving,
    "adapters": adapters,
    "adapter_parts": adapter_parts,
    "first_minutes": first_minutes,
    "host_cost": host_cost,
    "long_video": long_video,
    **emoji_tables.TABLES,
}


def filled(page: str) -> str:
    """`page` with every table rendered again."""

    def fill(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
