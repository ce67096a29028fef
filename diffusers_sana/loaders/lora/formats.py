"""LoRA files for Sana from any trainer, converted to the names of diffusers and the scales of PEFT.

A key consists of a prefix, a layer and a part. The layer has its diffusers or its original name, with dots or
underscores, and the part is the factor of the product. `docs/lora.md` lists the formats of the trainers.

    W x + scale * B (A x)        scale = alpha / rank        A `[rank, in]`, B `[out, rank]`

What no LoRA can hold, such as a rotation, becomes a change of `changes.py`, with its parts under `lora_change.`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from diffusers_sana.loaders.lora.changes import CHANGE, PARTS_OF_CHANGE, pieces_of, sizes, split_outputs
from diffusers_sana.loaders.lora.changes import matrix as whole_matrix
from diffusers_sana.loaders.lora.products import (
    DOWN,
    LOHA,
    LOKR,
    MID,
    UP,
    loha_as_matrix,
    lokr_as_matrix,
    lora_as_matrix,
)
from diffusers_sana.loaders.lora.rotations import ROTATIONS, SCALED, rotation_parts
from diffusers_sana.loaders.nvlabs.sana import BLOCK, TOP


logger = logging.get_logger(__name__)

BIAS, MAGNITUDE, ALPHA = "lora_B.bias", "lora_magnitude_vector", "alpha"
WHOLE, WHOLE_BIAS = "diff", "diff_b"  # changes of a whole weight and of its bias
PREFIX = "transformer."  # of keys in files for diffusers pipelines
TEXT_PREFIX = "text_encoder."

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
    "lora_linear_layer.down.weight": DOWN,
    "lora_linear_layer.up.weight": UP,
    MID: MID,
    "lora.mid.weight": MID,
    **{part: part for part in (*LOHA, *LOKR, *ROTATIONS, WHOLE, WHOLE_BIAS)},
    **{CHANGE + part: CHANGE + part for part in PARTS_OF_CHANGE},  # files of ours
}
METHODS = ({DOWN, MID, UP}, {*LOHA}, {*LOKR}, {*ROTATIONS}, {WHOLE, WHOLE_BIAS})
OF_CHANGE = {CHANGE + part for part in PARTS_OF_CHANGE}
FACTORS = set().union(OF_CHANGE, *METHODS)  # a layer needs at least one of them
# Beginning of the last part of a key that no adapter layer supports -> method and advice.
OTHER_METHODS = {
    "lokr_t1": ("LoKr with a Tucker core in its first factor, which no trainer writes", "Train it without that."),
    "oft_": ("a form of OFT of an old PEFT", "Save it again with PEFT 0.17 or later."),
    "w_norm": ("a change of a norm", "Train without norms."),
    "b_norm": ("a change of a norm", "Train without norms."),
    "ia3_l": ("IA3, which scales outputs", "Train a LoRA."),
    "on_input": ("IA3, which scales outputs", "Train a LoRA."),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), ("GLoRA", "Train a LoRA.")),
}
TEXT_ENCODER = ("lora_te", "lycoris_te", "text_encoder", "bundle_emb.")
# A layer of Sana's text encoder, Gemma 2, with dots or underscores: alone, or beside others in a file.
TEXT_LAYER = re.compile(
    r"(?:(?:base_model\.model|lycoris|(?:lora|lycoris)_te1?|(?:lora_)?text_encoder|text_encoders\.\w+\.transformer)[._])?"
    r"(?:model[._])?layers[._](\d+)[._](self_attn|mlp)[._]((?:q|k|v|o|gate|up|down)_proj)"
)
ANY_PREFIX = re.compile(
    r"lora_(?:unet|transformer)[._]|lycoris[._]"
    r"|(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model[._]|transformer(?:\.|_(?!blocks)))?"
)
CONVOLUTIONS = (
    "patch_embed.proj",
    "patch_embedding",
    "ff.conv_inverted",
    "ff.conv_depth",
    "ff.conv_point",
    "ff.conv_temp",
    "x_embedder.proj",
)
VIDEO_BLOCK = {"mlp.t_conv": ("ff.conv_temp",)}  # of SANA-Video; its patch embedding has diffusers' name only
DEPTHWISE = "ff.conv_depth"
OF_TENSOR = r"(\.lora_.+)?"  # PEFT matches patterns with layer names, but with tensor names when it hot-swaps
IN_BLOCK = re.compile(r"(?:transformer_)?blocks_(\d+)_(.+)")
TIME = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
GUIDED_TIME, UNGUIDED_TIME = "time_embed.", "time_embed.emb."  # with and without a guidance embedding

# Of SANA-Video 2.0, whose layers have the authors' names only.
VIDEO2_BLOCK = (
    *(f"attn.{name}" for name in ("qkv", "proj", "output_gate", "beta_proj")),
    *(f"cross_attn.{name}" for name in ("q_linear", "kv_linear", "proj")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
VIDEO2_TOP = (
    *("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "final_layer.linear"),
    *("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"),
    *(f"attn_res.{name}_proj" for name in ("attn", "mlp", "final")),
)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _by_flat_name(layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Original names and ours, flattened -> ours."""
    ours = {_flat(name): (name,) for names in layers.values() for name in names}
    return ours | {_flat(name): names for name, names in layers.items()}


BLOCK_LAYERS = _by_flat_name(BLOCK | VIDEO_BLOCK)
TOP_LAYERS = _by_flat_name(
    {"patch_embedding": ("patch_embedding",), **{theirs: (ours,) for theirs, ours in TOP.items()}}
) | {_flat(prefix + name): (prefix + name,) for prefix in (GUIDED_TIME, UNGUIDED_TIME) for name in TIME.values()}

VIDEO2_BLOCK_LAYERS = {_flat(name): name for name in VIDEO2_BLOCK}
VIDEO2_TOP_LAYERS = {_flat(name): name for name in VIDEO2_TOP}


def convert_sana_lora(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Converts a LoRA of Sana in any known format to the one that `load_lora_weights` of diffusers reads.

    Factors are unchanged, so nothing is rounded: scales become `lora_alpha` and `alpha_pattern` of the metadata. For
    the original fused layers (queries, keys and values in one), each part gets its rows of B and all of A. LoHa and
    LoKr of a small rank become a LoRA with the same product, see `products.py`. What no LoRA can hold gets parts under
    `lora_change.`, see `changes.py`: rotations, DoRA over inputs, whole matrices, LoKr of a high rank. Layers of the
    text encoder of Sana get the prefix `text_encoder.`; other keys of text encoders, such as embeddings of new words,
    are left out with a warning.

    Args:
        state_dict: tensors by their keys in the file.
        metadata: of the file or its `adapter_config.json`: fields of PEFT's config, with or without the prefixes
            `transformer.` and `text_encoder.`. Tensors named `alpha` take precedence.

    Returns:
        The tensors with diffusers' names, and PEFT's fields with the prefixes of the models. Tensors that already have
        diffusers' names are returned unchanged, with `metadata`.

    Raises:
        ValueError: a key is not a layer of Sana, occurs twice, or lacks its other factor (it is named); or the method
            cannot be loaded as an adapter (IA3, GLoRA, changes of norms).
    """
    layers = layers_of(state_dict)
    has_guidance = any("cfg_embedder" in layer for layer in layers)
    return convert_layers(state_dict, metadata, layers, lambda layer, key: _place_in_sana(layer, key, has_guidance))


def convert_sana_video2_lora(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`convert_sana_lora` for SANA-Video 2.0."""
    return convert_layers(state_dict, metadata, layers_of(state_dict), _place_in_video2)


class Place(NamedTuple):
    """Where the tensors of a layer in a file belong.

    Attributes:
        names: of the layer in the model; several for a layer that is fused in the file.
        ratio: of the outputs of these layers.
        is_conv, is_depthwise: what it is.
        prefix: of the model.
    """

    names: tuple[str, ...]
    ratio: tuple[int, ...] = (1,)
    is_conv: bool = False
    is_depthwise: bool = False
    prefix: str = PREFIX


def convert_layers(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None,
    layers: Mapping[str, Mapping[str, str]],
    place_of: Callable[[str, str], Place],
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`convert_sana_lora` for any model.

    Args:
        state_dict, metadata: as there.
        layers: from `layers_of`.
        place_of: the place of a layer in the file, given its name and one of its keys.
    """
    out: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer, keys in layers.items():
        first = next(iter(keys.values()))
        place = place_of(layer, first)
        prefix, names = place.prefix, place.names
        fields = None if metadata is None else fields_of(metadata, prefix)
        parts = {part: state_dict[key] for part, key in keys.items()}
        alpha = parts.pop(ALPHA, None)
        try:
            adapter, rank = _as_adapter(parts, keys, place, alpha, fields)
        except ValueError as error:
            raise ValueError(str(error) if f"{first!r}" in str(error) else f"{first!r}: {error}") from None
        is_rotation = not {f"{CHANGE}in_blocks", f"{CHANGE}out_blocks"}.isdisjoint(adapter)
        if is_rotation or (rank is None and (alpha is not None or metadata is None)):
            scale = 1.0
        elif alpha is not None:
            scale = _number(alpha, keys[ALPHA]) / (rank or 1)
        else:
            scale = lora_scale(fields, names[0] if prefix == TEXT_PREFIX else ANY_PREFIX.sub("", layer, 1), rank)
        if any(part.endswith("_magnitude") for part in adapter) and scale != 1:  # the lengths are those of the sum
            part = next(f"{CHANGE}{part}" for part in ("up", "diff", "kron_1") if f"{CHANGE}{part}" in adapter)
            adapter[part], scale = adapter[part].float() * scale, 1.0
        for name, piece in zip(names, _split(adapter, keys, place.ratio), strict=True):
            if prefix + name in scales:
                raise ValueError(f"{first!r} and another key of the file both map to {name!r}.")
            out |= {f"{prefix}{name}.{part}": tensor for part, tensor in piece.items()}
            scales[prefix + name] = scale
    _separate_dora(out, scales)
    if out.keys() == state_dict.keys():
        return out, None if metadata is None else dict(metadata)
    fields_of_models: dict[str, Any] = {}
    for prefix in (PREFIX, TEXT_PREFIX):
        own = {name.removeprefix(prefix): scale for name, scale in scales.items() if name.startswith(prefix)}
        fields_of_models |= _metadata(out, own, prefix) if own else {}
    return out, fields_of_models


def lora_scale(metadata: Mapping[str, Any] | None, name: str, rank: int | None) -> float:
    """The factor by which PEFT scales a product, from the fields of its config.

    Args:
        metadata: of `convert_sana_lora`; None means 1.
        name: of the layer.
        rank: of its factors; None if they do not determine it, so that the config must.
    """
    if metadata is None:
        return 1.0
    fields = fields_of(metadata)
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


def check_lora_fits(state_dict: Mapping[str, Tensor], model: nn.Module, prefix: str = PREFIX) -> None:
    """Checks that a model has the layers of a LoRA, with matching sizes.

    Args:
        state_dict: with diffusers' names, as returned by `convert_sana_lora`.
        model: the transformer or the text encoder; dense, quantized, or with other adapters.
        prefix: of the model's keys; others are passed over.

    Raises:
        ValueError: naming the first key that does not match.
    """
    changes: dict[str, dict[str, str]] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(prefix):
            continue
        name, _, part = key.removeprefix(prefix).partition(".lora_")
        if part.startswith("change."):
            changes.setdefault(name, {})[part.removeprefix("change.")] = key
        if part not in ("A.weight", "B.weight"):
            continue
        layer = _layer_of(model, name, key)
        if hasattr(layer, "in_features"):
            sides, kernel = (layer.in_features, layer.out_features), None
        else:
            sides, kernel = (layer.in_channels, layer.out_channels), tuple(layer.kernel_size)
        axis, size = (1, sides[0]) if part == "A.weight" else (0, sides[1])
        allowed = {size, 1} if getattr(layer, "groups", 1) > 1 else {size}  # see `lora_layers.py`
        if tensor.shape[axis] not in allowed:
            raise ValueError(
                f"{key!r} must have size {size} in axis {axis} for this model, got the shape {list(tensor.shape)}. "
                "The LoRA was trained for a Sana of another width, or its factors have an unknown form."
            )
        rest = () if kernel is None else (kernel if axis else (1, 1))
        if tuple(tensor.shape[2:]) != rest:
            raise ValueError(
                f"{key!r} must have the axes {list(rest)} after the second for this model, got the shape "
                f"{list(tensor.shape)}: {name!r} is {'a convolution' if kernel else 'a linear layer'} here."
            )
    for name, keys in changes.items():
        first = next(iter(keys.values()))
        outputs, channels, *kernel = _layer_of(model, name, first).weight.shape
        found_outputs, found_inputs = sizes({part: state_dict[key] for part, key in keys.items()})
        inputs = {channels, channels * math.prod(kernel)}  # a gain is per channel, other parts per position
        if found_outputs - {outputs} or found_inputs - inputs:
            raise ValueError(
                f"{first!r} must be of a layer with {outputs} outputs and {channels} inputs for this model, got "
                f"{sorted(found_outputs)} outputs and {sorted(found_inputs)} inputs. It was trained for another model."
            )


def _layer_of(model: nn.Module, name: str, key: str) -> Any:
    """The linear layer or convolution of a key, without adapters."""
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{key!r} must belong to a layer of the model, which has no {name!r}.") from None
    layer = getattr(layer, "base_layer", layer)
    if not hasattr(layer, "in_features") and not hasattr(layer, "in_channels"):
        raise ValueError(f"{key!r} must belong to a linear layer or a convolution, but {name!r} is neither.")
    return layer


def layers_of(
    state_dict: Mapping[str, Tensor], text_layer: re.Pattern[str] | None = TEXT_LAYER
) -> dict[str, dict[str, str]]:
    """The layers that a file changes: name in the file -> part -> key.

    Args:
        state_dict: tensors by their keys in the file.
        text_layer: which layers of text encoders count; None for none.

    Raises:
        ValueError: a key that belongs to no adapter, or no layers at all.
    """
    layers: dict[str, dict[str, str]] = {}
    of_text = [
        key for key in state_dict if key.startswith(TEXT_ENCODER) and not (text_layer and text_layer.match(key))
    ]
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
        if not tensor.is_floating_point() and PARTS[part] not in (ALPHA, SCALED):
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
            f"The file also changes a text encoder in parts that no adapter can hold, or that are of another model "
            f"({len(of_text)} tensors, such as {of_text[0]!r}). They are left out, so images differ from those in "
            "training."
        )
    if not layers:
        what = f"has only such as {of_text[0]!r}" if of_text else "has no factors" if empty else "is empty"
        raise ValueError(f"the file must have a LoRA for the transformer or the text encoder, but {what}.")
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
    return f"{key!r} is not part of a LoRA. A key must end in one of {sorted(PARTS.keys() - OF_CHANGE)}."


def _place_in_sana(layer: str, key: str, has_guidance: bool) -> Place:
    if text := TEXT_LAYER.fullmatch(layer):
        return Place(("layers.{}.{}.{}".format(*text.groups()),), prefix=TEXT_PREFIX)
    names = _layer_names(layer, key, has_guidance)
    return Place(names, (1,) * len(names), names[0].endswith(CONVOLUTIONS), names[0].endswith(DEPTHWISE))


def _place_in_video2(layer: str, key: str) -> Place:
    if text := TEXT_LAYER.fullmatch(layer):
        return Place(("layers.{}.{}.{}".format(*text.groups()),), prefix=TEXT_PREFIX)
    flat = _flat(ANY_PREFIX.sub("", layer, 1))
    block = IN_BLOCK.fullmatch(flat)
    if block and block[2] in VIDEO2_BLOCK_LAYERS:
        return Place((f"blocks.{block[1]}.{VIDEO2_BLOCK_LAYERS[block[2]]}",))
    if flat not in VIDEO2_TOP_LAYERS:
        raise ValueError(
            f"{key!r} is not a layer of SANA-Video 2.0. The LoRA is for a different architecture, or in an unknown"
            " format."
        )
    name = VIDEO2_TOP_LAYERS[flat]
    return Place((name,), is_conv=name.endswith(CONVOLUTIONS))


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


def _as_adapter(
    parts: Mapping[str, Tensor],
    keys: Mapping[str, str],
    place: Place,
    alpha: Tensor | None,
    metadata: Mapping[str, Any] | None,
) -> tuple[dict[str, Tensor], int | None]:
    """The parts of a plain LoRA in the axes of the layer, or of a change; and the rank of the scale."""
    if OF_CHANGE & parts.keys():
        return dict(parts), 1
    first = next(iter(keys.values()))
    factors = {part: tensor for part, tensor in parts.items() if part in FACTORS}
    if len(methods := [method for method in METHODS if method & factors.keys()]) > 1:
        raise ValueError(f"{first!r} must belong to one method, got the factors {sorted(factors)}.")
    is_depthwise, is_conv = place.is_depthwise, place.is_conv
    method, magnitude = methods[0], parts.get(MAGNITUDE)
    rank: int | None = None
    if SCALED in method:
        if magnitude is not None:
            raise ValueError(f"{keys[MAGNITUDE]!r} must belong to a product: no known method scales a rotation so.")
        turn = rotation_parts(factors, alpha, metadata, is_conv)
        return {f"{CHANGE}{part}": tensor for part, tensor in turn.items()}, None
    if WHOLE in method:
        matrix = {"diff": factors[WHOLE]} if WHOLE in factors else {}
    elif DOWN in method:
        _check_halves(parts, keys, is_depthwise)
        matrix, rank = lora_as_matrix(parts)
    else:
        matrix, rank = loha_as_matrix(factors) if "hada_w1_a" in method else lokr_as_matrix(factors)
    is_product = "down" in matrix
    is_own_weight = is_depthwise and (
        DOWN not in method
        or magnitude is not None
        or (matrix["down"].shape[1:] == (1, 3, 3) and matrix["up"].shape[1] == rank)
    )
    if is_own_weight and matrix:  # it is the change of the depthwise weights themselves
        own = whole_matrix({part: tensor.float() for part, tensor in matrix.items()}).to(next(iter(matrix.values())))
        if own.numel() % 9:
            raise ValueError(f"{first!r} must give 3x3 weights per channel, got {own.shape[0]} rows.")
        own = own.reshape(-1, 1, 3, 3)
        matrix = {"diff": own}
        if magnitude is None and WHOLE not in method:
            return {DOWN: own, UP: torch.ones(len(own), 1, 1, 1, dtype=own.dtype)}, rank
    axis = None if magnitude is None else _magnitude_axis(magnitude, keys[MAGNITUDE], matrix)
    if is_product and not is_own_weight and axis != "in":
        factors = {DOWN: matrix["down"], UP: matrix["up"]}
        if is_conv:
            factors = {part: x[..., None, None] if x.ndim == 2 else x for part, x in factors.items()}
        return factors | {part: x for part, x in parts.items() if part in (BIAS, MAGNITUDE)}, rank
    if BIAS in parts:
        raise ValueError(f"{keys[BIAS]!r} must belong to a plain LoRA, got the factors {sorted(factors)}.")
    change = {f"{CHANGE}{part}": tensor for part, tensor in matrix.items()}
    if WHOLE_BIAS in parts:
        change[f"{CHANGE}bias"] = parts[WHOLE_BIAS].flatten()
    if magnitude is not None:
        change[f"{CHANGE}{axis}_magnitude"] = magnitude.flatten()
    return change, rank


def _magnitude_axis(magnitude: Tensor, key: str, matrix: Mapping[str, Tensor]) -> str:
    """Whether DoRA has a length for each input ("in") or output ("out")."""
    (outputs,), (inputs,) = sizes(matrix)
    if magnitude.numel() == outputs and not (key.endswith("dora_scale") and magnitude.shape[0] != outputs):
        return "out"
    # For a convolution, one length covers all positions of the kernel.
    if magnitude.ndim > 1 and magnitude.shape[0] == 1 and inputs % magnitude.numel() == 0:
        return "in"
    raise ValueError(
        f"{key!r} must have one number per output ({outputs}) or per input ({inputs}), got the shape "
        f"{list(magnitude.shape)}."
    )


def _separate_dora(state_dict: dict[str, Tensor], scales: dict[str, float]) -> None:
    """Turns DoRA into changes where other layers of the model have none: PEFT has it in all layers or in no layer."""
    for prefix in (PREFIX, TEXT_PREFIX):
        names = [name for name in scales if name.startswith(prefix) and not name.endswith(DEPTHWISE)]
        dora = [name for name in names if f"{name}.{MAGNITUDE}" in state_dict]
        if len(dora) == len(names):
            continue
        for name in dora:
            down, up, magnitude = (state_dict.pop(f"{name}.{part}") for part in (DOWN, UP, MAGNITUDE))
            parts = {"down": down, "up": up.float() * scales[name], "out_magnitude": magnitude.flatten()}
            state_dict |= {f"{name}.{CHANGE}{part}": tensor for part, tensor in parts.items()}
            scales[name] = 1.0


def _split(
    adapter: Mapping[str, Tensor], keys: Mapping[str, str], ratio: tuple[int, ...]
) -> tuple[dict[str, Tensor], ...]:
    """An adapter of a fused layer as one of each of its layers."""
    first = next(iter(keys.values()))
    if OF_CHANGE & adapter.keys() and len(ratio) > 1:
        change = {part.removeprefix(CHANGE): tensor for part, tensor in adapter.items()}
        try:
            pieces = split_outputs(change, ratio)
        except ValueError as error:
            raise ValueError(f"{first!r}: {error}") from None
        return tuple({f"{CHANGE}{part}": tensor for part, tensor in piece.items()} for piece in pieces)
    if OF_CHANGE & adapter.keys():
        return (dict(adapter),)
    rows = {part: _rows(part, x, keys.get(part, first), adapter[UP], ratio) for part, x in adapter.items()}
    return tuple({part: pieces[index] for part, pieces in rows.items()} for index in range(len(ratio)))


def fields_of(metadata: Mapping[str, Any], prefix: str = PREFIX) -> dict[str, Any]:
    """The fields of one model without its prefix."""
    others = {PREFIX, TEXT_PREFIX} - {prefix}
    return {field.removeprefix(prefix): x for field, x in metadata.items() if not field.startswith(tuple(others))}


def _check_halves(parts: Mapping[str, Tensor], keys: Mapping[str, str], is_depthwise: bool) -> None:
    for half in (DOWN, UP):
        if half not in parts:
            endings = sorted(known for known, part in PARTS.items() if part == half)
            raise ValueError(
                f"{next(iter(keys.values()))!r} must have a second key in the file that ends in one of {endings}."
            )
        if parts[half].ndim not in (2, 4) or not parts[half].numel():
            raise ValueError(f"{keys[half]!r} must have 2 or 4 axes, got the shape {list(parts[half].shape)}.")
    ranks = parts[DOWN].shape[0], parts[UP].shape[1]
    if ranks[0] != ranks[1] and (ranks[0] % ranks[1] or not is_depthwise):  # see `lora_layers.py`
        shapes = list(parts[DOWN].shape), list(parts[UP].shape)
        raise ValueError(f"{keys[DOWN]!r} and {keys[UP]!r} must have the same rank, got the shapes {shapes}.")


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{key!r} must be one number, got the shape {list(tensor.shape)}.")
    return tensor.item()


def _rows(part: str, tensor: Tensor, key: str, up: Tensor, ratio: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Splits a tensor of a fused layer between its layers."""
    if part == MAGNITUDE:
        tensor = tensor.flatten() if up.ndim == 2 else tensor.reshape(1, -1, 1, 1)
    if part == DOWN or len(ratio) == 1:
        return (tensor,) * len(ratio)
    return pieces_of(tensor, ratio, key)


def _metadata(state_dict: Mapping[str, Tensor], scales: Mapping[str, float], prefix: str) -> dict[str, Any]:
    """Fields of PEFT's config for ranks and scales, with patterns for layers that deviate from most others."""
    downs = {name: state_dict.get(f"{prefix}{name}.{DOWN}") for name in scales}
    ranks = {name: 1 if down is None else down.shape[0] for name, down in downs.items()}  # a change counts as one
    alphas = {name: scale * ranks[name] for name, scale in scales.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name + OF_TENSOR: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name + OF_TENSOR: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(scales),
        "use_dora": any(key.startswith(prefix) and key.endswith(MAGNITUDE) for key in state_dict),
        "lora_bias": any(key.startswith(prefix) and key.endswith(BIAS) for key in state_dict),
    }
    return {f"{prefix}{field}": value for field, value in fields.items()}
