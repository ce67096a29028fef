"""IP-Adapters of Sana: decoupled attention to image tokens, what it equals, files, and errors."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_sana
from diffusers_sana import SanaIPAdapterModel, SVDQuantConfig, quantize
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.image_prompt_cases import trained_adapter


@pytest.fixture(scope="module", params=[None, "rms_norm_across_heads"], ids=["sana", "sana-1.5"])
def transformer(request):
    return tiny.transformer(diffusers_sana, qk_norm=request.param)


def inputs(batch_size=3):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch_size, tiny.LATENT_CHANNELS, 4, 4, generator=generator)
    text = torch.randn(batch_size, 5, tiny.TEXT_WIDTH, generator=generator)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])[:batch_size]
    return latents, text, mask, torch.full((batch_size,), 500.0)


def predict(transformer, image_states=(), rows=slice(None)):
    latents, text, mask, times = (value[rows] for value in inputs())
    context = transformer.encode_text(text, mask, image_states=image_states)
    return transformer(latents, None, times, text_context=context).sample


def pooled(rows=3, images=1):
    return torch.randn(rows, images, 12, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_a_new_adapter_has_no_effect_and_takes_the_keys_of_the_transformer(transformer):
    adapter = SanaIPAdapterModel.from_transformer(transformer, 12)
    assert_close_fp32(predict(transformer, adapter([pooled()])), predict(transformer))
    block, layer = transformer.transformer_blocks[1].attn2, adapter.ip_adapters[0].ip_adapter[1]
    assert torch.equal(layer.to_k_ip.weight, block.to_k.weight)
    assert (layer.norm_k_ip is None) == (block.norm_k is None)


@torch.no_grad()
def test_equals_the_formula_in_one_block(transformer):
    """softmax(q k^T) v of the text plus that of the image tokens, written out."""
    adapter, attention = trained_adapter(transformer), transformer.transformer_blocks[0].attn2
    hidden, text = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    image = adapter([pooled(rows=2)])[0][0]
    query = attention.to_q(hidden)
    query = query if attention.norm_q is None else attention.norm_q(query)
    key, value = attention.to_k(text), attention.to_v(text)
    key = key if attention.norm_k is None else attention.norm_k(key)

    def attended(key, value):
        heads = [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (query, key, value)]
        weights = (heads[0] @ heads[1].mT / 8**0.5).softmax(dim=-1)
        return (weights @ heads[2]).transpose(1, 2).flatten(2)

    both = attended(key, value) + attended(image.key.flatten(2), image.value.flatten(2))
    expected = attention.to_out[0](both)
    assert_close_fp32(attention(hidden, encoder_hidden_states=text, image_states=(image,)), expected)


@torch.no_grad()
def test_only_the_last_rows_have_the_image_and_each_is_as_alone(transformer):
    """Also a row of a single text token, whose attention to the text is a constant without an image."""
    adapter = trained_adapter(transformer)
    plain, states = predict(transformer), adapter([pooled(rows=2)])
    out = predict(transformer, states)
    assert_close_fp32(out[:1], plain[:1])
    for row in (1, 2):
        assert relative_error(out[row], plain[row]) > 1e-3
        alone = predict(transformer, adapter([pooled(rows=2)[row - 1 : row]]), slice(row, row + 1))
        assert_close_fp32(out[row : row + 1], alone)
    single = slice(0, 1)
    alone = predict(transformer, adapter([pooled()[:1]]), single)
    assert relative_error(alone, plain[:1]) > 1e-3
    assert_close_fp32(predict(transformer, adapter([pooled(rows=3)[[0, 0, 0]]]))[:1], alone)


@torch.no_grad()
def test_rows_of_a_context(transformer):
    latents, text, mask, times = inputs()
    context = transformer.encode_text(text, mask, image_states=trained_adapter(transformer)([pooled(rows=2)]))
    whole = transformer(latents, None, times, text_context=context).sample
    for start, stop in ((0, 1), (0, 2), (1, 3), (2, 3)):
        part = transformer(latents[start:stop], None, times[start:stop], text_context=context.rows(start, stop))
        assert_close_fp32(part.sample, whole[start:stop])
    assert context.rows(0, 1).image_states == ()


@torch.no_grad()
def test_scales(transformer):
    adapter = trained_adapter(transformer)
    plain, full = predict(transformer), predict(transformer, adapter([pooled()]))
    adapter.set_scale(0.0)
    assert adapter([pooled()]) == ()
    adapter.set_scale([0.0, 1.0])
    of_one_block = predict(transformer, adapter([pooled()]))
    assert relative_error(of_one_block, plain) > 1e-3
    assert relative_error(of_one_block, full) > 1e-3
    adapter.set_scale(0.5)
    doubled = copy.deepcopy(adapter)
    for layer in doubled.ip_adapters[0].ip_adapter:
        layer.to_v_ip.weight.mul_(0.5)
    doubled.set_scale([1])
    states = (model([pooled()]) for model in (adapter, doubled))
    assert_close_fp32(*(predict(transformer, each) for each in states))
    for wrong, error in (("1", TypeError), ([1, 2, 3], ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match="`scale` must"):
            adapter.set_scale(wrong)


@torch.no_grad()
def test_several_adapters_add_and_several_images_share_a_softmax(transformer, tmp_path):
    one, other = trained_adapter(transformer), trained_adapter(transformer, 8, seed=2, features="patches", depth=1)
    patches = torch.randn(3, 2, 4, 8)
    files = [load_file(each.save_adapter(tmp_path / name)) for name, each in (("one", one), ("other", other))]
    both = SanaIPAdapterModel.from_tensors(files, num_heads=2)
    states = both([pooled(), patches])
    separate = one([pooled()]), other([patches])
    for block, images in enumerate(states):
        for image, (expected,) in zip(images, (each[block] for each in separate), strict=True):
            assert_close_fp32(image.key, expected.key)
            assert_close_fp32(image.value, expected.value)
    assert states[0][0].key.shape == (3, 4, 2, 8)
    assert states[0][1].key.shape == (3, 2 * 16, 2, 8)  # 16 queries for each of two images
    both.set_scale([1, 0])
    assert_close_fp32(predict(transformer, both([pooled(), patches])), predict(transformer, separate[0]))
    both.set_scale([[1, 1], 0.0])
    assert both.scales == [[1, 1], [0, 0]]
    twice = pooled()[:, [0, 0]]  # the same image twice: keys twice, the same softmax
    assert_close_fp32(predict(transformer, one([twice])), predict(transformer, one([pooled()])))


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_files_and_folders(transformer, tmp_path, features):
    adapter = trained_adapter(transformer, 12, features=features, num_tokens=3, token_dim=10)
    path = adapter.save_adapter(tmp_path)
    read = SanaIPAdapterModel.from_tensors([load_file(path)], num_heads=2)
    adapter.save_pretrained(tmp_path / "folder")
    loaded = SanaIPAdapterModel.from_pretrained(tmp_path / "folder")
    for each in (read, loaded):
        assert each.config["adapters"] == adapter.config["adapters"]
        own = each.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in adapter.state_dict().items())
    names = load_file(path)
    assert {name.split(".")[0] for name in names} == {"image_proj", "ip_adapter"}
    save_file({name: value for name, value in names.items() if "1.to_v_ip" not in name}, path)
    with pytest.raises(ValueError, match=r"1 tensors .* 'ip_adapter.1.to_v_ip.weight' first"):
        SanaIPAdapterModel.from_tensors([load_file(path)], num_heads=2)


@torch.no_grad()
def test_on_4_bits():
    """The transformer is quantized, the adapter is not: the same states, near the same image."""
    wider = {"num_attention_heads": 8, "num_cross_attention_heads": 8, "cross_attention_dim": 64}
    transformer = tiny.transformer(diffusers_sana, **wider)
    quantized = copy.deepcopy(transformer)
    quantize(quantized, SVDQuantConfig(rank=4), progress=False)
    adapter = trained_adapter(transformer)
    states = adapter([pooled()])
    assert 1e-5 < relative_error(predict(quantized, states), predict(transformer, states)) < 0.3
    assert relative_error(predict(quantized, states), predict(quantized)) > 1e-3
    fresh = SanaIPAdapterModel.from_transformer(quantized, 12)
    assert relative_error(predict(quantized, fresh([pooled()])), predict(quantized)) < 1e-5


def test_gradients_reach_the_adapter_and_nothing_else():
    transformer = tiny.transformer(diffusers_sana).requires_grad_(False)
    adapter = trained_adapter(transformer)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        adapter.zero_grad()
        predict(transformer, adapter([pooled()])).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert_close_fp32(gradients[1][name], gradient)
    assert all(parameter.grad is None for parameter in transformer.parameters())


class TestErrors:
    def test_features(self, transformer):
        adapter = trained_adapter(transformer)
        for wrong in (torch.randn(3, 1, 13), torch.randn(3, 12), torch.randn(3, 1, 4, 12)):
            with pytest.raises(ValueError, match=r"`image_embeds` must be \[prompts, images, 12\]"):
                adapter([wrong])
        with pytest.raises(ValueError, match="a list of 1, one tensor for each IP-Adapter, got 2"):
            adapter([pooled(), pooled()])
        with pytest.raises(TypeError, match="must hold floating point tensors, got int"):
            adapter([3])
        with pytest.raises(ValueError, match="`features` must be one of"):
            SanaIPAdapterModel.from_transformer(transformer, 12, features="tokens")
        with pytest.raises(ValueError, match="`hidden_dim` must be at most 64 or a multiple of it, got 100"):
            SanaIPAdapterModel.from_transformer(transformer, 12, features="patches", hidden_dim=100)

    def test_another_transformer(self, transformer):
        adapter = trained_adapter(transformer)
        norm = None if transformer.config["qk_norm"] else "rms_norm_across_heads"
        for changes in ({"num_layers": 3}, {"qk_norm": norm}, {"num_cross_attention_heads": 4}):
            wider = {"cross_attention_head_dim": 4} if "num_cross_attention_heads" in changes else {}
            other = tiny.transformer(diffusers_sana, **{"qk_norm": transformer.config["qk_norm"]} | changes | wider)
            with pytest.raises(ValueError, match="for another transformer: it has 2 blocks with 2 heads of width 8"):
                adapter.check_transformer(other)
        deeper = tiny.transformer(diffusers_sana, num_layers=3)
        with pytest.raises(ValueError, match="`image_states` must be of 3 blocks with 2 heads of width 8, got 2"):
            predict(deeper, adapter([pooled()]))
        with pytest.raises(ValueError, match="at most as many rows as there are prompts, 3, got 4"):
            predict(transformer, adapter([pooled(rows=4)]))

    def test_models_and_processors_that_take_none(self, transformer):
        states = trained_adapter(transformer)([pooled()])
        net = diffusers_sana.SanaControlNetModel.from_transformer(transformer, 1)
        with pytest.raises(ValueError, match="SanaControlNetModel takes no image prompts"):
            net.encode_text(*inputs()[1:3], image_states=states)
        changed = copy.deepcopy(transformer)
        changed.transformer_blocks[1].attn2.set_processor(lambda attn, hidden_states, **_: hidden_states)
        with pytest.raises(ValueError, match="need the attention processor SanaAttnProcessor"):
            predict(changed, states)

    def test_files_of_something_else(self):
        with pytest.raises(ValueError, match=r"must be those of an IP-Adapter of Sana.* such as 'proj.weight'"):
            SanaIPAdapterModel.from_tensors([{"proj.weight": torch.zeros(2, 2)}], num_heads=2)
        with pytest.raises(ValueError, match="at least one adapter"):
            SanaIPAdapterModel([])
