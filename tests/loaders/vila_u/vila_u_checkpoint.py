"""The official checkpoint of VILA-U in any size: all keys and shapes, and files of it with random numbers.

Written down from the description of the checkpoint, and not from the converter.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models.vila_u.tiny_processor import tiny_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Of the released model; `TINY` of one that is like `tests/models/vila_u/tiny.py`."""

    width: int = 1024
    mlp: int = 4096
    blocks: int = 24
    patch: int = 16
    cells: int = 256
    side: int = 256
    text_rows: int = 32000
    text_width: int = 1024
    text_mlp: int = 4096
    text_blocks: int = 24
    text_positions: int = 64
    codes: int = 16384
    depth: int = 4
    latent: int = 256
    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    depth_width: int = 2560
    depth_mlp: int = 10240
    depth_blocks: int = 6
    depth_heads: int = 40
    llm_rows: int = 32004
    llm_width: int = 4096
    llm_mlp: int = 11008
    llm_blocks: int = 32
    llm_heads: int = 32


TINY = Sizes(
    width=32, mlp=64, blocks=3, patch=8, cells=16, side=32, text_rows=40, text_width=32, text_mlp=64, text_blocks=2,
    text_positions=16, codes=64, depth=3, latent=32, base=32, multipliers=(1, 1, 1, 1), res_blocks=1, depth_width=64,
    depth_mlp=128, depth_blocks=2, depth_heads=4, llm_rows=128, llm_width=64, llm_mlp=128, llm_blocks=2, llm_heads=4,
)  # fmt: skip


@dataclass
class Keys:
    """Keys and shapes under construction."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = shape
        if bias:
            self.shapes[f"{name}.bias"] = shape[:1]


def siglip_block(keys: Keys, name: str, width: int, mlp: int) -> None:
    for part in ("layer_norm1", "layer_norm2"):
        keys.layer(f"{name}.{part}", width)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        keys.layer(f"{name}.self_attn.{part}", width, width)
    keys.layer(f"{name}.mlp.fc1", mlp, width)
    keys.layer(f"{name}.mlp.fc2", width, mlp)


def siglip(keys: Keys, s: Sizes) -> None:
    vision, text = (f"rqvaesiglip.siglip_model.{part}_model" for part in ("vision", "text"))
    keys.layer(f"{vision}.embeddings.patch_embedding", s.width, 3, s.patch, s.patch)
    keys.layer(f"{vision}.embeddings.position_embedding", s.cells, s.width, bias=False)
    for index in range(s.blocks):
        siglip_block(keys, f"{vision}.encoder.layers.{index}", s.width, s.mlp)
    keys.layer(f"{vision}.post_layernorm", s.width)
    keys.shapes[f"{vision}.head.probe"] = (1, 1, s.width)
    keys.shapes[f"{vision}.head.attention.in_proj_weight"] = (3 * s.width, s.width)
    keys.shapes[f"{vision}.head.attention.in_proj_bias"] = (3 * s.width,)
    keys.layer(f"{vision}.head.attention.out_proj", s.width, s.width)
    keys.layer(f"{vision}.head.layernorm", s.width)
    keys.layer(f"{vision}.head.mlp.fc1", s.mlp, s.width)
    keys.layer(f"{vision}.head.mlp.fc2", s.width, s.mlp)
    keys.layer(f"{text}.embeddings.token_embedding", s.text_rows, s.text_width, bias=False)
    keys.layer(f"{text}.embeddings.position_embedding", s.text_positions, s.text_width, bias=False)
    for index in range(s.text_blocks):
        siglip_block(keys, f"{text}.encoder.layers.{index}", s.text_width, s.text_mlp)
    keys.layer(f"{text}.final_layer_norm", s.text_width)
    keys.layer(f"{text}.head", s.width, s.text_width)
    for owner in ("rqvaesiglip", "rqvaesiglip.siglip_model"):
        keys.shapes |= {f"{owner}.logit_scale": (1,), f"{owner}.logit_bias": (1,)}


def res_block(keys: Keys, name: str, old: int, new: int) -> None:
    keys.layer(f"{name}.norm1", old)
    keys.layer(f"{name}.conv1", new, old, 3, 3)
    keys.layer(f"{name}.norm2", new)
    keys.layer(f"{name}.conv2", new, new, 3, 3)
    if old != new:
        keys.layer(f"{name}.nin_shortcut", new, old, 1, 1)


def attention(keys: Keys, name: str, width: int) -> None:
    keys.layer(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        keys.layer(f"{name}.{part}", width, width, 1, 1)


def decoder(keys: Keys, s: Sizes) -> None:
    name = "rqvaesiglip.decoder"
    widths = [s.base * multiplier for multiplier in s.multipliers]
    keys.layer(f"{name}.conv_in", widths[-1], s.latent, 3, 3)
    res_block(keys, f"{name}.mid.block_1", widths[-1], widths[-1])
    attention(keys, f"{name}.mid.attn_1", widths[-1])
    res_block(keys, f"{name}.mid.block_2", widths[-1], widths[-1])
    old = widths[-1]
    for level in reversed(range(len(widths))):
        for index in range(s.res_blocks + 1):
            res_block(keys, f"{name}.up.{level}.block.{index}", old, widths[level])
            old = widths[level]
            if level == len(widths) - 1:
                attention(keys, f"{name}.up.{level}.attn.{index}", old)
        if level:
            keys.layer(f"{name}.up.{level}.upsample.conv", old, old, 3, 3)
    keys.layer(f"{name}.norm_out", old)
    keys.layer(f"{name}.conv_out", 3, old, 3, 3)


def depth(keys: Keys, s: Sizes) -> None:
    width = s.depth_width
    keys.layer("rqtransformer.in_mlp_1", width, s.width)
    keys.layer("rqtransformer.in_mlp_2", width, s.llm_width)
    keys.shapes["rqtransformer.pos_emb_d"] = (1, s.depth, width)
    for index in range(s.depth_blocks):
        name = f"rqtransformer.head_transformer.blocks.{index}"
        for part in ("ln1", "ln2"):
            keys.layer(f"{name}.{part}", width)
        for part in ("key", "query", "value", "proj"):
            keys.layer(f"{name}.attn.{part}", width, width)
        keys.layer(f"{name}.mlp.0", s.depth_mlp, width)
        keys.layer(f"{name}.mlp.2", width, s.depth_mlp)
    keys.layer("rqtransformer.classifier_mlp.layer_norm", width)
    keys.layer("rqtransformer.classifier_mlp.linear", s.codes, width)


def tower_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    keys = Keys()
    siglip(keys, s)
    for index in range(s.depth):
        name = f"rqvaesiglip.quantizer.codebooks.{index}"
        keys.shapes |= {f"{name}.weight": (s.codes + 1, s.width), f"{name}.embed_ema": (s.codes, s.width)}
        keys.shapes[f"{name}.cluster_size_ema"] = (s.codes,)
    keys.layer("rqvaesiglip.post_quant_conv", s.latent, s.width, 1, 1)
    decoder(keys, s)
    depth(keys, s)
    return keys.shapes


def llm_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    keys = Keys()
    keys.layer("model.embed_tokens", s.llm_rows, s.llm_width, bias=False)
    for index in range(s.llm_blocks):
        name = f"model.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            keys.layer(f"{name}.self_attn.{part}", s.llm_width, s.llm_width, bias=False)
        keys.layer(f"{name}.mlp.gate_proj", s.llm_mlp, s.llm_width, bias=False)
        keys.layer(f"{name}.mlp.up_proj", s.llm_mlp, s.llm_width, bias=False)
        keys.layer(f"{name}.mlp.down_proj", s.llm_width, s.llm_mlp, bias=False)
        for part in ("input_layernorm", "post_attention_layernorm"):
            keys.layer(f"{name}.{part}", s.llm_width, bias=False)
    keys.layer("model.norm", s.llm_width, bias=False)
    keys.layer("lm_head", s.llm_rows, s.llm_width, bias=False)
    return keys.shapes


def projector_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    keys = Keys()
    keys.layer("layers.0", s.llm_width, s.width)
    keys.layer("layers.2", s.llm_width, s.llm_width)
    return keys.shapes


def jsons(s: Sizes, pretrained: str = "google/siglip-large-patch16-256") -> dict[str, dict]:
    """The JSON files by their paths."""
    grid = s.side // s.patch
    ddconfig = {
        "double_z": False, "z_channels": s.latent, "resolution": s.side, "in_channels": 3, "out_ch": 3, "ch": s.base,
        "ch_mult": list(s.multipliers), "num_res_blocks": s.res_blocks, "attn_resolutions": [grid], "dropout": 0.0,
    }  # fmt: skip
    vq = {
        "embed_dim": s.width, "n_embed": s.codes, "latent_shape": [grid, grid, s.width],
        "code_shape": [grid, grid, s.depth], "shared_codebook": True, "restart_unused_codes": True, "decay": 0.99,
        "latent_loss_weight": 0.25, "ddconfig": ddconfig, "pretrained_model": pretrained, "loss_type": "mse",
    }  # fmt: skip
    rq = {
        "block_size": [grid, grid, s.depth], "embed_dim": s.depth_width, "input_embed_dim_1": s.width,
        "input_embed_dim_2": s.llm_width, "vocab_size": s.codes,
        "head": {"n_layer": s.depth_blocks, "block": {"n_head": s.depth_heads}},
    }  # fmt: skip
    llm = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": s.llm_width,
        "intermediate_size": s.llm_mlp, "max_position_embeddings": 4096, "num_attention_heads": s.llm_heads,
        "num_hidden_layers": s.llm_blocks, "num_key_value_heads": s.llm_heads, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "linear"}, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": s.llm_rows, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    root = {
        "architectures": ["VILAULlamaModel"], "model_type": "vila_u_llama", "image_aspect_ratio": "resize",
        "num_video_frames": 8, "mm_use_im_start_end": True, "hidden_size": s.llm_width, "mm_hidden_size": s.width,
    }  # fmt: skip
    tokens = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
    return {
        "config.json": root,
        "llm/config.json": llm,
        "llm/generation_config.json": {
            "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        },
        "llm/added_tokens.json": {token: s.llm_rows - 4 + index for index, token in enumerate(tokens)},
        "mm_projector/config.json": {"model_type": "v2l_projector", "mm_projector_type": "mlp2x_gelu"},
        "vision_tower/config.json": {
            "hidden_size": s.width, "model_type": "rqvaesigliptransformer_model", "rqtransformer": rq,
            "rqvaesiglip": vq,
        },
        "vision_tower/preprocessor_config.json": {
            "crop_size": {"height": s.side, "width": s.side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
    }  # fmt: skip


def tower_tensors(s: Sizes) -> dict[str, torch.Tensor]:
    tensors = {key: torch.randn(shape).bfloat16() / 8 for key, shape in tower_shapes(s).items()}
    codebook = tensors["rqvaesiglip.quantizer.codebooks.0.weight"]
    codebook[-1] = 0
    for index in range(s.depth):
        tensors[f"rqvaesiglip.quantizer.codebooks.{index}.weight"] = codebook.clone()
    for name in ("logit_scale", "logit_bias"):
        tensors[f"rqvaesiglip.siglip_model.{name}"] = tensors[f"rqvaesiglip.{name}"].clone()
    return tensors


def write_checkpoint(folder: Path, s: Sizes = TINY) -> Path:
    """A checkpoint with random numbers, the language model in two files, and the tokenizer of the tests."""
    torch.manual_seed(0)
    for part in ("llm", "mm_projector", "vision_tower"):
        (folder / part).mkdir(parents=True)
    tiny_tokenizer().save_pretrained(folder / "llm")
    for path, content in jsons(s).items():
        (folder / path).write_text(json.dumps(content))
    save_file(tower_tensors(s), folder / "vision_tower/model.safetensors")
    projector = {key: torch.randn(shape).bfloat16() for key, shape in projector_shapes(s).items()}
    save_file(projector, folder / "mm_projector/model.safetensors")
    tensors = {key: torch.randn(shape).bfloat16() for key, shape in llm_shapes(s).items()}
    names = list(tensors)
    where = {}
    for number, keys in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / "llm" / file)
        where |= dict.fromkeys(keys, file)
    (folder / "llm/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
