"""The keys of LoRA files: what is known, and how what is not is refused."""

import diffusers
import pytest
import torch

from diffusers_sana.loaders.lora.changes import CHANGE
from diffusers_sana.loaders.lora.changes import matrix as whole_matrix
from diffusers_sana.loaders.lora.formats import convert_sana_lora, lora_scale
from tests import tiny
from tests.loaders.lora.lora_files import FORMATS, plain, random_lora
from tests.numerics import assert_close_fp32


DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
KOHYA = "lora_unet_transformer_blocks_0_attn1_to_q"
LAYER = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}
OURS = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_is_found(name):
    lora = random_lora(tiny.transformer(diffusers))
    state_dict, metadata = convert_sana_lora(FORMATS[name](lora))
    assert state_dict.keys() == plain(lora).keys()
    assert metadata is not None
    assert sorted(metadata["transformer.target_modules"]) == sorted(lora)


def test_guided_time_embedding():
    lora = random_lora(tiny.transformer(diffusers, guidance_embeds=True))
    state_dict, _ = convert_sana_lora(FORMATS["ComfyUI"](lora))
    assert state_dict.keys() == plain(lora).keys()


def test_ours_comes_back_as_it_is():
    state_dict = plain(random_lora(tiny.transformer(diffusers)))
    metadata = {"transformer.r": 2, "transformer.lora_alpha": 8}
    converted, fields = convert_sana_lora(state_dict, metadata)
    assert list(converted) == list(state_dict)
    assert all(converted[key] is tensor for key, tensor in state_dict.items())
    assert fields == metadata
    assert convert_sana_lora(state_dict)[1] is None


@pytest.mark.parametrize(
    ("fields", "alpha"),
    [
        ({"lora_alpha": 8}, 8),
        ({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn1.to_q": 4}}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 4}}, 8),
        ({"lora_alpha": 8, "use_rslora": True}, 8 * 2**0.5),
        (None, 2),
    ],
)
def test_alpha_of_peft(fields, alpha):
    name = "base_model.model.transformer_blocks.0.attn1.to_q"
    state_dict = {f"{name}.lora_A.default.weight": DOWN, f"{name}.lora_B.default.weight": UP}
    converted, metadata = convert_sana_lora(state_dict, fields)
    assert set(converted) == {f"{OURS}.lora_A.weight", f"{OURS}.lora_B.weight"}
    assert metadata["transformer.lora_alpha"] == pytest.approx(alpha)


def test_alpha_of_a_tensor_counts_for_more():
    _, metadata = convert_sana_lora({**LAYER, f"{KOHYA}.alpha": torch.tensor(6.0)}, {"lora_alpha": 8})
    assert metadata["transformer.lora_alpha"] == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": None}, "must have numbers for the rank and alpha of .*to_q', got 2, None"),
        (
            {"lora_alpha": 4, "alpha_pattern": "x"},
            "`alpha_pattern` of the LoRA config must be a dictionary, got 'x'",
        ),
        ({"lora_alpha": 4, "alpha_pattern": {"(": 2}}, "`alpha_pattern` of .* must have regular expressions"),
    ],
)
def test_configs_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        convert_sana_lora(LAYER, fields)


@pytest.mark.parametrize("shape", [(), (8, 8), (1, 3)])
def test_magnitudes_of_other_shapes(shape):
    with pytest.raises(ValueError, match=r"must have one number per output \(8\) or per input \(8\), got the shape"):
        convert_sana_lora({**LAYER, f"{KOHYA}.dora_scale": torch.ones(shape)})


DEPTH = "transformer.transformer_blocks.0.ff.conv_depth"
QKV = "diffusion_model.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "the transformer or the text encoder, but is empty"),
        ({f"{QKV}.lokr_w1": DOWN}, rf"'{QKV}.lokr_w1': the layer must have a tensor 'lokr_w2_a'"),
        ({f"{QKV}.hada_w1_a": DOWN}, rf"'{QKV}.hada_w1_a': the layer must have a tensor 'hada_w1_b'"),
        ({f"{QKV}.hada_w1_a": DOWN, f"{QKV}.lokr_w1": DOWN}, "must belong to one method, got .*'hada_w1_a', 'lok"),
        ({f"{QKV}.oft_r": DOWN}, r"belongs to a form of OFT of an old PEFT.* Save it again"),
        ({f"{QKV}.oft_R.weight": torch.ones(2, 4)}, r"must have the triangles of blocks, got the shape \[2, 4\]"),
        ({f"{QKV}.oft_blocks": torch.ones(2, 4)}, r"must have blocks with equal sides, got the shape \[2, 4\]"),
        ({f"{QKV}.oft_blocks": torch.ones(2, 4, 3, 3)}, r"must have blocks with an even side"),
        ({f"{QKV}.oft_blocks": torch.ones(4, 6, 6)}, r"'out_blocks' must have 3 equal parts"),
        ({f"{QKV}.rescale": DOWN}, r"the layer must have 'oft_blocks', got \['rescale'\]"),
        ({f"{QKV}.diff": DOWN, f"{QKV}.lokr_w1": DOWN}, "must belong to one method, got .*'diff', 'lokr_w1'"),
        ({f"{QKV}.oft_blocks": torch.ones(3, 4, 4), f"{QKV}.dora_scale": UP}, "must belong to a product"),
        ({f"{QKV}.lora_down.weight": DOWN, f"{QKV}.lora_up.weight": torch.ones(24, 2),
          f"{QKV}.dora_scale": torch.ones(1, 8)}, "DoRA over the inputs of a fused layer"),
        ({f"{KOHYA}.lora_mid.weight": DOWN}, "must have a second key"),
        ({**LAYER, f"{KOHYA}.lora_mid.weight": torch.ones(3, 3, 1, 1)}, "the Tucker core must fit between"),
        ({f"{KOHYA}.hada_t1": DOWN}, "the layer must have a tensor 'hada_w1_a'"),
        ({f"{KOHYA}.lokr_t1": DOWN}, "Tucker core in its first factor, which no trainer writes"),
        ({f"{KOHYA}.w_norm": DOWN}, "a change of a norm"),
        ({f"{KOHYA}.on_input": DOWN}, "belongs to IA3"),
        ({f"{KOHYA}.a1.weight": DOWN}, "belongs to GLoRA"),
        ({f"{KOHYA}.weight": DOWN}, r"is a whole weight of a layer \(`modules_to_save` or `bias` of PEFT\)"),
        ({f"{KOHYA}.unknown": DOWN}, r"is not part of a LoRA. A key must end in one of \['alpha', "),
        ({"lora_te_model_layers_0_q.lora_up.weight": UP}, "or the text encoder, but has only such as 'lora_te_model_"),
        ({f"{KOHYA}.dora_scale": UP}, r"must have LoRA factors next to it in the file"),
        ({**LAYER, f"{KOHYA}.alpha": UP}, rf"'{KOHYA}.alpha' must be one number, got the shape \[8, 2\]"),
        ({**LAYER, f"{KOHYA}.lora_up.weight": torch.ones(8)}, r"must have 2 or 4 axes, got the shape \[8\]"),
        ({**LAYER, f"{KOHYA}.lora_up.weight": UP.int()}, r"must be floating-point, got torch.int32"),
        ({"lora_unet_double_blocks_0_qkv.lora_up.weight": UP, "lora_unet_double_blocks_0_qkv.lora_down.weight": DOWN},
         "'lora_unet_double_blocks_0_qkv.*' is not a layer of Sana"),
        ({f"{KOHYA}.lora_up.weight": UP}, rf"'{KOHYA}.lora_up.weight' must have a second key .*'lora_down.weight'"),
        ({f"{KOHYA}.alpha": DOWN}, "the transformer or the text encoder, but has no factors"),
        ({**LAYER, f"{KOHYA}.lora_up.weight": torch.ones(8, 3)}, r"must have the same rank.*\[2, 8\], \[8, 3\]"),
        ({**LAYER, f"{KOHYA}.lora_A.weight": DOWN}, r"lora_A.weight' and .*lora_down.weight' are the same tensor"),
        ({**LAYER, f"{OURS}.lora_A.weight": DOWN, f"{OURS}.lora_B.weight": UP}, "another key of the file both map to"),
        ({f"{QKV}.lora_down.weight": DOWN, f"{QKV}.lora_up.weight": UP}, r"must have 3 equal parts, .*\[8, 2\]"),
        ({f"{DEPTH}.lokr_w1": DOWN, f"{DEPTH}.lokr_w2": DOWN}, "must give 3x3 weights per channel"),
    ],
)  # fmt: skip
def test_refused(state_dict, message):
    with pytest.raises(ValueError, match=message):
        convert_sana_lora(state_dict)


def test_what_the_text_encoder_does_not_have_is_left_out(caplog):
    text = {f"{prefix}layers.0.q_proj.lora_down.weight": DOWN for prefix in ("text_encoder.", "lora_te.", "lora_te1_")}
    bundled = {"bundle_emb.token.gemma": DOWN}
    converted, _ = convert_sana_lora({**LAYER, **text, **bundled})
    assert converted.keys() == {f"{OURS}.lora_A.weight", f"{OURS}.lora_B.weight"}
    assert "that are of another model (4 tensors, such as 'text_encoder.layers.0.q_proj.lora_down" in caplog.text
    assert "images differ from those in training" in caplog.text


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoder.layers.3.mlp.up_proj",
        "text_encoder.model.layers.3.mlp.up_proj",
        "lora_te_layers_3_mlp_up_proj",
        "lora_te1_model_layers_3_mlp_up_proj",
        "lora_text_encoder_layers_3_mlp_up_proj",
        "lycoris_te_model_layers_3_mlp_up_proj",
        "lycoris_layers_3_mlp_up_proj",
        "base_model.model.layers.3.mlp.up_proj",
        "base_model.model.model.layers.3.mlp.up_proj",
        "text_encoders.gemma2_2b.transformer.model.layers.3.mlp.up_proj",
        "layers.3.mlp.up_proj",
    ],
)
@pytest.mark.parametrize(
    "endings",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
def test_layers_of_the_text_encoder(stem, endings):
    text = dict(zip((f"{stem}.{ending}" for ending in endings), (DOWN, UP), strict=True))
    converted, fields = convert_sana_lora({**LAYER, **text, f"{stem}.alpha": torch.tensor(4.0)})
    name = "text_encoder.layers.3.mlp.up_proj"
    assert converted.keys() == {f"{x}.lora_{half}.weight" for x in (OURS, name) for half in "AB"}
    assert (fields["text_encoder.lora_alpha"], fields["text_encoder.r"]) == (4.0, 2)
    assert fields["text_encoder.target_modules"] == ["layers.3.mlp.up_proj"]
    assert fields["transformer.target_modules"] == [OURS.removeprefix("transformer.")]


def test_an_alpha_without_factors_changes_nothing(caplog):
    other = "lora_unet_transformer_blocks_0_attn1_to_k.alpha"
    converted, _ = convert_sana_lora({**LAYER, other: torch.tensor(4.0)})
    assert converted.keys() == {f"{OURS}.lora_A.weight", f"{OURS}.lora_B.weight"}
    assert "1 layers of the LoRA have an `alpha` but no factors" in caplog.text


def product(converted, metadata, name=OURS):
    """What is added to the weight of a layer: the product of a LoRA's factors, or a change of high rank."""
    parts = {key.partition(CHANGE)[2]: x for key, x in converted.items() if key.startswith(f"{name}.{CHANGE}")}
    if parts:
        return lora_scale(metadata, name.removeprefix("transformer."), 1) * whole_matrix(parts)
    down, up = converted[f"{name}.lora_A.weight"], converted[f"{name}.lora_B.weight"]
    layer = name.removeprefix("transformer.")
    return lora_scale(metadata, layer, len(down)) * torch.einsum("or...,ri...->oi...", up, down)


@pytest.mark.parametrize("rank", [2, 5])
def test_loha(rank):
    """(A1 B1) * (A2 B2) alpha / r, also where r * r is more than the sides of the layer."""
    a1, b1, a2, b2 = (torch.randn(*shape) for shape in ((12, rank), (rank, 10)) * 2)
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}
    converted, metadata = convert_sana_lora({f"{KOHYA}.{part}": tensor for part, tensor in factors.items()})
    if rank == 2:
        assert len(converted[f"{OURS}.lora_A.weight"]) == rank * rank
    else:
        assert list(converted) == [f"{OURS}.lora_change.diff"]
    assert_close_fp32(product(converted, metadata), 3 / rank * (a1 @ b1) * (a2 @ b2))


@pytest.mark.parametrize("whole", [(), ("lokr_w1",), ("lokr_w2",), ("lokr_w1", "lokr_w2")])
@pytest.mark.parametrize("fields", [None, {"r": 2, "alpha": 5}])
def test_lokr(whole, fields):
    """kron(W1, W2) alpha / r. LyCORIS has no scale where both are whole; PEFT always has its config's."""
    sides = {"lokr_w1": (3, 2), "lokr_w2": (5, 4)}
    factors, matrices = {}, []
    for part, (rows, columns) in sides.items():
        up, down = torch.randn(rows, 2), torch.randn(2, columns)
        matrices.append(up @ down)
        factors |= {part: up @ down} if part in whole else {f"{part}_a": up, f"{part}_b": down}
    if fields is None:
        factors["alpha"] = torch.tensor(3.0)
    prefix = KOHYA if fields is None else "base_model.model.transformer_blocks.0.attn1.to_q"
    converted, metadata = convert_sana_lora({f"{prefix}.{part}": value for part, value in factors.items()}, fields)
    scale = 5 / 2 if fields else 1 if len(whole) == 2 else 3 / 2
    assert_close_fp32(product(converted, metadata), scale * torch.kron(*matrices))


def test_loha_of_fused_layers_and_of_convolutions():
    names = {f"{OURS[:-1]}{letter}": slice(8 * i, 8 * i + 8) for i, letter in enumerate("qkv")}
    a1, b1, a2, b2 = (torch.randn(*shape) for shape in ((24, 2), (2, 6)) * 2)
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    converted, metadata = convert_sana_lora({f"{QKV}.{part}": tensor for part, tensor in factors.items()})
    for name, rows in names.items():
        assert_close_fp32(product(converted, metadata, name), ((a1 @ b1) * (a2 @ b2))[rows])
    point = "transformer.transformer_blocks.0.ff.conv_point"
    converted, metadata = convert_sana_lora({f"{point}.{part}": tensor for part, tensor in factors.items()})
    assert_close_fp32(product(converted, metadata, point)[..., 0, 0], (a1 @ b1) * (a2 @ b2))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_change_of_depthwise_weights(rows):
    """OneTrainer's factors make one row of all weights, LyCORIS' one row a channel: the same numbers in order."""
    a1, b1, a2, b2 = (torch.randn(*shape) for shape in ((rows, 2), (2, 36 // rows)) * 2)
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    converted, metadata = convert_sana_lora({f"{DEPTH}.{part}": tensor for part, tensor in factors.items()})
    down, up = converted[f"{DEPTH}.lora_A.weight"], converted[f"{DEPTH}.lora_B.weight"]
    scale = lora_scale(metadata, DEPTH.removeprefix("transformer."), len(down))
    assert_close_fp32(scale * down * up, (0.5 * (a1 @ b1) * (a2 @ b2)).reshape(4, 1, 3, 3))
