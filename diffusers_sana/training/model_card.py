"""The README.md of a trained folder: how to load it first, then what its files say about it."""

from math import prod
from pathlib import Path

import diffusers
from huggingface_hub import ModelCard
from safetensors import safe_open

import diffusers_sana
from diffusers_sana.cards import make_card
from diffusers_sana.files import read_json


LORA_FILE = "pytorch_lora_weights.safetensors"
# Class of a pipeline -> what the Hub calls its task.
TASKS = {
    "SanaPipeline": "text-to-image",
    "SanaSprintPipeline": "text-to-image",
    "SanaControlNetPipeline": "text-to-image",
    "SanaImg2ImgPipeline": "image-to-image",
    "SanaInpaintPipeline": "image-to-image",
}
BINNED_SAMPLE_SIZES = (16, 32, 64, 128)  # `sample_size` of the transformers for which diffusers has image sizes


def write_model_card(
    folder: str | Path,
    title: str | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: tuple[str, ...] = (),
    facts: dict[str, object] | None = None,
) -> ModelCard:
    """Writes README.md into a folder that `save_pretrained` or `save_lora_weights` wrote.

    Args:
        folder: with a pipeline, a model of diffusers, or a LoRA.
        title: id of the repository that the folder will be; by default the folder's name.
        base_model: id of the model that this one was trained from; a LoRA needs one.
        license: its short name on the Hub. Whatever was trained from official weights has theirs.
        tags: more of them.
        facts: more rows of the table, such as the number of steps.

    Raises:
        ValueError: there is nothing of the kind in the folder, or `base_model` is missing.
    """
    folder = Path(folder)
    title = title or folder.resolve().name
    is_lora = (folder / LORA_FILE).is_file()
    if is_lora and base_model is None:
        raise ValueError("`base_model` must be given for a LoRA, got None. Name the model that it was trained for.")
    name = "SanaPipeline" if is_lora else _class_name(folder)
    library = "diffusers_sana" if name in dir(diffusers_sana) else "diffusers"
    is_pipeline = name.endswith("Pipeline")
    variable = "pipe" if is_pipeline else "model"
    lines = [f"from {library} import {name}", ""]
    lines.append(f'{variable} = {name}.from_pretrained("{base_model if is_lora else title}")')
    if is_lora:
        lines.append(f'pipe.load_lora_weights("{title}")')

    card = make_card(
        title,
        "\n".join(lines),
        _parameters(folder) | (facts or {}),
        library=library,
        note=_plain_diffusers(folder, name, title) if is_pipeline and not is_lora else "",
        base_model=base_model,
        relation="adapter" if is_lora else "finetune",
        library_name="diffusers",
        pipeline_tag=TASKS.get(name),
        license=license,
        tags=["diffusers_sana", "sana", *(["lora"] if is_lora else []), *tags],
    )
    card.save(folder / "README.md")
    return card


def _class_name(folder: Path) -> str:
    """Of the pipeline or the model in `folder`."""
    for name in ("model_index.json", "config.json"):
        path = folder / name
        if path.is_file() and "_class_name" in (config := read_json(path)):
            return config["_class_name"]
    raise ValueError(
        f"`folder` must hold what `save_pretrained` or `save_lora_weights` of diffusers wrote, but {folder} does not."
    )


def _plain_diffusers(folder: Path, name: str, title: str) -> str:
    """How to load a pipeline of ours without this package, "" where diffusers has no such class."""
    config = folder / "transformer" / "config.json"
    if not name.startswith("Sana") or not hasattr(diffusers, name) or not config.is_file():
        return ""
    text = f'\n\nPlain diffusers loads it too: `diffusers.{name}.from_pretrained("{title}")`'
    if read_json(config).get("sample_size") not in BINNED_SAMPLE_SIZES:
        text += ", called with\n`use_resolution_binning=False`, since its tables have no sizes for this model"
    return f"{text}."


def _parameters(folder: Path) -> dict[str, object]:
    """How large each model in `folder` is, by the headers of its files."""
    rows: dict[str, int] = {}
    for path in sorted(folder.glob("**/*.safetensors")):
        part = path.relative_to(folder).parts[0] if path.parent != folder else "model"
        with safe_open(path, "pt") as file:
            count = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 no mapping
        rows[part] = rows.get(part, 0) + count
    return {part: f"{count / 1e6:.3g} million parameters" for part, count in rows.items()}
