"""Turns a saved VILA-U into a Hub repository that loads without `import diffusers_sana`, with a model card.

With `trust_remote_code=True` transformers runs the files that "auto_map" in the JSON files of a repository names. Each
of ours contains a single import, so users run the installed package and not a copy; if it is not installed,
transformers says how to install it.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from diffusers_sana.cards import make_card
from diffusers_sana.files import read_json
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig


CODE = '''"""The code is in the package diffusers_sana: pip install diffusers_sana"""

from diffusers_sana import {names}


__all__ = {exported}
'''
FILES = {
    "configuration_vila_u": ["VilaUConfig"],
    "image_processing_vila_u": ["VilaUImageProcessor"],
    "modeling_vila_u": ["VilaUForConditionalGeneration", "VilaUModel"],
    "processing_vila_u": ["VilaUProcessor"],
}
WHOLE_MODEL = "modeling_vila_u.VilaUForConditionalGeneration"
CONFIG_MAP = {
    "AutoConfig": "configuration_vila_u.VilaUConfig",
    "AutoModel": "modeling_vila_u.VilaUModel",
    "AutoModelForCausalLM": WHOLE_MODEL,
    "AutoModelForImageTextToText": WHOLE_MODEL,
    "AutoModelForMultimodalLM": WHOLE_MODEL,
}
PROCESSOR_MAP = {"AutoProcessor": "processing_vila_u.VilaUProcessor"}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_vila_u.VilaUImageProcessor"}

LOADING = """from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{title}", dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)

inputs = processor(text="a red cat", generation_mode="image")
codes = model.generate(**inputs, generation_mode="image")
image = processor.postprocess(model.decode_image_tokens(codes))[0]"""


def add_remote_code(folder: str | Path) -> None:
    """Makes a folder written by `save_pretrained` loadable with `trust_remote_code=True` and no import of ours.

    Writes the Python files and refers to them in config.json and, if they exist, in processor_config.json and
    preprocessor_config.json. A second call changes nothing. Saving the model or processor into the folder again
    rewrites those JSON files: call this function again afterwards.

    Args:
        folder: with the model, and optionally the processor.

    Raises:
        ValueError: the folder has no model of ours.
    """
    folder = Path(folder)
    config = _read_config(folder)
    for module, names in FILES.items():
        code = CODE.format(names=", ".join(names), exported=json.dumps(names))
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
    _write_json(folder / "config.json", config | {"auto_map": CONFIG_MAP})
    path = folder / "processor_config.json"
    if path.is_file():
        processor = read_json(path)
        image_processor = {"image_processor": processor.get("image_processor", {}) | {"auto_map": IMAGE_PROCESSOR_MAP}}
        _write_json(path, processor | {"auto_map": PROCESSOR_MAP} | image_processor)
    path = folder / "preprocessor_config.json"
    if path.is_file():
        _write_json(path, read_json(path) | {"auto_map": IMAGE_PROCESSOR_MAP})


def write_model_card(folder: str | Path, title: str, license: str, base_model: str | None = None) -> ModelCard:
    """Writes README.md: how to load the model, and its main config fields.

    Args:
        folder: after `add_remote_code`, which the instructions in the card rely on.
        title: id of the repository.
        license: its short name on the Hub; "llama2" for anything derived from the official model.
        base_model: id of the model that this one was trained or derived from.

    Raises:
        ValueError: the folder has no model of ours, or `add_remote_code` was not called.
    """
    folder = Path(folder)
    content = _read_config(folder)
    if "auto_map" not in content:
        raise ValueError(
            f"`folder` must have the code that the card refers to, but {folder} does not: call `add_remote_code` "
            "first."
        )
    config = VilaUConfig.from_dict(content)
    vision, text = config.vision_config, config.text_config
    facts = {
        "method": "[VILA-U](https://arxiv.org/abs/2409.04429)",
        "images": f"{vision.image_size} x {vision.image_size} pixels, {vision.num_image_tokens} tokens with "
        f"{vision.num_codebooks} codes each, codebook of {vision.codebook_size}",
        "videos": f"{config.num_video_frames} frames",
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}",
    }
    card = make_card(
        title,
        LOADING.format(title=title),
        facts,
        note=" After `import diffusers_sana`, `trust_remote_code` is not\nneeded.",
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="any-to-any",
        license=license,
        tags=["vila-u", "diffusers_sana"],
    )
    card.save(folder / "README.md")
    return card


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"`folder` must be a folder written by `save_pretrained`, but {path} is missing.")
    config = read_json(path)
    kind = config.get("model_type")
    if kind != VilaUConfig.model_type:
        raise ValueError(
            f"`folder` must have a model of type {VilaUConfig.model_type!r}, got {kind!r} in {folder}. "
            "Convert an official checkpoint first: `diffusers_sana.convert_vila_u`."
        )
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
