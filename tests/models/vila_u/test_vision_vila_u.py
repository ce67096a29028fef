"""The vision tower of VILA-U: against SigLIP of transformers, alone as an image tokenizer, and in training."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import SiglipConfig, SiglipModel

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig
from diffusers_sana.models.vila_u.siglip_vila_u import sigmoid_contrastive_loss
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel
from tests.models.vila_u.tiny import CELLS, CODES, DEPTH, VOCABULARY, tiny_vision_config
from tests.numerics import assert_close_fp32, relative_error


SEMANTIC = {"use_semantic_head": True, "use_text_tower": True}
RESIZED = {"image_size": 32, "patch_size": 7, "decoder_latent_size": 4}  # like the 384 pixel model: 4 x 7 < 32


def tower(seed=0, **overrides):
    torch.manual_seed(seed)
    return VilaUVisionModel(tiny_vision_config(**overrides)).eval()


def siglip(ours):
    """SigLIP of transformers with the weights of `ours`."""
    config, names = ours.config, ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: getattr(config, f"text_{name}") for name in ("vocab_size", "max_position_embeddings", *names)}
    vision = {name: getattr(config, name) for name in ("image_size", "patch_size", *names)}
    text["projection_size"] = config.hidden_size
    theirs = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    last = config.num_hidden_layers - 1
    weights = {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("text_model.layers.", "text_model.encoder.layers.")
        name = name.replace("semantic_head.layer.", f"layers.{last}.").removeprefix("semantic_head.")
        if name.startswith("layers."):
            name = f"encoder.{name}"
        if not name.startswith(("text_model.", "logit_", "quantizer.", "post_quant_conv.", "decoder.")):
            name = f"vision_model.{name}"
        weights[name] = tensor
    missing, extra = theirs.load_state_dict(weights, strict=False)
    assert not missing
    assert all(name.startswith(("quantizer.", "post_quant_conv.", "decoder.")) for name in extra)
    return theirs.eval()


def random_images(number=2, size=32):
    return torch.rand(number, 3, size, size) * 2 - 1


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", [{}, RESIZED], ids=["256", "384"])
def test_encoder_equals_siglip(attention, layout):
    ours, images = tower(**SEMANTIC, **layout), random_images()
    expected = siglip(ours).vision_model(images, output_hidden_states=True).hidden_states
    ours.set_attn_implementation(attention)
    features = ours.encode(images)
    assert features.shape == (2, 4, 4, 32)
    assert_close_fp32(features.flatten(1, 2), expected[ours.config.num_hidden_layers - 1])
    out = ours(images, output_hidden_states=True)
    assert len(out.hidden_states) == ours.config.num_hidden_layers + 1  # the semantic head runs the last block
    for actual, reference in zip(out.hidden_states[:-1], expected, strict=False):
        assert_close_fp32(actual, reference)


def test_attention_weights():
    model = tower(attn_implementation="eager")
    attentions = model(random_images(), output_attentions=True).attentions
    assert [list(weights.shape) for weights in attentions] == [[2, 4, CELLS, CELLS]] * len(model.layers)
    assert_close_fp32(attentions[0].sum(dim=-1), torch.ones(2, 4, CELLS))


def test_semantic_head_and_text_tower_equal_siglip():
    ours, images, ids = tower(**SEMANTIC), random_images(), torch.randint(VOCABULARY, (2, 16))
    theirs = siglip(ours)
    assert_close_fp32(ours.semantic_head(ours.encode(images).flatten(1, 2)), theirs.vision_model(images).pooler_output)
    expected = theirs(input_ids=ids, pixel_values=images, return_loss=True)
    assert_close_fp32(
        torch.nn.functional.normalize(ours.get_text_features(ids), dim=-1), expected.text_embeds, tolerance=1e-5
    )
    texts = ours.get_text_features(ids)
    assert_close_fp32(ours.contrastive_loss(expected.image_embeds, texts), expected.loss)
    assert ours.logit_scale.exp().item() == pytest.approx(10)
    assert ours.logit_bias.item() == -10
    out = ours(images)
    assert torch.equal(out.image_embeds, ours.get_image_features(images))
    ours.contrastive_loss(out.image_embeds, texts).backward()
    for name in ("logit_scale", "logit_bias", "semantic_head.head.probe", "layers.0.mlp.fc1.weight"):
        assert ours.get_parameter(name).grad.abs().max() > 0


def test_contrastive_loss_by_its_formula():
    images, texts = torch.randn(3, 8), torch.randn(3, 8)
    scale, bias, loss = torch.tensor([0.5]), torch.tensor([-1.0]), 0.0
    for i in range(3):
        for j in range(3):
            similarity = torch.cosine_similarity(images[i], texts[j], dim=0)
            sign = 1 if i == j else -1
            loss = loss - torch.sigmoid(sign * (scale.exp() * similarity + bias)).log() / 3
    assert_close_fp32(sigmoid_contrastive_loss(images, texts, scale, bias), loss.squeeze())


def test_codes_and_back():
    model, images = tower(), random_images()
    out = model(images)
    codes = model.encode_to_codes(images)
    assert codes.shape == (2, CELLS, DEPTH)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, out.codes)
    assert torch.equal(model.embed_codes(codes), out.quantized)
    assert_close_fp32(model.embed_code(codes).sum(dim=2), out.quantized)
    assert torch.equal(model.decode_codes(codes.int()), out.reconstruction)
    assert out.reconstruction.shape == images.shape
    assert out.image_embeds is None
    assert [len(part) for part in model(images, return_dict=False)[:2]] == [2, 2]


def test_latents_are_resized_before_the_decoder():
    model = tower(image_size=32, patch_size=10, decoder_latent_size=4)  # a grid of 3
    codes = torch.randint(CODES, (1, 9, DEPTH))
    latents = model.embed_codes(codes).mT.reshape(1, 32, 3, 3)
    resized = torch.nn.functional.interpolate(latents, (4, 4), mode="bilinear", align_corners=False)
    out = model.decode_codes(codes)
    assert out.shape == (1, 3, 32, 32)
    assert_close_fp32(out, model.decoder(model.post_quant_conv(resized)))


def test_official_sizes_256():
    """Counts of the official checkpoint: 792 tensors of SigLIP with two scalars, 194 of the decoder."""
    with torch.device("meta"):
        model = VilaUVisionModel(VilaUVisionConfig(**SEMANTIC))
    keys = list(model.state_dict())
    tensors = {name: sum(key.startswith(f"{name}.") for key in keys) for name, _ in model.named_children()}
    assert sum(tensors[name] for name in ("embeddings", "layers", "semantic_head", "text_model")) == 790
    assert tensors["embeddings"] + tensors["layers"] == 3 + 23 * 16
    assert tensors["text_model"] == 390
    assert (tensors["decoder"], tensors["post_quant_conv"], tensors["quantizer"]) == (194, 2, 1)
    assert count(model.layers[0]) == 12_596_224
    assert count(model.embeddings) + count(model.layers) == 290_762_752
    assert count(model.semantic_head) + count(model.text_model) == pytest.approx(25.2e6 + 336.2e6, rel=1e-3)
    assert count(model.decoder) == 42_449_795
    assert list(model.quantizer.embedding.weight.shape) == [16384, 1024]


def test_official_sizes_384():
    config = VilaUVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        image_size=384,
        patch_size=14,
        num_codebooks=16,
        decoder_latent_size=24,
    )
    with torch.device("meta"):
        model = VilaUVisionModel(config)
    assert len(model.layers) == 26
    assert list(model.embeddings.position_embedding.weight.shape) == [729, 1152]
    assert list(model.post_quant_conv.weight.shape) == [256, 1152, 1, 1]
    assert model.decode(torch.empty(1, 729, 1152, device="meta")).shape == (1, 3, 384, 384)
    assert model.encode(torch.empty(1, 3, 384, 384, device="meta")).shape == (1, 27, 27, 1152)


def test_save_and_load(tmp_path):
    model, images = tower(**SEMANTIC).train(), random_images()
    model.quantizer.start_ema()
    model(images)
    model.eval().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "_ema" in key]  # noqa: SIM118
    assert {key for key in model.state_dict() if "_ema" in key} == {
        "quantizer.embed_ema",
        "quantizer.cluster_size_ema",
    }
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vila_u_vision"
    loaded, info = VilaUVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(images).reconstruction, model(images).reconstruction)
    half = VilaUVisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    out = half(images)
    assert out.reconstruction.dtype == torch.bfloat16
    assert torch.equal(half.embed_codes(out.codes), out.quantized)
    assert relative_error(half.decode_codes(out.codes), loaded.decode_codes(out.codes)) < 0.05


def test_what_a_checkpoint_lacks_is_initialised(tmp_path):
    """A SigLIP-like start: no decoder, codebook or heads in the file; everything else is built on meta and filled."""
    model = tower()
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("embeddings", "layers"))}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = VilaUVisionModel.from_pretrained(tmp_path, **SEMANTIC)
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all(), name
        if name in state:
            assert torch.equal(parameter, state[name]), name
    assert 0.9 < loaded.quantizer.embedding.weight.std() < 1.1
    assert 0.01 < loaded.semantic_head.head.probe.std() < 0.03
    assert loaded.logit_bias.item() == -10


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model, images = tower(**SEMANTIC).train(), random_images()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        out = model(images.clone().requires_grad_())
        (out.reconstruction.square().mean() + out.commitment_loss + out.image_embeds.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert torch.equal(gradient, gradients[1][name]), name
    without = {name for name, gradient in gradients[1].items() if gradient is None}
    assert all(name.startswith(("quantizer.", "text_model.", "logit_")) for name in without)


def test_compiles_whole():
    layout = {"num_hidden_layers": 2, "num_codebooks": 2, "patch_size": 2, "decoder_channel_multipliers": (1, 1)}
    model, images = tower(image_size=8, **layout), random_images(size=8)
    compiled = torch.compile(lambda x: model.decode_codes(model.encode_to_codes(x)), fullgraph=True, backend="eager")
    assert_close_fp32(compiled(images), model.decode_codes(model.encode_to_codes(images)))


def test_overfits_four_images():
    """Encoder, codebook and decoder learn together: the error falls to a quarter of what the images' mean makes."""
    model = tower(codebook_decay=0.9).train()
    model.quantizer.start_ema()
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4), size=32, mode="bilinear") * 2 - 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(24):
        out = model(images)
        loss = (out.reconstruction - images).square().mean()
        (loss + model.config.commitment_loss_weight * out.commitment_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    error = (model.decode_codes(model.encode_to_codes(images)) - images).square().mean()
    assert error < 0.25 * images.var()


def test_errors():
    model = tower()
    with pytest.raises(ValueError, match=r"`pixel_values` must be \[batch, 3, 32, 32\], got \[1, 3, 40, 32\]"):
        model.encode(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"got \[3, 32, 32\]; resize"):
        model(torch.zeros(3, 32, 32))
    codes = torch.zeros(1, CELLS, DEPTH, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`codes` must be \[batch, 16, 3\], got \[1, 5, 3\]"):
        model.decode_codes(codes[:, :5])
    assert model.embed_codes(codes[:, :5]).shape == (1, 5, 32)
    with pytest.raises(ValueError, match=r"`codes` must be \[batch, tokens, 3\], got \[1, 16, 2\]"):
        model.embed_codes(codes[..., :2])
    with pytest.raises(ValueError, match=r"`codes` must be in 0 to 63, got 0 to 64"):
        model.embed_codes(codes.index_fill(1, torch.tensor(3), CODES))
    with pytest.raises(ValueError, match=r"got -1 to -1"):
        model.decode_codes(codes - 1)
    with pytest.raises(TypeError, match=r"`codes` must be int32 or int64, got torch.float32"):
        model.decode_codes(codes.float())
    with pytest.raises(ValueError, match="use_semantic_head=True"):
        model.get_image_features(random_images())
    with pytest.raises(ValueError, match="use_text_tower=True"):
        model.get_text_features(codes[..., 0])
    with pytest.raises(ValueError, match="use_text_tower=True"):
        model.contrastive_loss(torch.zeros(1, 32), torch.zeros(1, 32))
    semantic = tower(**SEMANTIC)
    with pytest.raises(ValueError, match=r"\[batch, 1 to 16 tokens\], got \[1, 17\]"):
        semantic.get_text_features(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must both be \[N, C\], got \[2, 32\] and \[1, 32\]"):
        semantic.contrastive_loss(torch.zeros(2, 32), torch.zeros(1, 32))
