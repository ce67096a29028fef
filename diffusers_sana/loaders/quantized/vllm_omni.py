"""vLLM-Omni's `svdquant`: a diffusers folder with NVFP4 layers in row-major order, under vLLM's fused names.

Per layer `qweight` int8 `[N, K/2]`, `wscales` e4m3 `[K/16, N]`, `wcscales` `[N]` and `wtscale` `[1]` (the row factors
are their product), `smooth_factor` `[K]`, `proj_down` `[K, r]`, `proj_up` `[N, r]`, `bias`. All are bf16, and all
layers share one rank. Sources: vllm_omni/quantization/svdquant_config.py 0.30.0 and its converter for Nunchaku files.

An early version of that converter left vectors in Nunchaku's tile order. Its files look the same; `_has_tiled_vectors`
finds out by the base model's weights.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.loaders.nunchaku.packing import TILE, unpack_vector
from diffusers_sana.loaders.quantized.assemble import Conversion, Reading, convert_by_names
from diffusers_sana.loaders.quantized.checkpoint import Checkpoint
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written, refuse_layers
from diffusers_sana.loaders.quantized.names import Scheme
from diffusers_sana.loaders.quantized.rows import pairs, transposed, unpairs


logger = logging.getLogger(__name__)

NAME = "vLLM-Omni's `svdquant`"
GROUP = 16
SCHEMES: dict[str, Scheme] = {
    "QwenImageTransformer2DModel": {
        "*.attn.to_qkv": ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v"),
        "*.attn.add_kv_proj": ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj"),
    },
    "ZImageTransformer2DModel": {
        "*.attention.to_qkv": ("*.attention.to_q", "*.attention.to_k", "*.attention.to_v"),
        "*.feed_forward.w13": ("*.feed_forward.w1", "*.feed_forward.w3"),  # gate, then value
    },
}
VECTORS = ("smooth_factor", "wcscales", "bias")
TOOL = "diffusers_sana"
FITS = 0.5  # relative error of a weight; a right order has .03 to .15, a wrong one about 1.4


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a folder.

    Raises:
        ValueError: `act_unsigned`, or vectors of an order that is not certain.
    """
    if checkpoint.quantization.get("act_unsigned"):
        raise ValueError(f"`act_unsigned` of {checkpoint.path} must be False, the only layout of {NAME}, got True.")
    header = json.loads(checkpoint.metadata.get("conversion") or "{}")
    family = re.sub(r"[-_ ]", "", header.get("model_family") or "").lower()
    is_certain = header.get("tool") == TOOL or (family != "" and "zimage" not in family)
    scheme = SCHEMES.get(class_name, {})

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        is_tiled = not is_certain and _has_tiled_vectors(source, shapes, scheme)
        if is_tiled:
            logger.warning(f"{source.origin} has vectors in Nunchaku's tile order, which is undone.")

        def read(name: str, rows: int, columns: int) -> UnpackedLayer | None:
            return _layer(source, name, rows, columns, is_tiled) if f"{name}.qweight" in source else None

        return convert_by_names(source, shapes, dtype, scheme, read)

    return Reading(convert, checkpoint.tensors)


def _layer(source: Source, name: str, rows: int, columns: int, is_tiled: bool) -> UnpackedLayer:
    def vector(part: str, size: int) -> Tensor | None:
        tensor = source.get(f"{name}.{part}", (size,))
        return unpack_vector(tensor) if is_tiled and tensor is not None and size % TILE == 0 else tensor

    down = source.take(f"{name}.proj_down")
    down = source.take(f"{name}.proj_down", (columns, down.shape[-1]))
    of_rows, of_tensor = vector("wcscales", rows), source.get(f"{name}.wtscale", (1,))
    row_scales = torch.ones(rows) if of_rows is None else of_rows.float()
    smooth = vector("smooth_factor", columns)
    if smooth is None:
        source.take(f"{name}.smooth_factor")
    return UnpackedLayer(
        unpairs(source.take(f"{name}.qweight", (rows, columns // 2))),
        transposed(source.take(f"{name}.wscales", (columns // GROUP, rows))),
        row_scales if of_tensor is None else row_scales * of_tensor.float(),
        smooth,  # type: ignore[arg-type]
        down.t(),
        source.take(f"{name}.proj_up", (rows, down.shape[1])),
        vector("bias", rows),
    )


def _has_tiled_vectors(source: Source, shapes: Mapping[str, torch.Size], scheme: Scheme) -> bool:
    """Whether vectors are in Nunchaku's tile order.

    Raises:
        ValueError: either is possible, and there are no base weights to compare with; or neither fits them.
    """
    differs = [
        key
        for key, tensor in source.tensors.items()
        if key.rpartition(".")[2] in VECTORS
        and f"{key.rpartition('.')[0]}.qweight" in source
        and len(tensor) % TILE == 0
        and not torch.equal(unpack_vector(tensor), tensor)
    ]
    if not differs:
        return False
    for key in differs:
        name = key.rpartition(".")[0]
        weight = source.base.get(f"{name}.weight")
        if weight is None or weight.dim() != 2 or not key.endswith(VECTORS[:2]):
            continue
        errors = []
        for is_tiled in (False, True):
            matrix = _layer(source, name, weight.shape[0], weight.shape[1], is_tiled).matrix()
            errors.append(((matrix - weight.float()).norm() / weight.float().norm()).item())
        if min(errors) > FITS:
            raise ValueError(
                f"{name!r} of {source.origin} is not a quantized form of the weight of `base`: the relative error is "
                f"{min(errors):.2f}. Pass the model that it was made from."
            )
        return errors[1] < errors[0]
    raise ValueError(
        f"{source.origin} may have vectors such as {differs[0]!r} in Nunchaku's tile order, as an early converter of "
        "vLLM-Omni wrote them; it does not say. Pass the 16-bit model as `base`: its weights show the right order."
    )


def write(model: QuantizedModel, requantize: bool = False, **_: Any) -> Written:
    """The content of a folder.

    4-bit codes and scales are unchanged; vectors and low-rank branches become bf16. Layers with 16-bit activations and
    convolutions are written in bf16.

    Raises:
        ValueError: the format cannot express a layer, which is named.
    """
    quantized = [name for name in model.layers if not model.is_weight_only(name) and not model.is_convolution(name)]
    odd = {
        name: f"{NAME} needs a multiple of {GROUP} input features, got {model.layer(name).codes.shape[1]}"
        for name in quantized
        if model.layer(name).codes.shape[1] % GROUP
    }
    refuse_layers(model, odd, NAME)
    model.convert_precision(quantized, "nvfp4", requantize, NAME)
    scheme = SCHEMES.get(model.class_name, {})
    layers: dict[str, UnpackedLayer] = {}
    tensors: dict[str, Tensor] = {}
    skipped = []
    for place, content in model.in_file(scheme, set(quantized).__contains__):
        if isinstance(content, UnpackedLayer):
            layers[place] = content
        else:
            tensors |= {f"{place}.{leaf}".lstrip("."): tensor.bfloat16() for leaf, tensor in content.items()}
            if "weight" in content and content["weight"].dim() == 2:
                skipped.append(place)
    rank = max([1, *(item.rank for item in layers.values())])
    for name, item in layers.items():
        item = item.with_rank(rank)
        assert item.row_scales is not None
        parts = {
            "qweight": pairs(item.codes).view(torch.int8),
            "wscales": transposed(item.scales),
            "wcscales": item.row_scales.bfloat16(),
            "wtscale": torch.ones(1, dtype=torch.bfloat16),
            "smooth_factor": item.smooth.bfloat16(),
            "proj_down": item.down.t().bfloat16(),
            "proj_up": item.up.bfloat16(),
        }
        parts |= {} if item.bias is None else {"bias": item.bias.bfloat16()}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    quantization = {
        "quant_method": "svdquant",
        "rank": rank,
        "precision": "nvfp4",
        "act_unsigned": False,
        "modules_to_not_convert": skipped,
    }
    conversion = {"tool": TOOL, "layout": "row_major", "model_family": model.class_name}
    return Written(
        tensors, {**model.config, "quantization_config": quantization}, {"conversion": json.dumps(conversion)}
    )
