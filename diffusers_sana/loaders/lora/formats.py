"""LoRA files for Sana from any trainer, converted to the names of diffusers and the scales of PEFT.

A key consists of a prefix, a layer and a part. The layer has its diffusers or its original name, with dots or
underscores, and the part is the factor of the product. `docs/lora.md` lists the formats of the trainers.

    W x + scale * B (A x)        scale = alpha / rank        A `[rank, in]`, B `[out, rank]`
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from diffusers_sana.loaders.lora.products import LOHA, LOKR, loha_as_lora, lokr_as_lora
from diffusers_sana.loaders.nvlabs.sana import BLOCK, TOP


logger = logging.get_logger(__name__)

DOWN, UP, BIAS, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "alpha"
PREFIX = "transformer."  # of keys in files for diffusers pipelines

PARTS = {
    DOWN: DOWN,  # PEFT, diffusers, and some files for ComfyUI
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
    **{part: part for part in (*LOHA, *LOKR)},
}
FACTORS = {DOWN, UP, *LOHA, *LOKR}  # a layer needs at least one of them
# Beginning of the last part of a key that no adapter layer supports -> method and advice.
OTHER_METHODS = {
    "hada_t": ("LoHa with a Tucker decomposition", "Train it without that."),
    "lokr_t": ("LoKr with a Tucker decomposition", "Train it without that."),
    "lora_mid": ("LoCon with a Tucker decomposition", "Train it without that."),
    "oft_": ("OFT, which rotates weights", "Merge it into the weights with the trainer, or train a LoRA."),
    "diff": ("a change of whole weights", "Add it to the model's weights, or extract a LoRA with the trainer."),
    "w_norm": ("a change of a norm", "Train without norms."),
    "b_norm": ("a change of a norm", "Train without norms."),
    "ia3_l": ("IA3, which scales outputs", "Train a LoRA."),
    "on_input": ("IA3, which scales outputs", "Train a LoRA."),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), ("GLoRA", "Train a LoRA.")),
}
TEXT_ENCODER = ("lora_te", "lycoris_te", "text_encoder", "bundle_emb.")
ANY_PREFIX = re.compile(
    r"lora_(?:unet|transformer)[._]|lycoris[._]"
    r"|(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model[._]|transformer[._](?!blocks))?"
)
CONVOLUTIONS = ("patch_embed.proj", "ff.conv_inverted", "ff.conv_depth", "ff.conv_point")
DEPTHWISE = "ff.conv_depth"
OF_TENSOR = r"(\.lora_.+)?"  # PEFT matches patterns with layer names, but with tensor names when it hot-swaps
IN_BLOCK = re.compile(r"(?:transformer_)?blocks_(\d+)_(.+)")
TIME = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
GUIDED_TIME, UNGUIDED_TIME = "time_embed.", "time_embed.emb."  # with and without a guidance embedding


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _by_flat_name(layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Original names and ours, flattened -> ours."""
    ours = {_flat(name): (name,) for names in layers.values() for name in names}
    return ours | {_flat(name): names for name, names in layers.items()}


BLOCK_LAYERS = _by_flat_name(BLOCK)
TOP_LAYERS = _by_flat_name({theirs: (ours,) for theirs, ours in TOP.items()}) | {
    _flat(prefix + name): (prefix + name,) for prefix in (GUIDED_TIME, UNGUIDED_TIME) for name in TIME.values()
}


def convert_sana_lora(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Converts a LoRA of Sana in any known format to the one that `load_lora_weights` of diffusers reads.

    Factors are unchanged, so nothing is rounded: scales become `lora_alpha` and `alpha_pattern` of the metadata. For
    the original fused layers (queries, keys and values in one), each part gets its rows of B and all of A. LoHa and
    LoKr become a LoRA with the same product, see `products.py`. Keys of text encoders are dropped with a warning.

    Args:
        state_dict: tensors by their keys in the file.
        metadata: of the file or its `adapter_config.json`: fields of PEFT's config, with or without the prefix
            `transformer.`. Tensors named `alpha` take precedence.

    Returns:
        The tensors with diffusers' names, and PEFT's fields with the prefix `transformer.`. Tensors that already have
        diffusers' names are returned unchanged, with `metadata`.

    Raises:
        ValueError: a key is not a layer of Sana, occurs twice, or lacks its other factor (it is named); or the method
            cannot be loaded as an adapter (OFT, changes of whole weights, DoRA over inputs).
    """
    layers = _layers(state_dict)
    has_guidance = any("cfg_embedder" in layer for layer in layers)
    out: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer, keys in layers.items():
        names = _layer_names(layer, next(iter(keys.values())), has_guidance)
        parts = {part: state_dict[key] for part, key in keys.items()}
        alpha = parts.pop(ALPHA, None)
        parts, rank = _as_lora(parts, keys, names[0])
        if rank is None and (alpha is not None or metadata is None):
            scale = 1.0
        elif alpha is not None:
            scale = _number(alpha, keys[ALPHA]) / (rank or 1)
        else:
            scale = lora_scale(metadata, ANY_PREFIX.sub("", layer, 1), rank)
        for part, tensor in parts.items():
            rows = _rows(part, tensor, keys.get(part, next(iter(keys.values()))), parts[UP], len(names))
            for name, piece in zip(names, rows, strict=True):
                if f"{PREFIX}{name}.{part}" in out:
                    raise ValueError(
                        f"{next(iter(keys.values()))!r} and another key of the file both map to {name!r}."
                    )
                out[f"{PREFIX}{name}.{part}"] = piece
                scales[name] = scale
    if out.keys() == state_dict.keys():
        return out, None if metadata is None else dict(metadata)
    return out, _metadata(out, scales)


def lora_scale(metadata: Mapping[str, Any] | None, name: str, rank: int | None) -> float:
    """The factor by which PEFT scales a product, from the fields of its config.

    Args:
        metadata: of `convert_sana_lora`; None means 1.
        name: of the layer.
        rank: of its factors; None if they do not determine it, so that the config must.
    """
    if metadata is None:
        return 1.0
    fields = {field.removeprefix(PREFIX): value for field, value in metadata.items()}
    rank = rank or _by_pattern(fields, "rank_pattern", name, fields.get("r", 1))
    alpha = _by_pattern(fields, "alpha_pattern", name, fields.get("lora_alpha", fields.get("alpha", rank)))
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (rank, alpha)) or rank <= 0:
        raise ValueError(f"the LoRA config must have numbers for the rank and alpha of {name!r}, got {rank}, {alpha}.")
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _by_pattern(fields: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    patterns = fields.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"`{field}` of the LoRA config must be a dictionary, got {patterns!r}.")
    try:
        matching = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
    except re.error as error:
        raise ValueError(f"`{field}` of the LoRA config must have regular expressions: {error}.") from None
    return next(iter(matching), default)


def check_lora_fits(state_dict: Mapping[str, Tensor], transformer: nn.Module) -> None:
    """Checks that a model has the layers of a LoRA, with matching sizes.

    Args:
        state_dict: with diffusers' names, as returned by `convert_sana_lora`.
        transformer: dense, quantized, or with other adapters.

    Raises:
        ValueError: naming the first key that does not match.
    """
    for key, tensor in state_dict.items():
        name, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        try:
            layer: Any = transformer.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{key!r} must belong to a layer of the model, which has no {name!r}.") from None
        layer = getattr(layer, "base_layer", layer)  # if it already has an adapter
        if hasattr(layer, "in_features"):
            sizes, kernel = (layer.in_features, layer.out_features), None
        elif hasattr(layer, "in_channels"):
            sizes, kernel = (layer.in_channels, layer.out_channels), tuple(layer.kernel_size)
        else:
            raise ValueError(f"{key!r} must belong to a linear layer or a convolution, but {name!r} is neither.")
        axis, size = (1, sizes[0]) if part == "A.weight" else (0, sizes[1])
        allowed = {size, 1} if getattr(layer, "groups", 1) > 1 else {size}  # see `lora_layers.py`
        if tensor.shape[axis] not in allowed:
            raise ValueError(
                f"{key!r} must have size {size} in axis {axis} for this model, got the shape {list(tensor.shape)}. "
                "The LoRA was trained for a Sana of another width, or its factors have an unknown form."
            )
        sides = () if kernel is None else (kernel if axis else (1, 1))
        if tuple(tensor.shape[2:]) != sides:
            raise ValueError(
                f"{key!r} must have the axes {list(sides)} after the second for this model, got the shape "
                f"{list(tensor.shape)}: {name!r} is {'a convolution' if kernel else 'a linear layer'} here."
            )


def _layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Layer name in the file -> part -> key."""
    layers: dict[str, dict[str, str]] = {}
    of_text = [key for key in state_dict if key.startswith(TEXT_ENCODER)]
    for key, tensor in state_dict.items():
        if key in of_text:
            continue
        plain = key.replace(".default.", ".")  # PEFT's default adapter name
        part = next((part for part in PARTS if plain.endswith(f".{part}")), None)
        if part is None:
            raise ValueError(_what_else(key))
        parts = layers.setdefault(plain.removesuffix(f".{part}"), {})
        if PARTS[part] in parts:
            raise ValueError(f"{key!r} and {parts[PARTS[part]]!r} are the same tensor of a layer.")
        if not tensor.is_floating_point() and part != ALPHA:
            raise ValueError(f"{key!r} must be floating-point, got {tensor.dtype}.")
        parts[PARTS[part]] = key
    empty = [layer for layer, parts in layers.items() if not FACTORS & parts.keys()]
    for layer in empty:
        parts = layers.pop(layer)
        if parts.keys() != {ALPHA}:
            raise ValueError(f"{next(iter(parts.values()))!r} must have LoRA factors next to it in the file.")
    if empty:
        logger.warning(
            f"{len(empty)} layers of the LoRA have an `alpha` but no factors, such as {empty[0]!r}, and are ignored."
        )
    if of_text:
        logger.warning(
            f"The file also changes a text encoder ({len(of_text)} tensors, such as {of_text[0]!r}). LoRA of the text "
            "encoder is not supported: only the transformer part is loaded, so images differ from those in training."
        )
    if not layers:
        what = "all of it is for a text encoder" if of_text else "has no factors" if empty else "is empty"
        raise ValueError(f"the file must have a LoRA for the transformer, but {what}.")
    return layers


def _what_else(key: str) -> str:
    """The message for a key that is not part of a LoRA."""
    last = re.sub(r"\.weight$", "", key).rpartition(".")[2]
    for start, (method, advice) in OTHER_METHODS.items():
        if last.startswith(start):
            return f"{key!r} belongs to {method}. It cannot be loaded as an adapter. {advice}"
    if key.endswith((".weight", ".bias")):
        return (
            f"{key!r} is a whole weight of a layer (`modules_to_save` or `bias` of PEFT), not a factor of a LoRA. "
            "Train without these, or merge the file into the model with PEFT."
        )
    return f"{key!r} is not part of a LoRA. A key must end in one of {sorted(PARTS)}."


def _layer_names(layer: str, key: str, has_guidance: bool) -> tuple[str, ...]:
    flat = _flat(ANY_PREFIX.sub("", layer, 1))
    times = {_flat(name): (GUIDED_TIME if has_guidance else UNGUIDED_TIME) + ours for name, ours in TIME.items()}
    block = IN_BLOCK.fullmatch(flat)
    if block and block[2] in BLOCK_LAYERS:
        return tuple(f"transformer_blocks.{block[1]}.{name}" for name in BLOCK_LAYERS[block[2]])
    if flat in TOP_LAYERS:
        return TOP_LAYERS[flat]
    if flat in times:
        return (times[flat],)
    raise ValueError(
        f"{key!r} is not a layer of Sana. The LoRA is for a different architecture, or in an unknown format."
    )


def _as_lora(parts: Mapping[str, Tensor], keys: Mapping[str, str], name: str) -> tuple[dict[str, Tensor], int | None]:
    """`DOWN`, `UP` and the other parts of a plain LoRA in the axes of the layer `name`, and the rank of its scale."""
    first = next(iter(keys.values()))
    other_parts = {part: tensor for part, tensor in parts.items() if part not in FACTORS}
    is_loha, is_lokr = (any(part in parts for part in method) for method in (LOHA, LOKR))
    rank: int | None
    if is_loha or is_lokr:
        factors = {part: tensor for part, tensor in parts.items() if part in FACTORS}
        if factors.keys() - (LOHA if is_loha else LOKR):
            raise ValueError(f"{first!r} must belong to one method, got the factors {sorted(factors)}.")
        try:
            down, up, rank = loha_as_lora(factors) if is_loha else lokr_as_lora(factors)
        except ValueError as error:
            raise ValueError(f"{first!r}: {error}") from None
        is_own_weight = name.endswith(DEPTHWISE)
    else:
        _check_halves(parts, keys, name)
        down, up = parts[DOWN], parts[UP]
        rank = down.shape[0]
        is_own_weight = name.endswith(DEPTHWISE) and down.shape[1:] == (1, 3, 3) and up.shape[1] == rank
    if is_own_weight:  # the product is the change of the depthwise weights themselves
        if down[0].numel() * up.shape[0] % 9:
            raise ValueError(f"{first!r} must give 3x3 weights per channel, got {up.shape[0]} rows.")
        down = (up.flatten(1).float() @ down.flatten(1).float()).to(down.dtype).reshape(-1, 1, 3, 3)
        up = torch.ones(down.shape[0], 1, dtype=down.dtype)
    if MAGNITUDE in parts and name.endswith(DEPTHWISE):
        raise ValueError(
            f"{keys[MAGNITUDE]!r} is DoRA of a depthwise convolution, which adapters do not support. "
            "Train without that layer (OneTrainer: the layer filter attn-only)."
        )
    is_conv = name.endswith(CONVOLUTIONS)
    down, up = (tensor[..., None, None] if is_conv and tensor.ndim == 2 else tensor for tensor in (down, up))
    return {DOWN: down, UP: up, **other_parts}, rank


def _check_halves(parts: Mapping[str, Tensor], keys: Mapping[str, str], name: str) -> None:
    for half in (DOWN, UP):
        if half not in parts:
            endings = sorted(known for known, part in PARTS.items() if part == half)
            raise ValueError(
                f"{next(iter(keys.values()))!r} must have a second key in the file that ends in one of {endings}."
            )
        if parts[half].ndim not in (2, 4) or not parts[half].numel():
            raise ValueError(f"{keys[half]!r} must have 2 or 4 axes, got the shape {list(parts[half].shape)}.")
    ranks = parts[DOWN].shape[0], parts[UP].shape[1]
    if ranks[0] != ranks[1] and (ranks[0] % ranks[1] or not name.endswith(DEPTHWISE)):  # see `lora_layers.py`
        shapes = list(parts[DOWN].shape), list(parts[UP].shape)
        raise ValueError(f"{keys[DOWN]!r} and {keys[UP]!r} must have the same rank, got the shapes {shapes}.")


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{key!r} must be one number, got the shape {list(tensor.shape)}.")
    return tensor.item()


def _rows(part: str, tensor: Tensor, key: str, up: Tensor, number: int) -> tuple[Tensor, ...]:
    """Splits a tensor of a fused layer between its `number` layers."""
    if part == MAGNITUDE:
        is_across = key.endswith("dora_scale") and tuple(tensor.shape[:1]) != tuple(up.shape[:1])
        if is_across or tensor.numel() != up.shape[0]:
            raise ValueError(
                f"{key!r} must have one number per output ({up.shape[0]}), got the shape {list(tensor.shape)}. DoRA "
                "over inputs scales the input of the layer, which adapters do not support: train it over outputs "
                "(OneTrainer: lora_decompose_output_axis)."
            )
        tensor = tensor.flatten() if up.ndim == 2 else tensor.reshape(1, -1, 1, 1)
    if part == DOWN or number == 1:
        return (tensor,) * number
    if not tensor.ndim or tensor.shape[0] % number:
        raise ValueError(f"{key!r} must have {number} equal parts, got the shape {list(tensor.shape)}.")
    return tuple(piece.contiguous() for piece in tensor.chunk(number))


def _metadata(state_dict: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Any]:
    """Fields of PEFT's config for ranks and scales, with patterns for layers that deviate from most others."""
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
