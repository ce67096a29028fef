"""Configs of NVlabs/Sana's files of SANA-Video 2.0, whose tensor names are those of our model.

Source of the names: the authors' public code. The released files have not been seen here.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from diffusers_sana.loaders.nvlabs.sana import LEFT_OUT
from diffusers_sana.loaders.single_file import OfficialWeights, required_shape


VIDEO2 = "SanaVideo2Transformer3DModel"
CROSS_HEADS = {2560: 20, 4096: 32}  # by width: 5B and 14B


def is_official_video2(checkpoint: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of SANA-Video 2.0."""
    return "attn_res.final_proj.weight" in checkpoint


def read_official_video2(checkpoint: Mapping[str, Tensor], **fields: Any) -> OfficialWeights:
    """Derives the config; the names are our own.

    Args:
        checkpoint: the tensors by their keys in the file.
        fields: config fields that override those derived from the tensors, which determine neither
            `softmax_head_dim`, `attn_res_block_size`, `sample_size` and `relu_divisor`, whose defaults are those of
            the released model, nor `num_cross_attention_heads` of other widths.

    Raises:
        ValueError: a missing tensor, or a missing field.
    """
    official = OfficialWeights(VIDEO2, _config(checkpoint, fields))
    official.left_out = [key for key in checkpoint if key in LEFT_OUT]
    official.names = {key: (key,) for key in checkpoint if key not in LEFT_OUT}
    return official


def _config(checkpoint: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {key: tensor.shape for key, tensor in checkpoint.items()}
    dim, in_channels, *patch_size = required_shape(shapes, "x_embedder.proj.weight", rank=5)
    num_layers = len({key.split(".")[1] for key in checkpoint if key.startswith("blocks.")})
    linear = [index for index in range(num_layers) if f"blocks.{index}.attn.o_norm.weight" in checkpoint]
    if not linear and "attention_head_dim" not in fields:
        raise ValueError(
            "`attention_head_dim` must be given, because the file has no layer with linear attention (a tensor"
            " 'attn.o_norm.weight'). It is incomplete, or the checkpoint is for a different architecture."
        )
    head_dim = fields.get("attention_head_dim") or shapes[f"blocks.{linear[0]}.attn.o_norm.weight"][0]
    cross_heads: Any = fields.get("num_cross_attention_heads") or CROSS_HEADS.get(dim)
    if cross_heads is None:
        raise ValueError(
            f"`num_cross_attention_heads` must be given for a width of {dim}, because the tensors do not determine it;"
            f" the authors' models have {CROSS_HEADS} by width."
        )
    hidden_dim = required_shape(shapes, "blocks.0.mlp.up_proj.weight", rank=2)[0]
    ratio = hidden_dim / dim
    config = {
        "in_channels": in_channels,
        "out_channels": required_shape(shapes, "final_layer.linear.weight", rank=2)[0] // prod(patch_size),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": num_layers,
        "softmax_layers": [index for index in range(num_layers) if index not in linear],
        "num_cross_attention_heads": cross_heads,
        "caption_channels": required_shape(shapes, "y_embedder.y_proj.fc1.weight", rank=2)[1],
        # The model rounds `mlp_ratio * dim` down.
        "mlp_ratio": ratio if int(ratio * dim) == hidden_dim else (hidden_dim + 0.5) / dim,
        "patch_size": tuple(patch_size),
    }
    return {**config, **fields}
