"""ComfyUI's files: one safetensors file in ComfyUI's names, with a format per layer.

A layer L has `L.weight`, further tensors, and `L.comfy_quant`, which is JSON in bytes and names the format. A header
`_quantization_metadata` says the same of all layers. Those of rotated or 8-bit weights are in `comfy_convrot.py`.
Sources: comfy-kitchen 0.2.40, ComfyUI `comfy/ops.py` and `comfy/quant_ops.py`, comfy-quants, convert_to_quant.

    svdquant_w4a4   our int4 layer, in rows or in tiles of 128 rows, under two styles of keys
    nvfp4           our nvfp4 layer without a branch; halves of bytes swapped, scales swizzled, one factor a tensor
    awq_w4a16       4-bit weights `(code - 8) * scale + zero` with 16-bit activations
    convrot_w4a4, int8_tensorwise, asym_w4a8_int8, float8_e4m3fn
                    our int4, int8 and float8 layers with one scale a row, without smoothing factors and a branch
    float8_e5m2     floating-point numbers of two digits, one scale a tensor; read as 16-bit weights

Legend: N output features, K input features, r rank.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import nonzero, swizzled, unswizzled
from diffusers_sana.loaders.nunchaku.layers import fits_awq, is_plain, without_shift
from diffusers_sana.loaders.quantized import comfy_convrot
from diffusers_sana.loaders.quantized.assemble import Conversion, Reading, convert_by_names
from diffusers_sana.loaders.quantized.checkpoint import METADATA_OF_COMFY, Checkpoint
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer, one_factor
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written, refuse_layers
from diffusers_sana.loaders.quantized.names import Scheme, file_names
from diffusers_sana.loaders.quantized.rows import pairs, transposed, unpairs


logger = logging.getLogger(__name__)

NAME = "ComfyUI"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
GROUP = 64
TILED = "kitchen_tile_packed_w4a4"
IN_8_BITS = ("int8", "float8")
# Behind GELU, whose output runtimes may shift to use codes without a sign; for files that do not say.
BEHIND_GELU = ("img_mlp.net.2", "txt_mlp.net.2", "ff.net.2")
_BLOCK, _SINGLE = "transformer_blocks.*.", "single_transformer_blocks.*."
SCHEMES: dict[str, Scheme] = {
    "FluxTransformer2DModel": {
        "single_blocks.*.linear1": tuple(f"{_SINGLE}{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        "single_blocks.*.linear2": (f"{_SINGLE}proj_out",),
        "single_blocks.*.modulation.lin": (f"{_SINGLE}norm.linear",),
        "single_blocks.*.norm.query_norm": (f"{_SINGLE}attn.norm_q",),
        "single_blocks.*.norm.key_norm": (f"{_SINGLE}attn.norm_k",),
        "double_blocks.*.img_attn.qkv": tuple(f"{_BLOCK}attn.to_{x}" for x in "qkv"),
        "double_blocks.*.txt_attn.qkv": tuple(f"{_BLOCK}attn.add_{x}_proj" for x in "qkv"),
        "double_blocks.*.img_attn.proj": (f"{_BLOCK}attn.to_out.0",),
        "double_blocks.*.txt_attn.proj": (f"{_BLOCK}attn.to_add_out",),
        "double_blocks.*.img_attn.norm.query_norm": (f"{_BLOCK}attn.norm_q",),
        "double_blocks.*.img_attn.norm.key_norm": (f"{_BLOCK}attn.norm_k",),
        "double_blocks.*.txt_attn.norm.query_norm": (f"{_BLOCK}attn.norm_added_q",),
        "double_blocks.*.txt_attn.norm.key_norm": (f"{_BLOCK}attn.norm_added_k",),
        "double_blocks.*.img_mlp.0": (f"{_BLOCK}ff.net.0.proj",),
        "double_blocks.*.img_mlp.2": (f"{_BLOCK}ff.net.2",),
        "double_blocks.*.txt_mlp.0": (f"{_BLOCK}ff_context.net.0.proj",),
        "double_blocks.*.txt_mlp.2": (f"{_BLOCK}ff_context.net.2",),
        "double_blocks.*.img_mod.lin": (f"{_BLOCK}norm1.linear",),
        "double_blocks.*.txt_mod.lin": (f"{_BLOCK}norm1_context.linear",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    "ZImageTransformer2DModel": {
        "*.attention.qkv": ("*.attention.to_q", "*.attention.to_k", "*.attention.to_v"),
        "*.attention.out": ("*.attention.to_out.0",),
        "*.attention.q_norm": ("*.attention.norm_q",),
        "*.attention.k_norm": ("*.attention.norm_k",),
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.*": ("all_final_layer.2-1.*",),
    },
}
HALVES_SWAPPED = "final_layer.adaLN_modulation.1"  # shift and scale there, scale and shift in diffusers' FLUX


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a file.

    Raises:
        ValueError: a layer's format is unknown.
    """
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in checkpoint.tensors)), "")
    tensors = {key.removeprefix(prefix): value for key, value in checkpoint.tensors.items() if key.startswith(prefix)}
    formats = {
        key.removesuffix(".comfy_quant"): _format(bytes(tensors.pop(key).tolist()))
        for key in [key for key in tensors if key.endswith(".comfy_quant")]
    }
    header = json.loads(checkpoint.metadata.get(METADATA_OF_COMFY) or "{}").get("layers", {})
    formats |= {name.removeprefix(prefix): conf for name, conf in header.items()} | formats
    scheme = SCHEMES.get(class_name, {})
    for key in [key for key in tensors if key.endswith("_norm.scale")]:  # older names of ComfyUI's norms
        tensors[key.removesuffix("scale") + "weight"] = tensors.pop(key)
    for key in (f"{HALVES_SWAPPED}.{leaf}" for leaf in ("weight", "bias")):
        if class_name == "FluxTransformer2DModel" and key in tensors:
            tensors[key] = _swap_halves(tensors[key])
    in_16_bits: list[str] = []

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        def read(name: str, rows: int, columns: int) -> UnpackedLayer | dict[str, Tensor] | None:
            if name not in formats:
                return None
            conf = formats[name]
            kind = conf.get("format") or comfy_convrot.INT8  # some writers leave it out
            if reader := READERS.get(kind):
                return reader(source, name, rows, columns, conf)
            if kind != FLOAT8_E5M2:
                known = sorted({*READERS, FLOAT8_E5M2})
                raise ValueError(
                    f"`comfy_quant.format` of {name!r} in {source.origin} must be one of {known}, got {kind!r}."
                )
            in_16_bits.append(name)
            scales = comfy_convrot.float8_scales(source, name, rows)
            weight = source.take(f"{name}.weight", (rows, columns)).float() * scales[:, None]
            bias = source.get(f"{name}.bias", (rows,))
            return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

        out = convert_by_names(source, shapes, dtype, scheme, read, may_be_16_bit=True)
        if in_16_bits:
            logger.warning(
                f"{len(in_16_bits)} layers of {source.origin}, such as {in_16_bits[0]!r}, are in {FLOAT8_E5M2}, which "
                "this package's layers do not have; they are 16-bit layers now. `quantize` makes 4-bit layers of them."
            )
        return out

    return Reading(convert, tensors, (".input_scale",))


def _format(text: bytes) -> dict[str, Any]:
    conf = json.loads(text.decode("utf-8"))
    return {**conf, **conf.pop("params", {})}


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat([*reversed(tensor.chunk(2))])


def _svdquant(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """Both styles of keys, both layouts; the shift of unsigned activations is undone."""
    style = f"{name}.weight_" if f"{name}.weight_proj_down" in source else f"{name}."
    weight, scales = source.take(f"{name}.weight"), source.take(f"{name}.weight_scale")
    down, up = source.take(f"{style}proj_down"), source.take(f"{style}proj_up")
    rank = down.shape[-1]
    is_tiled = weight.dim() == 4
    tiles, groups = rows // 128, columns // GROUP
    source.take(f"{name}.weight", (tiles, groups, 32, 128) if is_tiled else (rows, columns // 2))
    source.take(f"{name}.weight_scale", (tiles, groups, 128) if is_tiled else (groups, rows))
    source.take(f"{style}proj_up", (tiles, rank, 128) if is_tiled else (rows, rank))
    source.take(f"{style}proj_down", (columns, rank))
    smooth = source.take(f"{style}smooth_factor", (columns,))
    down = down.t()
    basis = conf.get("lowrank_branch_input_basis", "raw")
    mixes_domains = (
        conf.get("smooth_mode", "ones") != "ones"
    )  # convert_to_quant: the branch is of the unsmoothed weight
    if basis == "post_smoothing" or conf.get("proj_down_smooth_folded") is False or mixes_domains:
        down = down.float() / smooth.float()
    if mixes_domains:
        logger.warning(
            f"{name!r} of {source.origin} was written by a converter that takes its branch from the weight before "
            "smoothing and its 4-bit part from the weight after it; the branch is corrected. Quantize the original "
            "model for a smaller error."
        )
    layer = UnpackedLayer(
        unpairs(_untile(weight) if is_tiled else weight),
        _untile_rows(scales) if is_tiled else scales.t(),
        None,
        smooth,
        down,
        _untile_rows(up) if is_tiled else up,
        source.get(f"{name}.bias", (rows,)),
    )
    is_unsigned = conf.get("act_unsigned", is_tiled and name.endswith(BEHIND_GELU))
    return without_shift(layer) if is_unsigned else layer


def _nvfp4(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    packed = source.take(f"{name}.weight", (rows, columns // 2))
    scales = source.take(f"{name}.weight_scale")
    factor = source.get(f"{name}.pre_quant_scale", (columns,))
    return UnpackedLayer(
        unpairs((packed >> 4) | (packed << 4)),
        unswizzled(scales, rows, columns // 16),
        source.numbers(f"{name}.weight_scale_2", rows),
        torch.ones(columns) if factor is None else 1 / factor.float(),
        torch.zeros(0, columns),
        torch.zeros(rows, 0),
        source.get(f"{name}.bias", (rows,)),
        input_scale=source.number(f"{name}.input_scale"),
    )


def _awq(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """Zeros that are multiples of the scales join the codes; others are a branch that adds a constant per group."""
    groups = columns // GROUP
    codes = unpairs(source.take(f"{name}.weight", (rows, columns // 2))).to(torch.int16) - 8
    scales = source.take(f"{name}.weight_scale", (groups, rows)).t()
    key = f"{name}.weight_zeros" if f"{name}.weight_zeros" in source else f"{name}.weight_zero"
    zeros = source.take(key, (groups, rows)).t()
    steps = (zeros.float() / nonzero(scales.float())).round()
    moved = codes + steps.to(torch.int16).repeat_interleave(GROUP, 1)
    down, up = torch.zeros(0, columns), torch.zeros(rows, 0)
    if torch.equal((steps * scales.float()).to(zeros.dtype), zeros) and moved.amin() >= -8 and moved.amax() <= 7:
        codes = moved
    else:
        down, up = torch.eye(groups).repeat_interleave(GROUP, 1), zeros
    nibbles = codes.to(torch.int8).bitwise_and(15).view(torch.uint8)
    bias = source.get(f"{name}.bias", (rows,))
    return UnpackedLayer(nibbles, scales, None, torch.ones(columns), down, up, bias, weight_only=True)


READERS: dict[str, Callable[..., UnpackedLayer]] = {
    "svdquant_w4a4": _svdquant,
    "nvfp4": _nvfp4,
    "awq_w4a16": _awq,
    "convrot_w4a4": comfy_convrot.read_w4a4,
    "asym_w4a8_int8": comfy_convrot.read_w4a8,
    comfy_convrot.INT8: comfy_convrot.read_int8,
    comfy_convrot.FLOAT8: comfy_convrot.read_float8,
}
FLOAT8_E5M2 = "float8_e5m2"


def _untile(weight: Tensor) -> Tensor:
    """`[N/128, K/64, 32, 128]` to `[N, K/2]`."""
    return weight.view(*weight.shape[:3], 4, 32).permute(0, 2, 3, 1, 4).reshape(len(weight) * 128, -1)


def _tile(weight: Tensor) -> Tensor:
    return (
        weight.view(len(weight) // 128, 32, 4, -1, 32).permute(0, 3, 1, 2, 4).reshape(len(weight) // 128, -1, 32, 128)
    )


def _untile_rows(tensor: Tensor) -> Tensor:
    """`[N/128, X, 128]` to `[N, X]`."""
    return tensor.permute(0, 2, 1).reshape(-1, tensor.shape[1])


def _tile_rows(tensor: Tensor) -> Tensor:
    return tensor.view(-1, 128, tensor.shape[1]).permute(0, 2, 1).contiguous()


def write(model: QuantizedModel, requantize: bool = False, tiled: bool = False, **_: Any) -> Written:
    """The content of a file with layers in all formats above but `asym_w4a8_int8` and `float8_e5m2`.

    Codes and scales of int4 layers are unchanged, those of nvfp4 layers without a branch, and those of 8-bit layers
    with neither branch nor smoothing factors; others have no format there. Rotated int4 layers need one scale a row
    besides. 4-bit layers with 16-bit activations and a branch, and convolutions, are written in 16 bits.

    Args:
        model: the content.
        requantize: round what has no format once more, to int4, or 8-bit layers to int8.
        tiled: in tiles of 128 rows and the keys of ComfyUI's own loader, instead of comfy-kitchen's.

    Raises:
        ValueError: the format cannot express a layer, which is named.
    """
    scheme = SCHEMES.get(model.class_name, {})
    in_8_bits, exact = _8_bit_layers(model), _row_scaled_layers(model)
    if not requantize:
        reason = "8-bit layers there have neither smoothing factors nor a branch; `requantize` rounds them once more"
        refuse_layers(model, dict.fromkeys(sorted(in_8_bits - exact), reason), NAME)
    quantized = []
    for name in model.layers:
        if not model.is_convolution(name) and name not in in_8_bits | exact:
            item = model.layer(name)
            if not item.weight_only or (is_plain(item) and fits_awq(item)):
                quantized.append(name)
    with_branch = [name for name in quantized if model.layer(name).precision == "int4" or model.layer(name).has_branch]
    multiples = {name: GROUP if name in set(with_branch) else 16 for name in quantized}
    odd = {
        name: f"it needs a multiple of {multiples[name]} input features, got {model.layer(name).codes.shape[1]}"
        for name in quantized
        if model.layer(name).codes.shape[1] % multiples[name]
    }
    odd |= {
        name: f"tiles need a multiple of 128 output features, got {len(model.layer(name).codes)}"
        for name in with_branch
        if tiled and len(model.layer(name).codes) % 128
    }
    refuse_layers(model, odd, NAME)
    model.convert_precision(with_branch, "int4", requantize, NAME, scheme)
    without_branch = [name for name in quantized if name not in set(with_branch)]
    model.convert_precision(without_branch, "nvfp4", requantize, NAME, scheme)
    tensors: dict[str, Tensor] = {}
    formats: dict[str, dict[str, Any]] = {}
    places, errors = file_names(model.modules, scheme), {}
    for name, content in model.in_file(scheme, {*quantized, *exact}.__contains__):
        if not isinstance(content, UnpackedLayer):
            tensors |= {_key(name, leaf): _converted(name, leaf, value, model) for leaf, value in content.items()}
            if in_8_bits.issuperset(places[name]):
                formats[name], parts, errors[name] = _encoded(model, places[name], 8)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            continue
        if content.precision in IN_8_BITS or content.rotation is not None:
            formats[name], parts = comfy_convrot.write(content)
        elif content.weight_only:
            formats[name], parts = _write_awq(content)
        elif content.precision == "nvfp4":
            formats[name], parts = _write_nvfp4(content, name)
        else:
            formats[name], parts = _write_svdquant(content, model.dtype, tiled)
        parts |= {} if content.bias is None else {"bias": content.bias}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    _warn_of_rounding(errors, 8)
    return with_markers(tensors, formats)


def _8_bit_layers(model: QuantizedModel) -> set[str]:
    """Names of the linear int8 and float8 layers."""
    return {
        name for name, layer in model.layers.items() if layer.precision in IN_8_BITS and not model.is_convolution(name)
    }


def _row_scaled_layers(model: QuantizedModel) -> set[str]:
    """Names of the linear layers whose codes and scales the formats of rotated and 8-bit weights can hold."""
    return {
        name
        for name, layer in model.layers.items()
        if (layer.precision in IN_8_BITS or layer.rotation is not None)
        and not model.is_convolution(name)
        and not model.is_refused(name)
        and comfy_convrot.fits(model.layer(name))
    }


def _encoded(
    model: QuantizedModel, members: Sequence[str], num_bits: int
) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """The weights of layers that are one layer there, rounded once more, and the relative error of that."""
    weight = torch.cat([model.matrix(member) for member in members])
    conf, parts = comfy_convrot.encode(weight, num_bits)
    source = Source({f"x.{part}": tensor for part, tensor in parts.items()}, members[0])
    again = READERS[conf["format"]](source, "x", *weight.shape, conf).matrix()
    return conf, parts, ((again - weight).norm() / weight.norm()).item()


def _warn_of_rounding(errors: Mapping[str, float], num_bits: int) -> None:
    if errors:
        worst = max(errors, key=errors.__getitem__)
        logger.warning(
            f"{len(errors)} layers were rounded once more, to {num_bits} bits; the relative error of the weights is "
            f"at most {errors[worst]:.4f} ({worst})."
        )


def write_convrot(model: QuantizedModel, num_bits: int = 8, **_: Any) -> Written:
    """The content of a file with rotated weights, which stock ComfyUI runs: `int8_tensorwise` or `convrot_w4a4`.

    The weights that the layers represent, branches included, are rounded once more, which a warning states: to 8 bits
    by less than 1 %, to 4 bits by about 13 %. Layers of as many bits that the format can hold keep their codes.

    Args:
        model: the content.
        num_bits: 8 or 4.

    Raises:
        ValueError: another number of bits.
    """
    if num_bits not in comfy_convrot.PRECISIONS:
        raise ValueError(f"`num_bits` must be one of {sorted(comfy_convrot.PRECISIONS)}, got {num_bits!r}.")
    quantized = {name for name in model.layers if not model.is_convolution(name)}
    tensors: dict[str, Tensor] = {}
    formats: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}
    scheme = SCHEMES.get(model.class_name, {})
    places = file_names(model.modules, scheme)
    precision = comfy_convrot.PRECISIONS[num_bits]
    exact = {name for name in _row_scaled_layers(model) if model.layers[name].precision == precision}
    for name, content in model.in_file(scheme, exact.__contains__):
        if isinstance(content, UnpackedLayer):
            formats[name], parts = comfy_convrot.write(content)
            parts |= {} if content.bias is None else {"bias": content.bias}
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            continue
        tensors |= {_key(name, leaf): _converted(name, leaf, value, model) for leaf, value in content.items()}
        if not quantized.issuperset(places[name]):
            continue
        features = model.layers[places[name][0]].proj_down.shape[1]
        if num_bits == 4 and comfy_convrot.rotation_size(features) is None:
            continue  # 4 bits need a rotation
        formats[name], parts, errors[name] = _encoded(model, places[name], num_bits)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    _warn_of_rounding(errors, num_bits)
    return with_markers(tensors, formats)


def with_markers(tensors: dict[str, Tensor], formats: dict[str, dict[str, Any]]) -> Written:
    """The content of a file: with its formats in a tensor per layer and in the header, as ComfyUI writes them."""
    for name, conf in formats.items():
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    return Written(tensors, metadata={METADATA_OF_COMFY: json.dumps({"format_version": "1.0", "layers": formats})})


def _key(name: str, leaf: str) -> str:
    is_norm = name.endswith(("query_norm", "key_norm"))
    return f"{name}.{'scale' if is_norm and leaf == 'weight' else leaf}".lstrip(".")


def _converted(name: str, leaf: str, tensor: Tensor, model: QuantizedModel) -> Tensor:
    swapped = name == HALVES_SWAPPED and model.class_name == "FluxTransformer2DModel"
    return _swap_halves(tensor) if swapped else tensor


def _write_svdquant(item: UnpackedLayer, dtype: torch.dtype, tiled: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    conf: dict[str, Any] = {"format": "svdquant_w4a4", "act_unsigned": False}
    weight = pairs(item.codes).view(torch.int8)
    vectors = {"smooth_factor": item.smooth.to(dtype), "proj_down": item.down.t().to(dtype).contiguous()}
    if tiled:
        conf |= {"layout": TILED, "lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
        parts = {"weight": _tile(weight), "weight_scale": _tile_rows(item.scales.to(dtype))}
        return conf, parts | vectors | {"proj_up": _tile_rows(item.up.to(dtype))}
    conf |= {"group_size": GROUP, "rank": item.rank, "orig_shape": list(item.codes.shape)}
    conf["orig_dtype"] = str(dtype)
    vectors["proj_up"] = item.up.to(dtype)
    parts = {"weight": weight, "weight_scale": transposed(item.scales.to(dtype))}
    return conf, parts | {f"weight_{name}": value for name, value in vectors.items()}


def _write_nvfp4(item: UnpackedLayer, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    codes, scales, factor = one_factor(item, name)
    packed = pairs(codes)
    parts = {
        "weight": (packed >> 4) | (packed << 4),
        "weight_scale": swizzled(scales),
        "weight_scale_2": factor,
    }
    if not bool((item.smooth == 1).all()):
        parts["pre_quant_scale"] = 1 / item.smooth.float()
    if item.input_scale is not None:
        parts["input_scale"] = torch.tensor(item.input_scale)
    return {"format": "nvfp4"}, parts


def _write_awq(item: UnpackedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    scales = transposed(item.scales)
    parts = {"weight": pairs(item.codes ^ 8).view(torch.int8), "weight_scale": scales}
    return {"format": "awq_w4a16", "group_size": GROUP}, parts | {"weight_zeros": torch.zeros_like(scales)}
