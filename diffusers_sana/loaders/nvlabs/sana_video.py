"""Tensor names of NVlabs/Sana for SANA-Video and LongSANA, whose files have the same ones.

Source of the names: the original `.pth` files as the original code and the authors' converter read them.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from diffusers_sana.loaders.nvlabs.sana import CROSS_HEADS, LEFT_OUT, names_in_sana
from diffusers_sana.loaders.single_file import OfficialWeights, required_shape


VIDEO = "SanaVideoTransformer3DModel"
HEAD_DIM = 112  # of the linear attention, in the released models
SAMPLE_SIZES = {16: 30, 128: 22, 32: 22}  # by latent channels: Wan's 480p; LTX-2's and DCAE-V's 720p


def is_official_video(checkpoint: Mapping[str, Tensor]) -> bool:
    """Whether the keys and shapes are those of the original SANA-Video."""
    embedding = checkpoint.get("x_embedder.proj.weight")
    return embedding is not None and embedding.ndim == 5


def read_official_video(checkpoint: Mapping[str, Tensor], **fields: Any) -> OfficialWeights:
    """Derives the config and the name of every tensor.

    Args:
        checkpoint: the tensors by their keys in the file.
        fields: config fields that override those derived from the tensors, which do not determine the heads and
            `sample_size`.

    Raises:
        ValueError: an unknown or missing tensor, or a missing field.
    """
    official = OfficialWeights(VIDEO, _config(checkpoint, fields))
    for key in checkpoint:
        if key in LEFT_OUT:
            official.left_out.append(key)
        else:
            names = names_in_sana(key, guidance=official.config["guidance_embeds"])
            official.names[key] = tuple(name.replace("patch_embed.proj", "patch_embedding") for name in names)
    return official


def _config(checkpoint: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {key: tensor.shape for key, tensor in checkpoint.items()}
    dim, in_channels, *patch_size = required_shape(shapes, "x_embedder.proj.weight", rank=5)
    hidden_dim = required_shape(shapes, "blocks.0.mlp.inverted_conv.conv.weight", rank=4)[0] // 2
    head_dim = fields.get("attention_head_dim") or HEAD_DIM
    cross_heads: Any = fields.get("num_cross_attention_heads") or CROSS_HEADS.get(dim)
    sample_size = fields.get("sample_size") or SAMPLE_SIZES.get(in_channels)
    for name, is_known, reason in (
        ("attention_head_dim", dim % head_dim == 0, f"the released models have {HEAD_DIM}"),
        ("num_cross_attention_heads", cross_heads, f"the released models have {CROSS_HEADS} by width"),
        ("sample_size", sample_size, f"the released models have {SAMPLE_SIZES} by latent channels"),
    ):
        if not is_known:
            raise ValueError(
                f"`{name}` must be given for a width of {dim} and {in_channels} latent channels, because the tensors"
                f" do not determine it; {reason}."
            )
    ratio = hidden_dim / dim
    config = {
        "in_channels": in_channels,
        "out_channels": required_shape(shapes, "final_layer.linear.weight", rank=2)[0] // prod(patch_size),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": len({key.split(".")[1] for key in checkpoint if key.startswith("blocks.")}),
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": dim // cross_heads,
        "cross_attention_dim": dim,
        "caption_channels": required_shape(shapes, "y_embedder.y_proj.fc1.weight", rank=2)[1],
        # The model rounds `mlp_ratio * dim` down.
        "mlp_ratio": ratio if int(ratio * dim) == hidden_dim else (hidden_dim + 0.5) / dim,
        "patch_size": tuple(patch_size),
        "sample_size": sample_size,
        "guidance_embeds": "cfg_embedder.mlp.0.weight" in checkpoint,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn.q_norm.weight" in checkpoint else None,
    }
    return {**config, **fields}
