"""How far 4-bit images are from 16-bit ones: the parts of SVDQuant one by one, its modes, and other quantizers.

    python -m benchmarks.study_quantization [--prompts 64] [--study parts|budgets]

The bundled checkpoint generates images of held-out prompts with the same seeds in bf16 and in each variant.
Calibration, where a variant has it, sees 16 other prompts. Other quantizers run if they are installed
(`pip install --no-deps sdnq optimum-quanto torchao`). Writes `benchmarks/results/<device>/quantization_quality.json`
variant by variant, and the figure of docs/quantization.md. `--study budgets` measures int8 and byte budgets in their
place, and writes `quantization_budgets.json`.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from benchmarks.harness import RESULTS, environment, write_results
from benchmarks.quantized import ABLATIONS, PEERS, config_for, tensor_bytes, with_peer
from diffusers_sana import SanaPipeline, quantize
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.quantizers.svdquant.api import set_compute_mode
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.training.objectives.perceptual import PerceptualLoss
from examples.train_emoji.common import captioned_grid
from examples.train_emoji.scenes import OBJECTS, Scenes, held_out_scenes


FIGURE = Path(__file__).parent.parent / "docs" / "images" / "quantization.webp"
MODES = ("w4a4", "w4a8", "w4a16")
CALIBRATION_PROMPTS = 16
BUDGETS = ("0.40x", "0.50x", "0.57x", "0.65x")  # int4 with rank 32 takes 0.57 of this small model
BATCH = 16


def calibration_prompts() -> list[str]:
    """Prompts of the training distribution; none is held out."""
    source = Scenes(list(OBJECTS), seed=7)
    return [source.sample().prompt for _ in range(CALIBRATION_PROMPTS)]


def generate(pipe: SanaPipeline, prompts: list[str]) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1]; prompt i has seed i."""
    batches = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        batches.append(pipe(batch, generator=generators, output_type="pt").images.float().cpu())
    return torch.cat(batches)


def compare(images: Tensor, reference: Tensor) -> dict[str, float]:
    """Means over images: PSNR in dB, SSIM, and the distance of `PerceptualLoss`."""
    psnr = -10 * (images - reference).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
    ssim = [
        structural_similarity(a.numpy(), b.numpy(), data_range=1, channel_axis=0)
        for a, b in zip(images, reference, strict=True)
    ]
    with torch.no_grad():
        distance = PerceptualLoss()(images * 2 - 1, reference * 2 - 1)
    return {"psnr_db": psnr.mean().item(), "ssim": float(np.mean(ssim)), "perceptual": distance.item()}


def parts() -> dict[str, dict[str, Any]]:
    """Name -> configuration, and whether it is calibrated; all `MODES` of each are measured."""
    table = {f"int4 {name}": {"config": config_for(name), "calibrated": name != "naive"} for name in ABLATIONS}
    table |= {
        f"nvfp4 {name}": {"config": config_for(name, "nvfp4"), "calibrated": name != "naive"}
        for name in ("naive", "svdquant", "svdquant + gptq")
    }
    table["int4 svdquant, no prompts"] = {"config": config_for("svdquant"), "calibrated": False}
    table["nvfp4 svdquant, no prompts"] = {"config": config_for("svdquant", "nvfp4"), "calibrated": False}
    return table


def budgets() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for int8 and for budgets, each with the modes to measure: a budget in that for which it is chosen."""
    yield "int8", {"config": SVDQuantConfig(precision="int8"), "calibrated": True, "modes": ("w8a8", "w8a16")}
    yield "int4 rank 32", {"config": SVDQuantConfig(), "calibrated": True, "modes": ("w4a4", "w4a8")}
    for mode in ("w4a8", "w4a4"):
        for budget in BUDGETS:
            config = SVDQuantConfig(budget=budget, compute_mode=mode)
            yield f"int4 budget {budget}", {"config": config, "calibrated": True, "modes": (mode,)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--study", choices=("parts", "budgets"), default="parts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    original: nn.Module = pipe.transformer
    prompts = [scene.prompt for scene in held_out_scenes(list(OBJECTS))][: args.prompts]
    reference = generate(pipe, prompts)
    rows: dict[str, dict[str, Any]] = {}
    report = {**environment(), "prompts": len(prompts), "bf16_bytes": tensor_bytes(original), "variants": rows}
    shown = {"bf16": reference[:8]}

    def record(name: str, **facts: Any) -> None:
        images = generate(pipe, prompts)
        rows[name] = compare(images, reference) | {"bytes": tensor_bytes(pipe.transformer)} | facts
        if name in ("int4 naive w4a4", "int4 svdquant w4a4", "int4 svdquant w4a8", "nvfp4 svdquant w4a4"):
            shown[name] = images[:8]
        print(name, rows[name], flush=True)
        write_results(f"quantization_{'quality' if args.study == 'parts' else 'budgets'}", report, args.results)

    for name, variant in parts().items() if args.study == "parts" else budgets():
        pipe.transformer = copy.deepcopy(original)
        start = time.perf_counter()
        given = calibration_prompts() if variant["calibrated"] else None
        quantize(pipe, variant["config"], prompts=given, progress=False)
        seconds = time.perf_counter() - start
        for mode in variant.get("modes", MODES):
            set_compute_mode(pipe.transformer, mode)
            record(f"{name} {mode}", quantize_seconds=seconds)
    if args.study == "budgets":
        return
    inputs = {
        "hidden_states": torch.randn(2, 32, 8, 8, device=device, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, 9, 192, device=device, dtype=torch.bfloat16),
        "timestep": torch.full((2,), 500.0, device=device),
    }
    for name in PEERS:
        model = with_peer(original, name, inputs)
        if isinstance(model, str):
            rows[name] = {"failed": model}
        else:
            pipe.transformer = model
            record(f"{name} w4a16")
    write_results("quantization_quality", report, args.results)
    captions = [f"{name}: {prompt}" for name in shown for prompt in prompts[:8]]
    captioned_grid(torch.cat(list(shown.values())) * 2 - 1, captions, FIGURE)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
