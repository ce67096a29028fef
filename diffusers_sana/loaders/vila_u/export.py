"""Writes a VILA-U of ours in the layout of the official checkpoint: the inverse of `convert.py`."""

from pathlib import Path

import torch
from torch import Tensor

from diffusers_sana.loaders.vila_u.convert import JSONS, OFFICIAL, REST, copy_small_files, full_shapes, read_json
from diffusers_sana.loaders.vila_u.names import LLM, PARTS, Weight, official_weights, to_official
from diffusers_sana.loaders.weight_files import MAX_SHARD_BYTES, WeightFiles, write_weights
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig


OFFICIAL_NORM_GROUPS = 32  # hard-coded in the official decoder


def export_vila_u(
    folder: str | Path, target: str | Path, like: str | Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Writes a model in the layout of the official checkpoint, for the official code.

    Args:
        folder: saved by `convert_vila_u` or, after training, by `save_pretrained`.
        target: a new folder.
        like: the converted or official folder from which the model was made, for the small files; needed unless
            `folder` has them itself.
        max_shard_bytes: per file of the language model.

    Returns:
        The keys of the vision tower that are missing, because `folder` has no such weights. The official code does not
        use them and initializes them at random.

    Raises:
        ValueError: a decoder that the official code cannot build, missing small files, or a weight that is missing or
            not in the official checkpoint.
        FileExistsError: `target` is not empty.
    """
    folder, target = Path(folder), Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"`target` must be a new folder, but {target} is not empty.")
    small = _small_files(folder, like)
    ours, config = WeightFiles(folder), VilaUConfig.from_pretrained(folder)
    rest = WeightFiles(small, REST) if (small / REST).is_file() else None
    vision = config.vision_config
    if vision.decoder_norm_groups != OFFICIAL_NORM_GROUPS:
        raise ValueError(
            f"`decoder_norm_groups` must be {OFFICIAL_NORM_GROUPS}, which the official code hard-codes, got "
            f"{vision.decoder_norm_groups} in {folder}."
        )
    weights = list(official_weights(full_shapes(config), vision.num_hidden_layers, vision.num_codebooks))
    unknown = ours.shapes.keys() - {weight.name for weight in weights}
    if unknown:
        raise ValueError(f"{folder} has a weight that the official checkpoint does not have: {sorted(unknown)[0]!r}.")

    def source(weight: Weight) -> tuple[WeightFiles, str] | None:
        if weight.name in ours:
            return ours, weight.name
        return (rest, weight.key) if rest is not None and weight.key in rest else None

    def load(weight: Weight) -> Tensor:
        files, key = source(weight)
        return to_official(weight.name, files.tensor(key)) if files is ours else files.tensor(key)

    present = [weight for weight in weights if source(weight)]
    absent = [weight for weight in weights if not source(weight)]
    if needed := [weight.name for weight in absent if weight.group == "core"]:
        raise ValueError(f"{folder} lacks the weight {needed[0]!r} and {len(needed) - 1} more.")
    for part in PARTS:
        of_part = {weight.key: weight for weight in present if weight.part == part}
        sizes = []
        for key, weight in of_part.items():
            files, name = source(weight)
            sizes.append((key, torch.Size(weight.shape).numel() * files.dtypes[name].itemsize))
        # The official code reads the other two from one file each.
        limit = max_shard_bytes if part == LLM else sum(size for _, size in sizes)
        write_weights(target / part, sizes, lambda key, of_part=of_part: load(of_part[key]), limit)
    copy_small_files(small, target)
    return [weight.key for weight in absent]


def _small_files(folder: Path, like: str | Path | None) -> Path:
    """The folder with the official configs and tokenizer."""
    places = [folder / OFFICIAL, *([Path(like) / OFFICIAL, Path(like)] if like is not None else [])]
    small = next((place for place in places if place.is_dir()), None)
    if small is None:
        raise ValueError(
            f"`like` must be the converted or official folder from which the model was made, got {like!r}: {folder} "
            f"has no folder {OFFICIAL!r} with the small official files."
        )
    for name in JSONS:
        read_json(small / name)
    return small
