"""SANA-Video's transformer against the diffusers class, and what diffusers' class gets wrong."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig

from diffusers_sana import SanaVideoTransformer3DModel, SVDQuantConfig
from diffusers_sana.kernels.relu_linear_attention import relu_linear_attention
from diffusers_sana.models.transformers.transformer_sana_video import rotary_axes, rotary_tables
from tests.models.sana_transformers import to_dtype
from tests.models.sana_video_transformers import tiny_inputs, tiny_model, upstream_twin
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


# The released checkpoints, and the defaults of the class, which none has.
RELEASED = {
    "480p": ({"mlp_ratio": 3.0}, 2_056_862_144),
    "720p": (
        {"mlp_ratio": 3.0, "patch_size": (1, 1, 1), "sample_size": 22, "in_channels": 128, "out_channels": 128},
        2_057_148_928,
    ),
    "defaults": ({}, 1_905_841_344),
}


HEADS_OF_15 = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 15, "cross_attention_dim": 30}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(name):
    config, num_parameters = RELEASED[name]
    with torch.device("meta"):
        model = SanaVideoTransformer3DModel(**config)
        upstream = diffusers.SanaVideoTransformer3DModel(**config)
    tensors = model.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == num_parameters
    assert len(tensors) == 496
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in upstream.state_dict().items()
    }
    assert {k: v for k, v in model.config.items() if k != "_use_default_values"} == {
        k: v for k, v in upstream.config.items() if k != "_use_default_values"
    }


def test_signatures_extend_those_of_diffusers():
    for method, more in (("__init__", []), ("forward", [("text_context", None), ("state", None)])):
        ours, theirs = (
            [(name, p.default) for name, p in inspect.signature(getattr(cls, method)).parameters.items()]
            for cls in (SanaVideoTransformer3DModel, diffusers.SanaVideoTransformer3DModel)
        )
        assert ours == theirs + more


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"patch_size": (1, 1, 1)},
        {"patch_size": (2, 1, 2), "out_channels": None, "norm_elementwise_affine": True, "norm_eps": 1e-2},
        {"guidance_embeds": True, "attention_bias": True},
        {"qk_norm": None, "attention_head_dim": 14, "num_cross_attention_heads": 1, "cross_attention_head_dim": 28}
        | {"cross_attention_dim": 28},
    ],
    ids=["480p", "720p", "patches", "guidance", "other_heads"],
)
@pytest.mark.parametrize("size", [(4, 6, 4), (2, 2, 10)], ids=str)
@torch.no_grad()
def test_equals_diffusers(overrides, size):
    model = tiny_model(**overrides)
    inputs = tiny_inputs(model, 3, *size)
    expected = upstream_twin(model)(**inputs).sample
    assert_close_fp32(model(**inputs).sample, expected)
    (sample,) = model(**inputs, return_dict=False)
    assert_close_fp32(sample, expected)


@torch.no_grad()
def test_true_head_width_equals_diffusers():
    heads = {"num_attention_heads": 1, "attention_head_dim": 112, "num_cross_attention_heads": 1}
    model = tiny_model(num_layers=1, **heads, cross_attention_head_dim=112, cross_attention_dim=112)
    inputs = tiny_inputs(model)
    assert_close_fp32(model(**inputs).sample, upstream_twin(model)(**inputs).sample)


@torch.no_grad()
def test_times_of_frames():
    """diffusers takes one time a video or one a token; one a frame is the same as its tokens'."""
    model = tiny_model()
    inputs = tiny_inputs(model)
    times = torch.tensor([[0.0, 500.0, 600.0, 700.0], [0.0, 400.0, 300.0, 200.0]])
    inputs["timestep"] = times[:, None, :, None, None].expand(2, 1, 4, 3, 2)  # of tokens of 2 x 2
    expected = upstream_twin(model)(**inputs).sample
    assert_close_fp32(model(**inputs).sample, expected)
    inputs["timestep"] = times
    assert_close_fp32(model(**inputs).sample, expected)
    inputs["timestep"] = torch.full((2, 4), 400.0)
    of_frames = model(**inputs).sample
    inputs["timestep"] = torch.tensor([400.0])
    assert_close_fp32(model(**inputs).sample, of_frames)
    assert relative_error(of_frames, expected) > 1e-3


@torch.no_grad()
def test_time_modulation_is_computed_per_frame():
    """diffusers runs the layers of the time on every token."""
    model, rows = tiny_model(), []
    model.time_embed.linear.register_forward_hook(lambda layer, args, output: rows.append(len(output)))
    inputs = tiny_inputs(model)
    model(**inputs | {"timestep": torch.rand(2, 4)})
    assert rows == [2 * 4]


@pytest.mark.parametrize("mask", ["none", "additive"])
@torch.no_grad()
def test_text_masks_equal_diffusers(mask):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["encoder_attention_mask"] = {"none": None, "additive": torch.randn(2, 1, 7)}[mask]
    assert_close_fp32(model(**inputs).sample, upstream_twin(model)(**inputs).sample)


@torch.no_grad()
def test_controlnet_residuals_equal_diffusers():
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["controlnet_block_samples"] = tuple(torch.randn(2, 2, 24, 32))
    sample = model(**inputs).sample
    assert_close_fp32(sample, upstream_twin(model)(**inputs).sample)
    del inputs["controlnet_block_samples"]
    assert relative_error(sample, model(**inputs).sample) > 0.01


@torch.no_grad()
def test_text_context_equals_diffusers():
    model = tiny_model()
    inputs = tiny_inputs(model, 4)
    expected = upstream_twin(model)(**inputs).sample
    text = (inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    context = model.encode_text(*text)
    assert context.states[0].constant is not None  # the prompt of one token needs no attention
    assert_close_fp32(model(encoder_hidden_states=None, text_context=context, **inputs).sample, expected)


def test_gradients_equal_diffusers():
    model = tiny_model().train()
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


def test_gradient_checkpointing():
    model = tiny_model().train()
    inputs = tiny_inputs(model) | {"timestep": torch.rand(2, 4) * 1000}
    runs, results = [], []
    model.transformer_blocks[1].ff.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        loss = model(**inputs).sample.square().mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
        model.enable_gradient_checkpointing()
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results, strict=True))
    assert len(runs) == 1 + 2  # the second pass ran the block again for its gradients


@torch.no_grad()
def test_lora_equals_diffusers():
    model = tiny_model()
    inputs = tiny_inputs(model)
    plain, twin = model(**inputs).sample, upstream_twin(model)
    targets = ["to_q", "to_out.0", "conv_inverted", "conv_point", "conv_temp", "patch_embedding"]
    for module in (model, twin):
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    twin.load_state_dict(model.state_dict())
    assert relative_error(model(**inputs).sample, plain) > 1e-3
    for options in ({}, {"attention_kwargs": {"scale": 0.3}}):
        assert_close_fp32(model(**inputs, **options).sample, twin(**inputs, **options).sample)
    model.fuse_lora()
    assert_close_fp32(model(**inputs).sample, twin(**inputs).sample)


@pytest.mark.parametrize(
    "config",
    [
        diffusers.FirstBlockCacheConfig(threshold=0.35),
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 950),
            unconditional_batch_timestep_skip_range=(-1, 950),
            attention_weight_callback=lambda _: 0.3,
        ),
        diffusers.SeaCacheConfig(),
        diffusers.TaylorSeerCacheConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
@torch.no_grad()
def test_step_caches(config):
    """A step in which nothing has changed may be left out, and then gives what the last one gave."""
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    text = (inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    context, expected, runs = model.encode_text(*text), None, []
    for block in model.transformer_blocks:
        block.attn1.to_q.register_forward_hook(lambda *_: runs.append(1))
    expected = model(encoder_hidden_states=None, text_context=context, **inputs).sample
    model.enable_cache(config)
    runs.clear()
    for step in range(6):
        where = {"step_index": step, "num_inference_steps": 6, "timestep": 900.0 - step, "sigma": 0.9}
        with model.cache_context("text", **where):
            actual = model(encoder_hidden_states=None, text_context=context, **inputs).sample
        if step == 0:
            assert_close_fp32(actual, expected)
    assert actual.isfinite().all()
    assert len(runs) < 6 * 3
    model.disable_cache()
    assert_close_fp32(model(encoder_hidden_states=None, text_context=context, **inputs).sample, expected)


@torch.no_grad()
def test_compiles_whole():
    model = tiny_model(num_layers=1)
    inputs = tiny_inputs(model)
    context = model.encode_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for timestep in (inputs["timestep"], torch.rand(2, 4) * 1000):
        arguments = {"timestep": timestep, "text_context": context}
        actual = compiled(inputs["hidden_states"], None, **arguments).sample
        assert_close_fp32(actual, model(inputs["hidden_states"], None, **arguments).sample)
    torch._dynamo.reset()


@torch.no_grad()
def test_half_precision_errs_no_more_than_diffusers():
    model = tiny_model()
    reference = upstream_twin(model).double()(**to_dtype(tiny_inputs(model), torch.float64)).sample
    half, inputs = model.to(torch.bfloat16), to_dtype(tiny_inputs(model), torch.bfloat16)
    assert_no_worse(half(**inputs).sample, upstream_twin(half)(**inputs).sample, reference)


@torch.no_grad()
def test_positions_are_exact_in_half_precision():
    """A cast of diffusers' model rounds its tables."""
    model, seen = tiny_model().to(torch.bfloat16), []
    model.transformer_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[-1]))
    model(**to_dtype(tiny_inputs(model), torch.bfloat16))
    twin = diffusers.SanaVideoTransformer3DModel.from_config(dict(model.config))
    for table, expected in zip(seen[0], twin.rope(torch.empty(1, 4, 4, 6, 4)), strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, expected[0, :, 0, ::2])
    cast = twin.to(torch.bfloat16).rope(torch.empty(1, 4, 4, 6, 4))
    assert (cast[0][0, :, 0, ::2] - seen[0][0]).abs().max() > 1e-3


def test_denominator_is_finite_in_fp16():
    """At real lengths the sum of the keys times a query exceeds fp16, and diffusers' attention returns 0."""
    torch.manual_seed(0)
    model = tiny_model(num_layers=1)
    attn, tokens = model.transformer_blocks[0].attn1, 4096
    rotary = rotary_tables(torch.arange(16), 16, 16, 16)
    hidden_states = torch.randn(1, tokens, 32)
    for weight in (attn.norm_q.weight, attn.norm_k.weight):
        torch.nn.init.constant_(weight, 4.0)
    theirs = Attention(
        query_dim=32, heads=2, dim_head=16, kv_heads=2, qk_norm="rms_norm_across_heads",
        processor=diffusers.models.transformers.transformer_sana_video.SanaLinearAttnProcessor3_0(),
    )  # fmt: skip
    theirs.load_state_dict(attn.state_dict())
    tables = tuple(table.repeat_interleave(2, dim=-1)[None, :, None] for table in rotary)
    with torch.no_grad():
        expected = attn(hidden_states, rotary_emb=rotary)
        out = attn.half()(hidden_states.half(), rotary_emb=rotary)
        overflown = theirs.half()(hidden_states.half(), rotary_emb=tables)
    assert relative_error(out, expected) < 0.01
    bias = attn.to_out[0].bias
    assert ((overflown - bias).abs().amax(dim=-1) < 1e-2).float().mean() > 0.5  # nothing else is left
    assert ((expected - bias).abs().amax(dim=-1) < 1e-2).float().mean() < 0.01


def test_attention_runs_our_operation(monkeypatch):
    calls = []

    def spy(*args, **options):
        calls.append(options["rotary"])
        return relu_linear_attention(*args, **options)

    monkeypatch.setattr("diffusers_sana.models.transformers.attention_sana.relu_linear_attention", spy)
    model = tiny_model()
    with torch.no_grad():
        model(**tiny_inputs(model))
    assert len(calls) == 3
    assert all(table.shape == (4 * 3 * 2, 8) for table in calls[0])


def test_channels_of_the_axes():
    assert rotary_axes(112) == (40, 36, 36)
    assert rotary_axes(32) == (12, 10, 10)
    assert rotary_axes(128) == (44, 42, 42)


@torch.no_grad()
def test_new_model_treats_frames_as_images():
    model = SanaVideoTransformer3DModel(**{**transformer_kwargs(), "patch_size": (1, 1, 1)})
    assert all((block.ff.conv_temp.weight == 0).all() for block in model.transformer_blocks)
    frames = torch.randn(1, 3, 2, 2, 32)
    feed_forward = model.transformer_blocks[0].ff
    each = torch.cat([feed_forward(frames[:, i : i + 1]) for i in range(3)], dim=1)
    assert_close_fp32(feed_forward(frames), each)


def transformer_kwargs():
    return {name: value for name, value in tiny_model().config.items() if not name.startswith("_")}


def test_saved_folders_are_those_of_diffusers(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "ours")
    twin = diffusers.SanaVideoTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    twin.save_pretrained(tmp_path / "theirs")
    again = SanaVideoTransformer3DModel.from_pretrained(tmp_path / "theirs")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        assert_close_fp32(twin(**inputs).sample, expected)
        assert torch.equal(again(**inputs).sample, expected)


@torch.no_grad()
def test_quantized_model_reloads_bit_exactly(tmp_path):
    model = tiny_model()
    inputs = tiny_inputs(model)
    plain = model(**inputs).sample
    model.save_pretrained(tmp_path / "plain")
    config = SVDQuantConfig(rank=4)
    quantized = SanaVideoTransformer3DModel.from_pretrained(tmp_path / "plain", quantization_config=config)
    modes = quantized.config["quantization_config"].modules
    assert modes["time_embed.linear"] == modes["transformer_blocks.*.attn2.to_k"] == "w4a16"
    assert modes["transformer_blocks.*.ff.conv_inverted"] == modes["transformer_blocks.*.ff.conv_point"] == "w4a4"
    sample = quantized(**inputs).sample
    assert 1e-3 < relative_error(sample, plain) < 0.5
    quantized.save_pretrained(tmp_path / "quantized")
    again = SanaVideoTransformer3DModel.from_pretrained(tmp_path / "quantized")
    assert torch.equal(again(**inputs).sample, sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 4, 5, 4)}, "`hidden_states` must be latents.*divisible"),
        ({"hidden_states": torch.zeros(2, 4, 6, 4)}, "`hidden_states` must be latents"),
        ({"hidden_states": torch.zeros(2, 4, 33, 2, 2)}, "rope_max_seq_len"),
        ({"timestep": torch.zeros(2, 5)}, "`timestep` must have one entry"),
        ({"attention_mask": torch.ones(2, 24)}, "`attention_mask` must be None"),
        ({"guidance": torch.ones(2)}, "`guidance` must be None"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 13)}, "`encoder_hidden_states` must have shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_inputs(changes, message):
    model = tiny_model(num_layers=1)
    with pytest.raises(ValueError, match=message):
        model(**tiny_inputs(model) | changes)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"patch_size": 2}, TypeError, "`patch_size` must be three integers"),
        ({"patch_size": (1, 0, 2)}, ValueError, "`patch_size` must be at least 1"),
        ({"attention_head_dim": 15} | HEADS_OF_15, ValueError, "`attention_head_dim` must be even"),
        ({"cross_attention_dim": None}, ValueError, "`cross_attention_dim` must be given"),
        ({"rope_max_seq_len": 0}, ValueError, "`rope_max_seq_len`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_wrong_configs(fields, error, message):
    with pytest.raises(error, match=message):
        tiny_model(**fields)


def test_rotary_tables_of_some_frames():
    """Processes that share a video have some of its frames."""
    whole = rotary_tables(torch.arange(5), 3, 2, 16)
    part = rotary_tables(torch.arange(2, 5), 3, 2, 16)
    assert all(torch.equal(some, table[2 * 6 :]) for some, table in zip(part, whole, strict=True))
