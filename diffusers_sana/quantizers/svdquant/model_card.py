"""The README.md of a quantized folder: how to load it, and how it was quantized."""

from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_sana.cards import make_card
from diffusers_sana.quantizers.svdquant.config import LAYER_MODES
from diffusers_sana.quantizers.svdquant.report import PLOT_FILE, QuantizationReport


LOADING = """import torch
import diffusers_sana  # lets diffusers read the quantized layers
from {library} import {cls}

{variable} = {cls}.from_pretrained("{name}", dtype=torch.{dtype})"""


def model_card(
    report: QuantizationReport, cls: type, *, name: str, dtype: str, base_model: str | None = None
) -> ModelCard:
    """The model card of a quantized pipeline or model.

    Args:
        report: of the quantization.
        cls: class of the pipeline or the model.
        name: of the folder.
        dtype: of all that is not quantized, such as "bfloat16".
        base_model: Hub id of the original, None if unknown.
    """
    library = cls.__module__.split(".")[0]
    if library not in ("diffusers", "diffusers_sana", "transformers"):
        library, cls = "diffusers", DiffusionPipeline
    modes = {mode: sum(layer.mode == mode for layer in report.layers) for mode in LAYER_MODES}
    facts = {
        "method": "[SVDQuant](https://arxiv.org/abs/2411.05007)"
        + (" with GPTQ" if any(layer.gptq for layer in report.layers) else ""),
        "precision": report.config.precision,
        "rank": report.ranks.removeprefix("rank "),
        "calibration": f"{report.prompts} prompts" if report.prompts else "none",
        "layers": ", ".join(f"{count} in {mode}" for mode, count in modes.items() if count),
        "memory of their weights": report.sizes,
        "relative error of a layer's output": report.errors,
    }
    variable = "pipe" if cls.__name__.endswith("Pipeline") else "model"
    return make_card(
        name,
        LOADING.format(library=library, cls=cls.__name__, variable=variable, name=name, dtype=dtype),
        facts,
        base_model=base_model,
        relation="quantized",
        library_name="diffusers",
        tags=["svdquant", report.config.precision, "diffusers_sana"],
    )


def save_card(card: ModelCard, folder: Path) -> None:
    """Writes README.md, with the plot of the errors if there is one."""
    if (folder / PLOT_FILE).exists():
        card.text += f"\n![Error of each layer's output]({PLOT_FILE})\n"
    card.save(folder / "README.md")
