"""Which layers are quantized, at the sizes of the published models, and how little memory they then take."""

from collections import Counter

import diffusers
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

import diffusers_sana
from diffusers_sana import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.integrations.checkpoint import insert_empty_layers
from diffusers_sana.quantizers.svdquant.layers.linear import empty_weight
from diffusers_sana.quantizers.svdquant.targets import as_patterns, find_targets, sibling_groups, weight_shape
from tests.quantizers import tiny_models


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd3_medium() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
    )


# Model, layers in w4a4 and in w4a16, and the bytes of all its tensors at most, as a part of bf16's.
PUBLISHED = {
    "sana-1.6B": (diffusers_sana.SanaTransformer2DModel, 160, 41, 0.30),
    "diffusers-sana-1.6B": (diffusers.SanaTransformer2DModel, 160, 41, 0.30),
    "flux.1-dev": (lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), 418, 76, 0.29),
    "pixart-sigma": (lambda: diffusers.PixArtTransformer2DModel(sample_size=128), 224, 57, 0.32),
    "sd3-medium": (sd3_medium, 285, 48, 0.31),
    "sdxl": (sdxl, 560, 140, 0.41),  # convolutions stay
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    make, w4a4, w4a16, most = PUBLISHED[name]
    with torch.device("meta"):
        model = make()
    config = SVDQuantConfig()
    targets = find_targets(model, config)
    assert Counter(targets.values()) == {"w4a4": w4a4, "w4a16": w4a16}

    before = after = 2 * sum(parameter.numel() for parameter in model.parameters())
    for target, mode in targets.items():
        features = weight_shape(model.get_submodule(target))
        tensors = (
            empty_weight(*features, config.for_layer(mode).rank, config.precision, torch.bfloat16).tensors().values()
        )
        after += sum(tensor.nbytes for tensor in tensors) - 2 * features[0] * features[1]
    assert after <= most * before


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_patterns_mean_the_same_layers(family):
    model, _ = tiny_models.FAMILIES[family]()
    targets = find_targets(model, SVDQuantConfig(rank=4))
    patterns = as_patterns(targets, model)
    if family == "sana":
        assert "transformer_blocks.*.attn1.to_q" in patterns
    recorded = SVDQuantConfig(rank=4, modules=patterns)
    assert find_targets(model, recorded) == targets
    insert_empty_layers(model, recorded)
    assert as_patterns(targets, model) == patterns  # also when they are quantized
    with pytest.raises(ValueError, match="matches none"):
        find_targets(model, recorded)


def test_text_encoders_keep_their_activations():
    with torch.device("meta"):
        gemma = Gemma2Model(Gemma2Config(num_hidden_layers=2, vocab_size=8))
        t5 = T5EncoderModel(T5Config(num_layers=2, feed_forward_proj="gated-gelu"))
    assert Counter(find_targets(gemma, SVDQuantConfig()).values()) == {"w4a16": 14}
    t5_targets = find_targets(t5, SVDQuantConfig())
    assert Counter(t5_targets.values()) == {"w4a16": 12}
    assert not any(name.endswith("wo") for name in t5_targets)  # fp32 by the wish of the model
    chosen = find_targets(gemma, SVDQuantConfig(modules={"layers.*.mlp.*_proj": "w4a4"}))
    assert Counter(chosen.values()) == {"w4a4": 6}


class TestChoice:
    @pytest.fixture
    def model(self):
        with torch.device("meta"):
            return tiny_models.sana()[0]

    def test_what_stays(self, model):
        targets = find_targets(model, SVDQuantConfig(rank=4))
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        kept = {name.removeprefix("transformer_blocks.0.") for name in linear - targets.keys() if ".1." not in name}
        assert kept == {
            "patch_embed.proj",
            "time_embed.emb.timestep_embedder.linear_1",
            "time_embed.emb.timestep_embedder.linear_2",
            "caption_projection.linear_1",
            "caption_projection.linear_2",
            "ff.conv_depth",
            "proj_out",
        }

    @pytest.mark.parametrize("pattern", ["attn1", "transformer_blocks.*.attn1", "*attn1.*"])
    def test_leave_out(self, model, pattern):
        everything = find_targets(model, SVDQuantConfig(rank=4))
        targets = find_targets(model, SVDQuantConfig(rank=4, modules_to_not_convert=[pattern]))
        assert everything.keys() - targets.keys() == {name for name in everything if "attn1" in name}

    def test_first_pattern_decides(self, model):
        modules = {"transformer_blocks.0.*.to_q": "w4a16", "*.to_q": "w4a4"}
        targets = find_targets(model, SVDQuantConfig(rank=4, modules=modules))
        assert targets == {
            f"transformer_blocks.{i}.{attention}.to_q": "w4a4" if i else "w4a16"
            for i in (0, 1)
            for attention in ("attn1", "attn2")
        }

    def test_the_model_may_say_it(self, model):
        model._svdquant_modules = {"proj_out": "w4a16"}
        assert find_targets(model, SVDQuantConfig(rank=4)) == {"proj_out": "w4a16"}
        chosen = find_targets(model, SVDQuantConfig(rank=4, modules={"*.attn1.to_q": "w4a4"}))
        assert len(chosen) == 2

    @pytest.mark.parametrize("in_fp32", ["attn1", ["attn1"]])
    def test_modules_in_fp32_stay(self, model, in_fp32):
        model._keep_in_fp32_modules = in_fp32
        assert not any("attn1" in name for name in find_targets(model, SVDQuantConfig(rank=4)))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"modules": {"attn1": "w4a4"}}, "`modules` must name layers of the model; 'attn1' matches none"),
            ({"modules": {"*.conv_depth": "w4a4"}}, "'\\*.conv_depth' matches none"),  # not a 1x1 convolution
            ({"modules_to_not_convert": ["attn7"]}, "`modules_to_not_convert` must name .* 'attn7' matches none"),
            ({"modules_to_not_convert": ["*"]}, "no layer of SanaTransformer2DModel is to be quantized"),
            ({"rank": 17}, "`rank` must be at most 16, the smaller side of layer 'time_embed.linear', got 17"),
        ],
    )
    def test_bad_arguments(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            find_targets(model, SVDQuantConfig(**{"rank": 4, **arguments}))


def test_tied_weights_stay_in_16_bits():
    """A layer whose weight is that of the embeddings could not be loaded again in 4 bits."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(64, 64)
            self.blocks = nn.ModuleList([nn.Linear(64, 64)])
            self.lm_head = nn.Linear(64, 64, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

    model = Model()
    config = SVDQuantConfig(modules={"*": "w4a16"}, rank=4)
    assert find_targets(model, config) == {"blocks.0": "w4a16"}
    named = SVDQuantConfig(modules={"blocks.*": "w4a4", "lm_*": "w4a16"}, rank=4)
    with pytest.raises(
        ValueError, match=r"'lm_\*' only matches 'lm_head', whose weight is also that of 'embed_tokens'"
    ):
        find_targets(model, named)
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 64))
    assert set(find_targets(model, named)) == {"blocks.0", "lm_head"}


def test_siblings_share_their_input():
    targets = find_targets(tiny_models.sana()[0], SVDQuantConfig(rank=4))
    groups = [group for group in sibling_groups(targets) if group[0].startswith("transformer_blocks.0.attn")]
    leaves = [[name.removeprefix("transformer_blocks.0.") for name in group] for group in groups]
    assert leaves == [
        ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
        ["attn1.to_out.0"],
        ["attn2.to_q"],
        ["attn2.to_k", "attn2.to_v"],
        ["attn2.to_out.0"],
    ]


def test_siblings_share_their_mode():
    assert sibling_groups({"a.to_q": "w4a4", "a.to_k": "w4a16", "a.to_v": "w4a4"}) == [
        ["a.to_q", "a.to_v"],
        ["a.to_k"],
    ]
