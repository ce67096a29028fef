"""LoRA files for Sana, whoever wrote them: to the names of diffusers and the scales of PEFT.

A key is a prefix, a layer and a part. The prefix says little, the layer has diffusers' name or the authors', with dots
or with underscores, and the part says which factor of the product it is. See `docs/lora.md` for who writes what.

    W x + scale * B (A x)        scale = alpha / rank        A `[rank, in]`, B `[out, rank]`
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_sana.models.transformers.official_sana import BLOCK, TOP


DOWN, UP, BIAS, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
PREFIX = "transformer."  # of a file that pipelines of diffusers load

PARTS = {
    DOWN: DOWN,  # PEFT, diffusers, and some who write for ComfyUI
    UP: UP,
    BIAS: BIAS,
    MAGNITUDE: MAGNITUDE,
    f"{MAGNITUDE}.weight": MAGNITUDE,
    "lora_down.weight": DOWN,  # kohya, LyCORIS, OneTrainer
    "lora_up.weight": UP,
    "dora_scale": MAGNITUDE,
    ALPHA: ALPHA,
    "lora.down.weight": DOWN,  # diffusers before PEFT
    "lora.up.weight": UP,
}
OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a Tucker decomposition",
    "diff": "whole changes of weights",
    "w_norm": "whole changes of norms",
}
TEXT_ENCODER = ("lora_te", "lycoris_te", "text_encoder.", "bundle_emb.")
ANY_PREFIX = re.compile(
    r"lora_(?:unet|transformer)_|lycoris_|(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.|transformer\.)?"
)
OF_TENSOR = r"(\.lora_.+)?"  # PEFT looks patterns up by a layer's name, but by a tensor's name when it hot-swaps
IN_BLOCK = re.compile(r"(?:transformer_)?blocks_(\d+)_(.+)")
TIME = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
GUIDED_TIME, UNGUIDED_TIME = "time_embed.", "time_embed.emb."  # with and without an embedding of guidance beside it


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _by_flat_name(layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Authors' names and ours, flattened, to ours."""
    ours = {_flat(name): (name,) for names in layers.values() for name in names}
    return ours | {_flat(name): names for name, names in layers.items()}


BLOCK_LAYERS = _by_flat_name(BLOCK)
TOP_LAYERS = _by_flat_name({theirs: (ours,) for theirs, ours in TOP.items()}) | {
    _flat(prefix + name): (prefix + name,) for prefix in (GUIDED_TIME, UNGUIDED_TIME) for name in TIME.values()
}


def convert_sana_lora(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A LoRA of Sana in any of the known formats, as `load_lora_weights` of diffusers reads it.

    Weights are not changed, so nothing is rounded: scales become `lora_alpha` and `alpha_pattern` of the metadata. Of
    the authors' fused layers (queries, keys and values in one), each part gets its rows of B and all of A.

    Args:
        state_dict: tensors by their keys in the file.
        metadata: what the file or the `adapter_config.json` beside it says: fields of PEFT's `LoraConfig`, with or
            without `transformer.` before their names. Tensors called `alpha` count for more.

    Returns:
        The tensors by diffusers' names, and PEFT's fields with `transformer.` before their names. What is by
        diffusers' names already comes back as it is, with `metadata`.

    Raises:
        ValueError: naming a key that is no LoRA's or no layer of Sana, is there twice, lacks its other half, or
            belongs to the text encoder; a method that is no LoRA (LoHa, LoKr, OFT).
    """
    layers = _layers(state_dict)
    guided = any("cfg_embedder" in layer for layer in layers)
    out: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer, keys in layers.items():
        parts = {part: state_dict[key] for part, key in keys.items()}
        _check_halves(parts, keys)
        rank = parts[DOWN].shape[0]
        if ALPHA in parts:
            scale = parts.pop(ALPHA).item() / rank
        else:
            scale = lora_scale(metadata, ANY_PREFIX.sub("", layer, 1), rank)
        names = _our_names(layer, next(iter(keys.values())), guided)
        for part, tensor in parts.items():
            rows = _rows(part, tensor, keys[part], parts[UP], len(names))
            for name, piece in zip(names, rows, strict=True):
                if f"{PREFIX}{name}.{part}" in out:
                    raise ValueError(f"{keys[part]!r} is {name!r}, which another key of the file is too.")
                out[f"{PREFIX}{name}.{part}"] = piece
                scales[name] = scale
    if out.keys() == state_dict.keys():
        return out, None if metadata is None else dict(metadata)
    return out, _metadata(out, scales)


def lora_scale(metadata: Mapping[str, Any] | None, name: str, rank: int) -> float:
    """What PEFT multiplies the product B A with, by the fields of its config.

    Args:
        metadata: of `convert_sana_lora`; None means 1.
        name: of the layer.
        rank: of its factors.
    """
    if metadata is None:
        return 1.0
    fields = {field.removeprefix(PREFIX): value for field, value in metadata.items()}
    matching = (a for pattern, a in fields.get("alpha_pattern", {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(matching, fields["lora_alpha"])
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def check_lora_fits(state_dict: Mapping[str, Tensor], transformer: nn.Module) -> None:
    """That a model has the layers of a LoRA, and of its sizes.

    Args:
        state_dict: by diffusers' names, as `convert_sana_lora` returns it.
        transformer: dense, quantized, or with other adapters.

    Raises:
        ValueError: naming the first key that does not fit.
    """
    for key, tensor in state_dict.items():
        name, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        try:
            layer: Any = transformer.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{key!r} must belong to a layer of the model, which has no {name!r}.") from None
        layer = getattr(layer, "base_layer", layer)  # where an adapter is already
        if hasattr(layer, "in_features"):
            sizes = layer.in_features, layer.out_features
        else:
            sizes = layer.in_channels // layer.groups, layer.out_channels
        axis, size = (1, sizes[0]) if part == "A.weight" else (0, sizes[1])
        if tensor.shape[axis] != size:
            raise ValueError(
                f"{key!r} must have {size} at axis {axis} for this model, but has the shape {list(tensor.shape)}. The"
                " LoRA was trained for a Sana of another size."
            )


def _layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Layer as the file names it -> part -> key."""
    layers: dict[str, dict[str, str]] = {}
    for key in state_dict:
        plain = key.replace(".default.", ".")  # PEFT's name of an adapter without one
        if key.startswith(TEXT_ENCODER):
            raise ValueError(
                f"{key!r} belongs to the text encoder, but LoRA of Sana is for the transformer alone. Leave such keys"
                " out, or train without them: the pictures will then not be those of the training."
            )
        part = next((part for part in PARTS if plain.endswith(f".{part}")), None)
        if part is None:
            last = re.sub(r"\.weight$", "", key).rpartition(".")[2]
            method = next((method for start, method in OTHER_METHODS.items() if last.startswith(start)), None)
            what = f"belongs to {method}, which is no LoRA" if method else "is no part of a LoRA"
            raise ValueError(f"{key!r} {what}. A key must end in one of {sorted(PARTS)}. Train a LoRA or LoCon.")
        parts = layers.setdefault(plain.removesuffix(f".{part}"), {})
        if PARTS[part] in parts:
            raise ValueError(f"{key!r} is what {parts[PARTS[part]]!r} is too.")
        parts[PARTS[part]] = key
    if not layers:
        raise ValueError("the file must hold a LoRA, but is empty.")
    return layers


def _our_names(layer: str, key: str, guided: bool) -> tuple[str, ...]:
    flat = _flat(ANY_PREFIX.sub("", layer, 1))
    times = {_flat(name): (GUIDED_TIME if guided else UNGUIDED_TIME) + ours for name, ours in TIME.items()}
    block = IN_BLOCK.fullmatch(flat)
    if block and block[2] in BLOCK_LAYERS:
        return tuple(f"transformer_blocks.{block[1]}.{name}" for name in BLOCK_LAYERS[block[2]])
    if flat in TOP_LAYERS:
        return TOP_LAYERS[flat]
    if flat in times:
        return (times[flat],)
    raise ValueError(f"{key!r} names no layer of Sana: the LoRA is for another model, or of an unknown format.")


def _check_halves(parts: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
    for half in (DOWN, UP):
        if half not in parts:
            others = sorted(known for known, part in PARTS.items() if part == half)
            raise ValueError(f"{next(iter(keys.values()))!r} must have a second key in the file, ending in {others}.")
    if parts[DOWN].shape[0] != parts[UP].shape[1]:
        shapes = list(parts[DOWN].shape), list(parts[UP].shape)
        raise ValueError(f"{keys[DOWN]!r} and {keys[UP]!r} must have one rank, but their shapes are {shapes}.")


def _rows(part: str, tensor: Tensor, key: str, up: Tensor, number: int) -> tuple[Tensor, ...]:
    """What each of `number` layers, fused into one, has of a tensor."""
    if part == MAGNITUDE:
        outputs = tensor.shape[0] if key.endswith("dora_scale") else tensor.numel()
        if outputs != up.shape[0]:
            raise ValueError(
                f"{key!r} must have a number for each of {up.shape[0]} outputs, but has the shape"
                f" {list(tensor.shape)}. DoRA of inputs cannot be loaded: train it along outputs."
            )
        tensor = tensor.flatten() if up.ndim == 2 else tensor.reshape(1, -1, 1, 1)
    if part == DOWN or number == 1:
        return (tensor,) * number
    if tensor.shape[0] % number:
        raise ValueError(f"{key!r} must have {number} equal parts, but has {tensor.shape[0]} rows.")
    return tuple(piece.contiguous() for piece in tensor.chunk(number))


def _metadata(state_dict: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Any]:
    """Fields of PEFT's config that tell ranks and scales; patterns where a layer is not like most."""
    ranks = {name: state_dict[f"{PREFIX}{name}.{DOWN}"].shape[0] for name in scales}
    alphas = {name: scale * ranks[name] for name, scale in scales.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name + OF_TENSOR: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name + OF_TENSOR: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(scales),
        "use_dora": any(key.endswith(MAGNITUDE) for key in state_dict),
        "lora_bias": any(key.endswith(BIAS) for key in state_dict),
    }
    return {f"{PREFIX}{field}": value for field, value in fields.items()}
