"""The name of each weight of VILA-U in the official checkpoint, which has three folders of weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


LLM, PROJECTOR, TOWER = PARTS = ("llm", "mm_projector", "vision_tower")
SIGLIP = "rqvaesiglip.siglip_model"
CODEBOOK = "model.vision_tower.quantizer.embedding.weight"
DEPTH_POSITIONS = "depth_transformer.position_embedding.weight"

# Our name -> part and name there; the first match counts. `official_name` handles the last block of the encoder, which
# depends on the number of blocks.
RULES: tuple[tuple[str, str, str], ...] = (
    (r"lm_head\.(.+)", LLM, r"lm_head.\1"),
    (r"model\.language_model\.(.+)", LLM, r"model.\1"),
    (r"model\.projector\.(.+)", PROJECTOR, r"layers.\1"),
    (r"model\.vision_tower\.embeddings\.(.+)", TOWER, rf"{SIGLIP}.vision_model.embeddings.\1"),
    (r"model\.vision_tower\.layers\.(.+)", TOWER, rf"{SIGLIP}.vision_model.encoder.layers.\1"),
    (r"model\.vision_tower\.semantic_head\.(post_layernorm|head)\.(.+)", TOWER, rf"{SIGLIP}.vision_model.\1.\2"),
    (r"model\.vision_tower\.text_model\.layers\.(.+)", TOWER, rf"{SIGLIP}.text_model.encoder.layers.\1"),
    (r"model\.vision_tower\.text_model\.(.+)", TOWER, rf"{SIGLIP}.text_model.\1"),
    (r"model\.vision_tower\.quantizer\.embedding\.weight", TOWER, "rqvaesiglip.quantizer.codebooks.0.weight"),
    (r"model\.vision_tower\.(logit_scale|logit_bias)", TOWER, r"rqvaesiglip.\1"),
    (r"model\.vision_tower\.(post_quant_conv|decoder)\.(.+)", TOWER, r"rqvaesiglip.\1.\2"),
    (r"depth_transformer\.backbone_proj\.(.+)", TOWER, r"rqtransformer.in_mlp_2.\1"),
    (r"depth_transformer\.code_proj\.(.+)", TOWER, r"rqtransformer.in_mlp_1.\1"),
    (r"depth_transformer\.position_embedding\.weight", TOWER, "rqtransformer.pos_emb_d"),
    (r"depth_transformer\.norm\.(.+)", TOWER, r"rqtransformer.classifier_mlp.layer_norm.\1"),
    (r"depth_transformer\.head\.(.+)", TOWER, r"rqtransformer.classifier_mlp.linear.\1"),
    (r"depth_transformer\.layers\.(.+)", TOWER, r"rqtransformer.head_transformer.blocks.\1"),
)
IN_DEPTH_BLOCKS = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


@dataclass(frozen=True)
class Weight:
    """A tensor of the official checkpoint.

    Attributes:
        part: folder.
        key, shape: in the file there.
        name: of the weight in our model, for a copy that of the original; empty if we have none.
        is_copy: whether the tensor is stored redundantly.
        group: "core", "semantic head", "text tower" or "ema".
    """

    part: str
    key: str
    shape: tuple[int, ...]
    name: str = ""
    is_copy: bool = False
    group: str = "core"

    def __str__(self) -> str:
        return f"{self.part}/{self.key}"


def official_name(name: str, blocks: int) -> tuple[str, str]:
    """Part and key of one of our weights in the official checkpoint.

    Args:
        name: in the state dict of `VilaUForConditionalGeneration`.
        blocks: of the SigLIP encoder, `num_hidden_layers` of the vision config.

    Raises:
        KeyError: the official checkpoint has no such weight.
    """
    last = "model.vision_tower.semantic_head.layer."
    if name.startswith(last):
        return TOWER, f"{SIGLIP}.vision_model.encoder.layers.{blocks - 1}.{name.removeprefix(last)}"
    for pattern, part, template in RULES:
        if match := re.fullmatch(pattern, name):
            key = match.expand(template)
            if name.startswith("depth_transformer.layers."):
                for ours, theirs in IN_DEPTH_BLOCKS.items():
                    key = key.replace(f".{ours}.", f".{theirs}.")
            return part, key
    raise KeyError(name)


def official_weights(shapes: Mapping[str, tuple[int, ...]], blocks: int, depth: int) -> Iterator[Weight]:
    """Every tensor of the official checkpoint.

    Args:
        shapes: of our model, with semantic head and text tower, by name.
        blocks: of the SigLIP encoder.
        depth: codes of one image token.
    """
    for name, shape in shapes.items():
        part, key = official_name(name, blocks)
        if name == CODEBOOK:
            for index in range(depth):  # one table, stored once per depth; its last row is padding
                copy = f"rqvaesiglip.quantizer.codebooks.{index}"
                yield Weight(part, f"{copy}.weight", (shape[0] + 1, shape[1]), name, is_copy=index > 0)
                yield Weight(part, f"{copy}.cluster_size_ema", shape[:1], is_copy=index > 0, group="ema")
                yield Weight(part, f"{copy}.embed_ema", shape, is_copy=index > 0, group="ema")
        elif name == DEPTH_POSITIONS:
            yield Weight(part, key, (1, *shape), name)
        else:
            yield Weight(part, key, shape, name, group=group_of(name))
            if name.endswith(("logit_scale", "logit_bias")):
                again = key.replace("rqvaesiglip.", f"{SIGLIP}.")
                yield Weight(part, again, shape, name, is_copy=True, group=group_of(name))


def group_of(name: str) -> str:
    """Which optional part of our model a weight is in."""
    if ".semantic_head." in name:
        return "semantic head"
    return "text tower" if re.search(r"\.(text_model\.|logit_(scale|bias)$)", name) else "core"


def to_ours(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the official checkpoint as the weight `name` of ours."""
    if name == CODEBOOK:
        return tensor[:-1]
    return tensor[0] if name == DEPTH_POSITIONS else tensor


def to_official(name: str, tensor: Tensor) -> Tensor:
    """The opposite of `to_ours`; the padding row is zero."""
    if name == CODEBOOK:
        return torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
    return tensor[None] if name == DEPTH_POSITIONS else tensor
