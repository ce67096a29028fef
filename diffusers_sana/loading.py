"""What the name of a model stands for: a bundled checkpoint, a folder or a Hub id, and the pipeline that loads it."""

import json
import logging
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers_sana.checkpoints import BUNDLED, BUNDLED_CONTROLNETS, BUNDLED_LORAS, SANA_EMOJI, SANA_EMOJI_SPRINT
from diffusers_sana.files import model_identity, safetensors_header


logger = logging.getLogger(__name__)

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SMALL = 2**30  # bytes of weights that are also computed in float32 without a thought


def checkpoint_path(model: str) -> str:
    """The folder of a bundled checkpoint, such as "sana-emoji"; any other name is returned unchanged."""
    return (BUNDLED | BUNDLED_CONTROLNETS | BUNDLED_LORAS).get(model, model)


def pipeline_class_name(model: str, revision: str | None = None) -> str:
    """Name of the pipeline class that a checkpoint is for, from its index: reads no weights, imports nothing heavy.

    Args:
        model: bundled name, folder, or id of a Hub repository.
        revision: branch, tag or commit on the Hub.

    Returns:
        The class that `model_index.json` names. "VilaUPipeline" for a transformers checkpoint, which has no such file;
        that pipeline raises if it is another model.

    Raises:
        FileNotFoundError: there is no such model, or it is not a pipeline.
        OSError: the Hub cannot be reached, or the index is damaged.
    """
    place = checkpoint_path(model)
    if place == SANA_EMOJI_SPRINT:
        return "SanaSprintPipeline"  # the parts that it does not share with sana-emoji
    config = read_config(model, "model_index.json", revision)
    if config is not None:
        if not isinstance(config.get("_class_name"), str):
            raise OSError(f"{model}/model_index.json must be JSON with a `_class_name`; download it again")
        return str(config["_class_name"])
    config = read_config(model, "config.json", revision)
    if config is None:
        raise FileNotFoundError(
            f"{model} has neither a model_index.json nor a config.json; name the folder that has one"
        )
    if "_class_name" in config:
        raise FileNotFoundError(
            f"{model} is a component, a {config['_class_name']}; name the folder of a pipeline, with model_index.json"
        )
    return "VilaUPipeline"


def find_pipeline_class(model: str, revision: str | None = None) -> type[Any]:
    """The pipeline class for a checkpoint: ours for Sana, SANA-Sprint and VILA-U, else diffusers' `DiffusionPipeline`.

    Args:
        model: bundled name, folder, or id of a Hub repository.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: as `pipeline_class_name`.
    """
    name = pipeline_class_name(model, revision)
    if name not in ("SanaPipeline", "SanaSprintPipeline", "VilaUPipeline"):
        from diffusers import DiffusionPipeline

        return DiffusionPipeline
    import diffusers_sana

    return getattr(diffusers_sana, name)


def load_on(
    device: str,
    pipeline_class: type[Any],
    model: str,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    **components: Any,
) -> Any:
    """A pipeline on a device, as the command line names them. Warns where the dtype makes it slow.

    Args:
        device: such as "cpu" or "cuda".
        pipeline_class: whose `from_pretrained` loads it.
        model: bundled name, folder, or id of a Hub repository.
        dtype: "float32", "bfloat16" or "float16"; by default `default_dtype`.
        revision, variant: of the Hub repository, and of the weights.
        components: in place of the checkpoint's.

    Raises:
        ValueError: `revision` of a folder, or `variant` of one without such weights.
    """
    import torch

    place = checkpoint_path(model)
    check_version(model, revision, variant)
    hub = {name: value for name, value in (("revision", revision), ("variant", variant)) if value is not None}
    if not Path(place).is_dir() and dtype is None and read_config(model, "model_index.json", revision) is not None:
        place = pipeline_class.download(place, **hub)
    dtype = dtype or default_dtype(place, device, variant)
    if device == "cpu" and dtype == "float16":
        logger.warning("float16 is slow on a CPU; float32 or bfloat16 (--dtype) is faster there.")
    torch_dtype = getattr(torch, dtype)
    if place == SANA_EMOJI_SPRINT:
        components = sprint_components(pipeline_class, torch_dtype) | components
        place = SANA_EMOJI
    pipe = pipeline_class.from_pretrained(place, dtype=torch_dtype, **hub, **components)
    return pipe.to(device, silence_dtype_warnings=True)  # diffusers says that float16 fails there, which ours does not


def check_version(model: str, revision: str | None, variant: str | None) -> None:
    """Raises ValueError for `revision` of a folder, and for `variant` of one without such weights."""
    folder = Path(checkpoint_path(model))
    if revision is not None and folder.is_dir():
        raise ValueError(f"`revision` must be left out for a folder, which has no commits; {model} is one.")
    if variant is None or not folder.is_dir():
        return
    if not any(f".{variant}{end}" in file.name for file in folder.rglob("*") for end in ".-"):  # - before a shard
        raise ValueError(f"`variant` must be one that weights in {model} have, got {variant!r}. Leave it out.")


def default_dtype(place: str, device: str, variant: str | None = None) -> str:
    """The dtype in which a checkpoint is computed if none is asked for.

    On a CPU float32, which is fast and exact there, unless the weights are many. Otherwise the dtype that most of the
    weights have, or bfloat16 for float32.

    Args:
        place: folder of a pipeline or model; of others nothing is known.
        device: such as "cpu" or "cuda".
        variant: of the weights.
    """
    sizes = stored_sizes(Path(place), variant)
    if device == "cpu" and sum(sizes.values()) < SMALL:
        return "float32"
    floats = {FLOATS[name]: size for name, size in sizes.items() if name in FLOATS}
    stored = max(floats, key=floats.__getitem__, default="float32")
    return "bfloat16" if stored == "float32" else stored


def stored_sizes(folder: Path, variant: str | None = None) -> Counter[str]:
    """Bytes of weights in a local folder and its subfolders, by dtype as safetensors names them; empty elsewhere."""
    sizes: Counter[str] = Counter()
    for file in [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")] if folder.is_dir() else []:
        is_variant = variant is not None and f".{variant}" in file.name
        has_variant = variant is not None and any(file.parent.glob(f"*.{variant}*.safetensors"))
        if is_variant or (not has_variant and file.name.count(".") == 1):
            for tensor in safetensors_header(file).values():
                first, last = tensor["data_offsets"]
                sizes[tensor["dtype"]] += last - first
    return sizes


def identity(model: str, revision: str | None = None) -> str:
    """What the name of a model stands for now: a digest of its files, or the commit. See `files.model_identity`."""
    place = checkpoint_path(model)
    indices = ("model_index.json", "config.json")
    index = next((name for name in indices if read_config(model, name, revision) is not None), "README.md")
    found = model_identity(place, index, revision)
    return f"{found}+{model_identity(SANA_EMOJI)}" if place == SANA_EMOJI_SPRINT else found


def read_config(model: str, file: str, revision: str | None = None) -> dict[str, Any] | None:
    """A small JSON file of a model; None if it has no such file.

    Args:
        model: bundled name, folder, or id of a Hub repository.
        file: such as "model_index.json" or "vae/config.json".
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: there is no such model.
        OSError: the Hub cannot be reached, or the file is damaged.
    """
    path = _find(checkpoint_path(model), file, revision)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"an object is expected, not {type(content).__name__}")
    except (ValueError, TypeError) as error:
        raise OSError(f"{path} must be JSON with a `_class_name`; download it again ({error})") from error
    return content


def sprint_components(pipeline_class: type[Any], dtype: Any) -> dict[str, Any]:
    """What the bundled SANA-Sprint does not share with sana-emoji.

    Args:
        pipeline_class: from whose package the transformer is.
        dtype: of the transformer.
    """
    from diffusers import SCMScheduler

    from diffusers_sana.loaders.lora.student import load_student

    library = import_module(pipeline_class.__module__.partition(".")[0])
    options = {"subfolder": "transformer", "dtype": dtype}
    teacher = library.SanaTransformer2DModel.from_pretrained(SANA_EMOJI, **options)
    return {
        "transformer": load_student(teacher, SANA_EMOJI_SPRINT),
        "scheduler": SCMScheduler.from_pretrained(SANA_EMOJI_SPRINT, subfolder="scheduler"),
    }


def _find(place: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder or Hub repository, None if it has no such file."""
    if place and Path(place).is_dir():
        return path if (path := Path(place) / file).is_file() else None
    absent = f"there is no folder {place or repr('')}"
    if place == BUNDLED["vila-u-emoji"]:  # what is on package indices leaves it out, see tools/publish/dist.py
        raise FileNotFoundError(
            "vila-u-emoji is not in this installation; run pip install diffusers_sana_vila_u_emoji, or name a VILA-U"
        )
    if "/" not in place:
        raise FileNotFoundError(f"{absent}, and the bundled checkpoints are {', '.join(BUNDLED)}")
    if place.startswith(("/", ".", "~")) or place.count("/") > 1 or "\\" in place:
        raise FileNotFoundError(f"{absent}, and the Hub has no such repository: names there are OWNER/NAME")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(hf_hub_download(place, file, **options))
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(place, file, **options) is not None:  # the cache knows that there is no such file
            return None
        raise OSError(f"{absent}, and the Hub cannot be reached: {_reason(error)}") from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise OSError(f"{place} is gated: ask for access on its page, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{place} has no `revision` {revision!r}") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{absent}, and the Hub has no such repository: {_reason(error)}") from error
    except OSError as error:
        raise OSError(f"{absent}, and the Hub has no such repository: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first sentence of an error of the Hub."""
    return str(error).partition(". ")[0].splitlines()[0] if str(error) else type(error).__name__
