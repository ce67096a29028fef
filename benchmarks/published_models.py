"""What quantization finds in the published models, and the bytes that are left: modules and sizes, without weights.

    python -m benchmarks.published_models

Every model is built on the meta device from the facts of its published config (where none are given here, they are the
defaults of its class), so this takes seconds and downloads nothing. `tests/quantizers/test_published_models.py` holds
the result file to the code, and `python -m benchmarks.tables` writes the table of docs/quantization_models.md from it.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

import diffusers_sana
from benchmarks.harness import RESULTS
from benchmarks.models import GEMMA_2_2B
from diffusers_sana import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import empty_weight
from diffusers_sana.quantizers.svdquant.targets import find_targets, is_quantizable, weight_shape


RESULT = RESULTS / "cpu" / "published_models.json"


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        kind: of its class: a name in diffusers or transformers, or a class.
        config: what differs from the defaults of its class; for transformers all that matters.
        options: of `SVDQuantConfig`, the hint where the choice by structure needs one.
    """

    kind: Any
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            if not isinstance(self.kind, str):
                return self.kind(**self.config)
            if hasattr(transformers, self.kind):
                cls = getattr(transformers, self.kind)
                return cls(cls.config_class(**self.config))
            return getattr(diffusers, self.kind)(**self.config)


_GEMMA_3 = {
    "vocab_size": 262208,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_QWEN_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD35 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
_WAN_5B = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}
_KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}

MODELS: dict[str, Published] = {
    "Sana 1.6B": Published(diffusers_sana.SanaTransformer2DModel),
    "SANA-Video 2B": Published("SanaVideoTransformer3DModel"),
    "SANA-Video 2.0 5B": Published(diffusers_sana.SanaVideo2Transformer3DModel),
    "SANA-WM 2.6B": Published("SanaWMTransformer3DModel"),
    "PixArt-Sigma": Published("PixArtTransformer2DModel", {"sample_size": 128}),
    "SDXL": Published("UNet2DConditionModel", _SDXL),
    "SD3.5 medium": Published(
        "SD3Transformer2DModel",
        {
            **_SD35,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "SD3.5 large": Published(
        "SD3Transformer2DModel",
        {
            **_SD35,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
    ),
    "FLUX.1 dev": Published("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2 dev": Published("Flux2Transformer2DModel"),
    "FLUX.2 klein 4B": Published("Flux2Transformer2DModel", _KLEIN),
    "Chroma 1": Published("ChromaTransformer2DModel"),
    "Qwen-Image": Published("QwenImageTransformer2DModel"),
    "Z-Image": Published("ZImageTransformer2DModel"),
    "Lumina Image 2.0": Published("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "HiDream I1": Published("HiDreamImageTransformer2DModel", _HIDREAM),
    "Wan 2.1 14B, 2.2 A14B": Published("WanTransformer3DModel"),
    "Wan 2.2 TI2V 5B": Published("WanTransformer3DModel", _WAN_5B),
    "HunyuanVideo": Published("HunyuanVideoTransformer3DModel"),
    "LTX-2": Published("LTX2VideoTransformer3DModel"),
    "Gemma 2 2B": Published("Gemma2Model", GEMMA_2_2B),
    "Gemma 3 12B, text": Published("Gemma3TextModel", _GEMMA_3),
    "T5 v1.1 XXL, encoder": Published("T5EncoderModel", _T5_XXL),
    "Qwen2.5-VL 7B": Published("Qwen2_5_VLModel", {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION}),
}


def measure(published: Published) -> dict[str, Any]:
    """The layers that quantization finds in a model, and the bytes of all its tensors before and after."""
    model = published.make()
    config = SVDQuantConfig(**published.options)
    targets = find_targets(model, config)
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    after = weights
    for name, mode in targets.items():
        sides = weight_shape(model.get_submodule(name))
        layer = config.for_layer(mode)
        tensors = empty_weight(*sides, layer.rank, layer.precision, torch.bfloat16).tensors().values()
        after += sum(tensor.nbytes for tensor in tensors) - 2 * sides[0] * sides[1]
    left = {name: module for name, module in model.named_modules() if is_quantizable(module) and name not in targets}
    largest = sorted(left, key=lambda name: -left[name].weight.numel())[:3]
    modes = Counter(targets.values())
    return {
        "class": type(model).__name__,
        "parameters": weights // 2,
        "w4a4": modes["w4a4"],
        "w4a16": modes["w4a16"],
        "layers_in_16_bit": len(left),
        "largest_in_16_bit": {name: 2 * left[name].weight.numel() for name in largest},
        "bf16_bytes": weights,
        "int4_bytes": after,
        "options": published.options,
    }


def main(measure: Callable[[Published], dict[str, Any]] = measure) -> None:
    """Measures all models and writes the result file."""
    found = {name: measure(published) for name, published in MODELS.items()}
    for name, result in found.items():
        share = result["int4_bytes"] / result["bf16_bytes"]
        print(f"{name:24} {result['w4a4']:5} {result['w4a16']:5} {share:.3f}", result["largest_in_16_bit"])
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
