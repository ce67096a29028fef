"""The Sana transformer against the diffusers class: configuration, keys, outputs, gradients, precision."""

import gc
import inspect

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sana.kernels.relu_linear_attention import relu_linear_attention
from diffusers_sana.models.transformers import transformer_sana
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from tests.models.sana_transformers import FAMILIES, tiny_config, tiny_inputs, tiny_model, to_dtype, upstream_twin
from tests.numerics import FP32_RELATIVE_ERROR, assert_close_fp32, assert_no_worse, relative_error


BASE_600M = {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
BASE_600M |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152}
QK_NORM = {"qk_norm": "rms_norm_across_heads"}
# The released checkpoints: configuration, parameters, tensors.
RELEASED = {
    "Sana_600M_512px": (BASE_600M | {"sample_size": 16}, 591_747_872, 548),
    "Sana_600M_1024px": (BASE_600M, 591_747_872, 548),
    "Sana_1600M_512px": ({"sample_size": 16}, 1_604_462_752, 396),
    "Sana_1600M_1024px": ({}, 1_604_462_752, 396),
    "Sana_1600M_2Kpx": ({"sample_size": 64, "interpolation_scale": 1.0}, 1_604_462_752, 396),
    "Sana_1600M_4Kpx": ({"sample_size": 128, "interpolation_scale": 2.0}, 1_604_462_752, 396),
    "SANA1.5_1.6B": (QK_NORM, 1_604_641_952, 476),
    "SANA1.5_4.8B": (QK_NORM | {"num_layers": 60}, 4_721_825_952, 1396),
    "Sana_Sprint_0.6B": (BASE_600M | QK_NORM | {"guidance_embeds": True}, 593_501_216, 664),
    "Sana_Sprint_1.6B": (QK_NORM | {"guidance_embeds": True}, 1_610_237_472, 480),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(name):
    config, num_parameters, num_tensors = RELEASED[name]
    with torch.device("meta"):
        model = SanaTransformer2DModel(**config)
        upstream = diffusers.SanaTransformer2DModel(**config)
    tensors = model.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == num_parameters
    assert len(tensors) == num_tensors
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in upstream.state_dict().items()
    }
    assert {k: v for k, v in model.config.items() if k != "_use_default_values"} == {
        k: v for k, v in upstream.config.items() if k != "_use_default_values"
    }


def test_signatures_extend_those_of_diffusers():
    ours, theirs = (
        list(inspect.signature(cls.__init__).parameters.items())
        for cls in (SanaTransformer2DModel, diffusers.SanaTransformer2DModel)
    )
    assert [(name, p.default) for name, p in ours] == [(name, p.default) for name, p in theirs]
    ours, theirs = (
        [(name, p.default) for name, p in inspect.signature(cls.forward).parameters.items()]
        for cls in (SanaTransformer2DModel, diffusers.SanaTransformer2DModel)
    )
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == [("text_context", None)]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 6), (5, 13), (1, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_diffusers(family, size):
    model = tiny_model(family)
    inputs = tiny_inputs(model, 3, *size)
    expected = upstream_twin(model)(**inputs).sample
    assert_close_fp32(model(**inputs).sample, expected)
    (sample,) = model(**inputs, return_dict=False)
    assert_close_fp32(sample, expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {"patch_size": 2, "out_channels": 6, "interpolation_scale": 0.7},
        {"out_channels": None, "norm_elementwise_affine": True, "norm_eps": 1e-2},
        {"attention_bias": True, "mlp_ratio": 1.7, "qk_norm": None},
    ],
    ids=["patches", "affine_norm", "bias"],
)
@torch.no_grad()
def test_equals_diffusers_for_unreleased_options(overrides):
    model = tiny_model(**overrides)
    inputs = tiny_inputs(model)
    assert_close_fp32(model(**inputs).sample, upstream_twin(model)(**inputs).sample)


@pytest.mark.parametrize("mask", ["none", "all", "additive", "additive_per_query", "nothing_valid"])
@torch.no_grad()
def test_text_masks_equal_diffusers(mask):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["encoder_attention_mask"] = {
        "none": None,
        "all": torch.ones(2, 7),
        "additive": torch.randn(2, 1, 7),
        "additive_per_query": torch.randn(2, 48, 7),
        "nothing_valid": torch.tensor([[0] * 7, [1, 1, 0, 0, 0, 0, 0]]),
    }[mask]
    # diffusers adds -10000 to every score of a row without valid tokens, which costs it 3 digits.
    tolerance = 1e-3 if mask == "nothing_valid" else FP32_RELATIVE_ERROR
    assert_close_fp32(model(**inputs).sample, upstream_twin(model)(**inputs).sample, tolerance)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@torch.no_grad()
def test_controlnet_residuals_equal_diffusers(count):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["controlnet_block_samples"] = tuple(torch.randn(count, 2, 48, 32))
    sample = model(**inputs).sample
    assert_close_fp32(sample, upstream_twin(model)(**inputs).sample)
    del inputs["controlnet_block_samples"]
    assert (relative_error(sample, model(**inputs).sample) > 0.01) == (count > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_diffusers(family):
    model = tiny_model(family).train()
    twin, inputs = upstream_twin(model), tiny_inputs(model)
    target = torch.randn_like(inputs["hidden_states"])
    for module in (model, twin):
        (module(**inputs).sample - target).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, parameter in model.named_parameters():
        # Some gradients are zero but for rounding: a key bias shifts all scores of a softmax alike.
        bound = 1e-4 * expected[name].norm() + 1e-6 * total
        assert (parameter.grad - expected[name]).norm() <= bound, name


@torch.no_grad()
def test_batch_rows_are_independent():
    model = tiny_model()
    inputs = tiny_inputs(model, 4)
    together = model(**inputs).sample
    for row in range(4):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).sample
        assert_close_fp32(alone, together[row : row + 1])


@pytest.mark.parametrize("family", ["sana", "sprint"])
@torch.no_grad()
def test_one_timestep_serves_the_batch(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    conditions = [name for name in ("timestep", "guidance") if name in inputs]
    inputs |= {name: inputs[name][:1] for name in conditions}
    sample = model(**inputs).sample
    inputs |= {name: inputs[name].expand(2) for name in conditions}
    assert_close_fp32(sample, model(**inputs).sample)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bf16_is_no_worse_than_diffusers(family):
    model = tiny_model(family, num_layers=4)
    inputs = tiny_inputs(model, 4, 16, 16)
    gold = upstream_twin(model)(**inputs).sample
    model, inputs = model.to(torch.bfloat16), to_dtype(inputs, torch.bfloat16)
    assert_no_worse(model(**inputs).sample, upstream_twin(model)(**inputs).sample, gold)


@torch.no_grad()
def test_fp16_saturates_after_self_attention():
    attn = tiny_model(num_layers=1).to(torch.float16).transformer_blocks[0].attn1
    attn.to_out[0].weight.mul_(20000)
    attn.to_out[0].bias.fill_(60000)
    tokens = torch.randn(1, 48, 32, dtype=torch.float16)
    assert attn.to_out[0](attn.to_v(tokens)).isinf().any()
    assert attn(tokens).max() == 65504


@torch.no_grad()
def test_half_precision_agrees_with_fp32():
    model = tiny_model()
    inputs = tiny_inputs(model)
    gold = model(**inputs).sample
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
        sample = model.to(dtype)(**to_dtype(inputs, dtype)).sample
        assert sample.dtype == dtype
        assert relative_error(sample, gold) < tolerance
        model.to(torch.float32)


@torch.no_grad()
def test_autocast_keeps_the_attention_state_in_fp32(monkeypatch):
    dtypes = set()

    def spy(query, key, value, **options):
        out = relu_linear_attention(query, key, value, **options)
        dtypes.add(value.dtype)
        torch.testing.assert_close(out, relu_linear_attention(query.float(), key.float(), value.float()).to(out.dtype))
        return out

    monkeypatch.setattr("diffusers_sana.models.transformers.attention_sana.relu_linear_attention", spy)
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = model(**tiny_inputs(model)).sample
    assert dtypes == {torch.bfloat16}
    assert relative_error(sample, model(**tiny_inputs(model)).sample) < 0.05


@torch.no_grad()
def test_nothing_is_kept_between_calls():
    model = tiny_model("sana_2k")

    def alive():
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}

    model(**tiny_inputs(model, 1, 4, 4))  # what PyTorch and the hosts keep for themselves
    inputs = tiny_inputs(model, 1, 8, 6)
    before = alive()
    model(**inputs)
    assert alive() <= before  # what other tests left behind may go


def test_position_axes_are_made_on_the_device():
    """A copy from the CPU at every step would have the GPU wait."""
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            devices.add(out.device.type)
            return out

    with Watch():
        columns, rows = transformer_sana.sincos_position_axes(6, 8, 32, 16, 2.0, torch.device("meta"))
    assert (columns.shape, rows.shape) == ((8, 16), (6, 16))
    assert devices == {"meta"}


@torch.no_grad()
def test_position_table_is_not_rounded_with_the_weights():
    """The diffusers class rounds its table when the module is cast, but not when it is loaded in half precision."""
    model = tiny_model("sana_4k").to(torch.bfloat16)
    tokens = model.patch_embed(torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16))
    model.to(torch.float32)
    columns, rows = transformer_sana.sincos_position_axes(16, 16, 32, 16, 2.0, torch.device("cpu"))
    assert columns.dtype == rows.dtype == torch.float32
    bias = model.patch_embed.proj.bias.float()
    expected = torch.cat([columns.repeat(16, 1), rows.repeat_interleave(16, 0)], dim=1) + bias
    assert torch.equal(tokens[0], expected.to(torch.bfloat16))


@torch.no_grad()
def test_feed_forward_copies_no_tokens():
    """Tokens seen as an image are channels-last, in and out of every convolution."""
    strides = []
    ff = tiny_model().transformer_blocks[0].ff
    for module in ff.children():
        module.register_forward_hook(lambda _, args, out: strides.extend([args[0], out]))
    tokens = torch.randn(2, 48, 32)
    out = ff(tokens.unflatten(1, (8, 6)).movedim(-1, 1))
    assert strides[0].data_ptr() == tokens.data_ptr()
    for image in (*strides, out):
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_construction_on_meta_needs_no_memory():
    with torch.device("meta"):
        model = SanaTransformer2DModel(**tiny_config())
    assert model(**{name: value.to("meta") for name, value in tiny_inputs(model).items()}).sample.shape == (2, 4, 8, 6)
