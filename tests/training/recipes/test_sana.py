"""A transformer goes on at another size or depth."""

import pytest
import torch

from diffusers_sana.training.growth import grow_transformer
from diffusers_sana.training.recipes.options import SanaModelOptions
from diffusers_sana.training.recipes.sana import with_native_size
from tests.training.tiny import tiny_transformer


def predict(transformer, side):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, side, side, generator=generator), torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        return transformer(latents, text, torch.tensor([500.0])).sample


def test_a_new_size_keeps_weights_and_results():
    before = tiny_transformer()
    after = with_native_size(before, sample_size=64)
    assert (after.config.sample_size, after.config.interpolation_scale) == (64, None)
    assert torch.equal(predict(after, 8), predict(before, 8))
    assert after.training is before.training
    for name, value in before.state_dict().items():
        assert after.state_dict()[name].data_ptr() == value.data_ptr()
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert with_native_size(before) is before


def test_a_positional_table_is_given_and_interpolated(tmp_path):
    before = tiny_transformer()
    table = with_native_size(before, sample_size=8, interpolation_scale=1)
    assert not torch.allclose(predict(table, 8), predict(before, 8))
    double = with_native_size(table, sample_size=16, interpolation_scale=2)
    small, large = (
        model.patch_embed(torch.zeros(1, 4, side, side)).unflatten(1, (side, side))
        for model, side in ((table, 8), (double, 16))
    )
    assert torch.allclose(large[:, ::2, ::2], small, atol=1e-6)  # twice the tokens between the same positions
    double.save_pretrained(tmp_path)
    loaded = type(before).from_pretrained(tmp_path)
    assert (loaded.config.sample_size, loaded.config.interpolation_scale) == (16, 2)
    assert torch.allclose(predict(loaded, 16), predict(double, 16), atol=1e-5)  # weights lie elsewhere in memory


@pytest.mark.parametrize("name", ["sample_size", "interpolation_scale"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0, got 0"):
        with_native_size(tiny_transformer(), **{name: 0})


def test_a_grown_model_begins_as_what_it_keeps():
    before = tiny_transformer()
    state = torch.get_rng_state()
    grown = grow_transformer(before, 5, kept_layers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert grown.config.num_layers == len(grown.transformer_blocks) == 5
    assert torch.equal(predict(grown, 8), predict(before, 8))
    shorter = grow_transformer(before, 3, kept_layers=1)
    cut = tiny_transformer()
    cut.load_state_dict(before.state_dict())
    del cut.transformer_blocks[1]
    assert torch.equal(predict(shorter, 8), predict(cut, 8))
    assert not torch.equal(predict(shorter, 8), predict(before, 8))


def test_new_blocks_learn_and_differ():
    grown = grow_transformer(tiny_transformer(), 4, kept_layers=2)
    _, _, third, fourth = grown.transformer_blocks
    assert not torch.equal(third.attn1.to_q.weight, fourth.attn1.to_q.weight)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    grown(latents, text, torch.tensor([500.0])).sample.square().mean().backward()
    for layer in (third.attn1.to_out[0], third.attn2.to_out[0], third.ff.conv_point):
        assert layer.weight.grad.any()
    again = grow_transformer(tiny_transformer(), 4, kept_layers=2).transformer_blocks[3]
    assert torch.equal(again.attn1.to_q.weight, fourth.attn1.to_q.weight), "of the seed"


def test_growth_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"`kept_layers` must be 1 to 2, .* got 0"):
        grow_transformer(tiny_transformer(), 4)  # all but the last two
    with pytest.raises(ValueError, match="`num_layers` must be above the 2 blocks that are kept, got 2"):
        grow_transformer(tiny_transformer(), 2, kept_layers=2)
    with pytest.raises(ValueError, match="`kept_layers` is 3, but nothing grows"):
        SanaModelOptions(pretrained="owner/name", kept_layers=3)
