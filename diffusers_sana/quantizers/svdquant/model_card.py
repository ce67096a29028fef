"""The README.md of a quantized folder: how to load it, and how it was quantized."""

from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from diffusers_sana.quantizers.svdquant.report import PLOT_FILE, QuantizationReport


TEXT = """# {title}

```bash
pip install diffusers_sana
```

```python
import torch
import diffusers_sana  # lets diffusers read the 4-bit layers
from {library} import {cls}

{variable} = {cls}.from_pretrained("{place}", dtype=torch.{dtype})
```

| | |
|---|---|
{rows}
"""


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
    modes = {mode: sum(layer.mode == mode for layer in report.layers) for mode in ("w4a4", "w4a16")}
    facts = {
        "base model": base_model and f"[{base_model}](https://huggingface.co/{base_model})",
        "method": "[SVDQuant](https://arxiv.org/abs/2411.05007)" + (" with GPTQ" if report.config.gptq else ""),
        "precision": report.config.precision,
        "rank": report.config.rank,
        "calibration": f"{report.prompts} prompts" if report.prompts else "none",
        "layers": ", ".join(f"{count} in {mode}" for mode, count in modes.items() if count),
        "memory of their weights": report.sizes,
        "relative error of a layer's output": report.errors,
    }
    text = TEXT.format(
        title=name,
        library=library,
        cls=cls.__name__,
        variable="pipe" if cls.__name__.endswith("Pipeline") else "model",
        place=name,
        dtype=dtype,
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None),
    )
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_model,
        tags=["svdquant", report.config.precision, "diffusers_sana"],
    )
    if base_model:
        data["base_model_relation"] = "quantized"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def save_card(card: ModelCard, folder: Path) -> None:
    """Writes README.md, with the plot of the errors if there is one."""
    if (folder / PLOT_FILE).exists():
        card.text += f"\n![Error of each layer's output]({PLOT_FILE})\n"
    card.save(folder / "README.md")
