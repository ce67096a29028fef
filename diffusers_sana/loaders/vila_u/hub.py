"""A saved VILA-U as a repository of the Hub: loadable without `import diffusers_sana`, with a model card.

With `trust_remote_code=True` transformers runs the files that "auto_map" in the JSON files of a repository names. Ours
hold one import each, so that everybody runs the installed package and no copy of it; where it is not installed,
transformers says how to.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

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

TEXT = """# {title}

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{title}", dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)

inputs = processor(text="a red cat", generation_mode="image")
codes = model.generate(**inputs, generation_mode="image")
picture = processor.postprocess(model.decode_image_tokens(codes))[0]
```

The code is in a package: `pip install diffusers_sana`. Who imports it first needs no `trust_remote_code`.

| | |
|---|---|
{rows}
"""


def add_remote_code(folder: str | Path) -> None:
    """Makes a folder that `save_pretrained` wrote loadable with `trust_remote_code=True` alone.

    Writes the files of code and names them in config.json and, where they are there, in processor_config.json and
    preprocessor_config.json. A second call changes nothing. Saving the model or the processor into the folder again
    writes those JSON files anew: then call this again.

    Args:
        folder: with the model, and with the processor if it is to be loaded from there.

    Raises:
        ValueError: no model of ours is in the folder.
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
        pictures = {"image_processor": processor.get("image_processor", {}) | {"auto_map": IMAGE_PROCESSOR_MAP}}
        _write_json(path, processor | {"auto_map": PROCESSOR_MAP} | pictures)
    path = folder / "preprocessor_config.json"
    if path.is_file():
        _write_json(path, read_json(path) | {"auto_map": IMAGE_PROCESSOR_MAP})


def write_model_card(folder: str | Path, title: str, license: str, base_model: str | None = None) -> ModelCard:
    """Writes README.md: how to load the model, and what its config says about it.

    Args:
        folder: for which `add_remote_code` was called: what the card says needs it.
        title: id of the repository.
        license: its short name on the Hub; "llama2" for whatever comes from the official model.
        base_model: id of the model that this one was trained or made from.

    Raises:
        ValueError: no model of ours is in the folder, or nothing that makes it loadable as the card says.
    """
    folder = Path(folder)
    content = _read_config(folder)
    if "auto_map" not in content:
        raise ValueError(
            f"`folder` must hold the code the card speaks of, but {folder} does not: `add_remote_code` first."
        )
    config = VilaUConfig.from_dict(content)
    vision, text = config.vision_config, config.text_config
    facts = {
        "base model": base_model and f"[{base_model}](https://huggingface.co/{base_model})",
        "method": "[VILA-U](https://arxiv.org/abs/2409.04429)",
        "pictures": f"{vision.image_size} x {vision.image_size} pixels, {vision.num_image_tokens} cells of "
        f"{vision.num_codebooks} codes of {vision.codebook_size}",
        "videos": f"{config.num_video_frames} frames",
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        license=license,
        base_model=base_model,
        tags=["vila-u", "diffusers_sana"],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{TEXT.format(title=title, rows=rows)}")
    card.save(folder / "README.md")
    return card


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"`folder` must hold a model that `save_pretrained` wrote, but {path} is not there.")
    config = read_json(path)
    kind = config.get("model_type")
    if kind != VilaUConfig.model_type:
        raise ValueError(
            f"`folder` must hold a model of type {VilaUConfig.model_type!r}, but that of {folder} is {kind!r}. "
            "Convert an official checkpoint first: `diffusers_sana.convert_vila_u`."
        )
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
