"""Converts the official checkpoint of VILA-U, `mit-han-lab/vila-u-7b-256`, to one folder of ours.

Tensors are renamed, and redundant copies are compared and stored once; nothing is computed. One shard is in memory at
a time. See `docs/vila_u.md`.
"""

import copy
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from diffusers_sana import files
from diffusers_sana.loaders.vila_u.config import JsonReader, model_config
from diffusers_sana.loaders.vila_u.names import (
    CODEBOOK,
    LLM,
    PARTS,
    PROJECTOR,
    TOWER,
    Weight,
    official_weights,
    to_ours,
)
from diffusers_sana.loaders.weight_files import INDEX, MAX_SHARD_BYTES, WeightFiles, write_weights
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, IMAGE_END, IMAGE_START, VIDEO_END, VIDEO_START


logger = logging.getLogger(__name__)

JSONS = (
    "config.json",
    f"{LLM}/config.json",
    f"{LLM}/generation_config.json",
    f"{LLM}/added_tokens.json",
    f"{PROJECTOR}/config.json",
    f"{TOWER}/config.json",
    f"{TOWER}/preprocessor_config.json",
)
# In our folder, next to the model: the original small files, and weights that the model does not have.
OFFICIAL, REST = "official", "rest.safetensors"
SMALL_FILES = (".json", ".model", ".txt", ".jinja")


@dataclass
class VilaUPlan:
    """What a conversion will do; derived from headers, without reading weights.

    Attributes:
        config: of our model.
        weights: every tensor of the checkpoint; `Weight.name` is where it goes.
        left_out: groups of weights that are not converted.
        sources: the three folders of weights, by name.
        jsons: the JSON files that the conversion reads.
    """

    config: VilaUConfig
    weights: list[Weight]
    left_out: tuple[str, ...]
    sources: dict[str, WeightFiles]
    jsons: dict[str, Any]

    @property
    def taken(self) -> dict[str, Weight]:
        """The weights of our model by their names."""
        return {
            weight.name: weight
            for weight in self.weights
            if weight.name and not weight.is_copy and weight.group not in self.left_out
        }

    def nbytes(self, weight: Weight) -> int:
        """Size of a tensor of the checkpoint."""
        return self.sources[weight.part].nbytes(weight.key)

    def load(self, weight: Weight) -> Tensor:
        """Reads a tensor of the checkpoint."""
        return self.sources[weight.part].tensor(weight.key)

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for weight in self.weights:
            kind = "copy" if weight.is_copy else "left out" if weight.group in self.left_out else "converted"
            groups.setdefault(f"{kind}: {weight.part}, {weight.group}", []).append(self.nbytes(weight))
        return "\n".join(f"{name}: {len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB" for name, sizes in groups.items())


def plan_vila_u(
    folder: str | Path,
    semantic_head: bool = False,
    text_tower: bool = False,
    encoder_heads: int | None = None,
    any_vocabulary: bool = False,
) -> VilaUPlan:
    """Checks an official checkpoint and returns what becomes of every tensor. A dry run that reads headers only.

    Args:
        folder: local folder with `llm`, `mm_projector` and `vision_tower`.
        semantic_head: keep the last encoder block and the pooling of SigLIP.
        text_tower: keep SigLIP's text tower.
        encoder_heads, any_vocabulary: see `model_config`.

    Raises:
        ValueError: a file or tensor is missing, damaged, unknown or of another shape, or a config contradicts the
            tensors or has unknown values.
    """
    folder = Path(folder)
    jsons = {name: read_json(folder / name) for name in JSONS}
    sources = {part: WeightFiles(folder / part) for part in PARTS}
    shapes = {part: source.shapes for part, source in sources.items()}
    ids = dict(jsons[f"{LLM}/added_tokens.json"])
    missing = [token for token in ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>") if token not in ids]
    if missing:
        raise ValueError(f"{folder / LLM / 'added_tokens.json'} must have {missing}, got {sorted(ids)}.")
    ids.setdefault("<image>", shapes[LLM].get("model.embed_tokens.weight", (0,))[0])
    config = model_config(jsons, shapes, ids, encoder_heads, any_vocabulary)
    vision = config.vision_config
    expected = official_weights(full_shapes(config), vision.num_hidden_layers, vision.num_codebooks)
    weights = _without_absent_copies(list(expected), sources)
    _check_weights(weights, sources)

    vision.use_semantic_head, vision.use_text_tower = semantic_head, text_tower
    kept = {"semantic head": semantic_head, "text tower": text_tower}
    config.dtype = sources[LLM].dtypes["lm_head.weight"]
    config.architectures = [VilaUForConditionalGeneration.__name__]
    left_out = ("ema", *(name for name, is_kept in kept.items() if not is_kept))
    return VilaUPlan(config, weights, left_out, sources, jsons)


def convert_vila_u(
    folder: str | Path,
    target: str | Path,
    keep_rest: bool = False,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **options: Any,
) -> VilaUPlan:
    """Writes a folder of ours: model, generation config, processor with tokenizer, and the small official files.

    Args:
        folder, options: see `plan_vila_u`.
        target: a new folder.
        keep_rest: also store the weights that our model does not have, in a file that only `export_vila_u` reads.
        tokenizer: instead of that in `llm`.
        max_shard_bytes: per file, and in memory at a time.

    Raises:
        ValueError: see `plan_vila_u`; copies of a tensor differ, or the tokenizer has other ids.
        FileExistsError: `target` is not empty.
    """
    folder, target = Path(folder), Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"`target` must be a new folder, but {target} is not empty.")
    plan = plan_vila_u(folder, **options)
    processor = _processor(folder, plan, tokenizer)
    taken = plan.taken
    _check_copies(plan)
    sizes = [(name, plan.nbytes(weight)) for name, weight in taken.items()]
    write_weights(target, sizes, lambda name: to_ours(name, plan.load(taken[name])), max_shard_bytes)
    plan.config.save_pretrained(target)
    processor.save_pretrained(target)
    shutil.copyfile(folder / LLM / "generation_config.json", target / "generation_config.json")
    copy_small_files(folder, target / OFFICIAL)
    if keep_rest:
        rest = {weight.key: plan.load(weight).clone() for weight in plan.weights if weight.group in plan.left_out}
        save_file(rest, target / OFFICIAL / REST)
    return plan


def full_shapes(config: VilaUConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the model that a config describes, with semantic head and text tower."""
    config = copy.deepcopy(config)
    config.vision_config.use_semantic_head = config.vision_config.use_text_tower = True
    with torch.device("meta"):
        model = VilaUForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_json(path: Path) -> Any:
    """The content of a JSON file of the official checkpoint.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, but belongs to the official checkpoint. Download the folder again.")
    return files.read_json(path)


def copy_small_files(folder: Path, target: Path) -> None:
    """Copies configs and tokenizer of a checkpoint in the official layout."""
    for part in ("", *PARTS):
        (target / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((folder / part).iterdir()):
            if path.suffix in SMALL_FILES and path.name != INDEX:
                shutil.copyfile(path, target / part / path.name)


def _without_absent_copies(weights: list[Weight], sources: dict[str, WeightFiles]) -> list[Weight]:
    """Drops absent copies of tensors that have several names; the first present one is no longer a copy.

    The released folder has all copies. `save_pretrained` of the original version of transformers writes one.
    """

    def is_present(weight: Weight) -> bool:
        return weight.key in sources[weight.part].shapes

    found = {weight.name for weight in weights if weight.name and is_present(weight)}
    firsts = {weight.name for weight in weights if weight.name and not weight.is_copy and is_present(weight)}
    present = []
    for weight in weights:
        if not is_present(weight) and (weight.is_copy or weight.name in found):
            continue
        if weight.is_copy and weight.name and weight.name not in firsts:
            weight = replace(weight, is_copy=False)
            firsts.add(weight.name)
        present.append(weight)
    return present


def _check_weights(weights: list[Weight], sources: dict[str, WeightFiles]) -> None:
    for weight in weights:
        shape = sources[weight.part].shapes.get(weight.key)
        if shape != weight.shape:
            raise ValueError(
                f"{weight} must have the shape {list(weight.shape)} to match configs and other tensors, but "
                + ("is missing." if shape is None else f"has {list(shape)}.")
            )
    known = {(weight.part, weight.key) for weight in weights}
    unknown = [
        f"{part}/{key}" for part, source in sources.items() for key in source.shapes if (part, key) not in known
    ]
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors are not in the model, such as {unknown[0]!r}. The checkpoint is for a different "
            "architecture."
        )


def _check_copies(plan: VilaUPlan) -> None:
    """Compares copies of a tensor, with two tensors in memory at a time."""
    firsts = {weight.name: weight for weight in plan.weights if weight.name and not weight.is_copy}
    for weight in plan.weights:
        if weight.is_copy and weight.name and not torch.equal(plan.load(weight), plan.load(firsts[weight.name])):
            raise ValueError(f"{weight} is stored as a copy of {firsts[weight.name]}, but differs from it.")
    if plan.load(firsts[CODEBOOK])[-1].any():
        logger.warning("the padding row of the codebook is not zero; it is dropped, because no code refers to it.")


def _processor(folder: Path, plan: VilaUPlan, tokenizer: Any) -> VilaUProcessor:
    config, vision = plan.config, plan.config.vision_config
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / LLM)
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(
                f"the tokenizer in {folder / LLM} cannot be read: {error} A `tokenizer.model` needs the packages "
                "sentencepiece and protobuf; or pass `tokenizer`."
            ) from error
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.padding_side = "left"
    expected = {
        IMAGE: config.image_token_id,
        IMAGE_START: config.image_start_token_id,
        IMAGE_END: config.image_end_token_id,
        VIDEO_START: config.video_start_token_id,
        VIDEO_END: config.video_end_token_id,
    }
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if ids != expected:
        raise ValueError(f"the tokenizer must have the ids {expected} of `added_tokens.json`, got {ids}.")
    side = {"height": vision.image_size, "width": vision.image_size}
    preprocessor = JsonReader(plan.jsons[f"{TOWER}/preprocessor_config.json"], f"{TOWER}/preprocessor_config.json")
    for name in ("size", "crop_size"):
        if name in preprocessor.content:
            size = preprocessor.content[name]
            sides = set(size.values()) if isinstance(size, dict) else {size}
            if sides != {vision.image_size}:
                raise ValueError(f"{preprocessor.origin}: {name!r} must be {vision.image_size}, got {size}.")
    image_processor = VilaUImageProcessor(
        size=side,
        image_mean=preprocessor.get("image_mean", list),
        image_std=preprocessor.get("image_std", list),
        image_aspect_ratio=plan.jsons["config.json"].get("image_aspect_ratio", "resize"),
    )
    return VilaUProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=vision.num_image_tokens,
        num_video_frames=config.num_video_frames,
    )
