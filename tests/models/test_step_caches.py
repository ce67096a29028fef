"""Step caches on our transformer: they do what they do on diffusers' own, begin anew, and say what cannot work."""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock as UpstreamBlock
from peft import LoraConfig

import diffusers_sana
from tests import tiny
from tests.models.sana_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.image_prompt_cases import trained_adapter


STEPS = 6
ATTENTION = r"transformer_blocks\.\d+\.attn[12]"
TIMES = {"spatial_attention_timestep_skip_range": (-1, 950)}
# What Sana needs to be told is filled in by ours; diffusers' class is told here. The value is for ours, then for it.
CONFIGS = {
    "first_block": (diffusers.FirstBlockCacheConfig, {"threshold": 0.35}, {}),
    "mag": (
        diffusers.MagCacheConfig,
        {"threshold": 0.2, "max_skip_steps": 1, "mag_ratios": [0.95] * STEPS, "num_inference_steps": STEPS},
        {},
    ),
    "taylor": (
        diffusers.TaylorSeerCacheConfig,
        {"taylor_factors_dtype": torch.float32},
        {"cache_identifiers": [ATTENTION]},
    ),
    "taylor_lite": (
        diffusers.TaylorSeerCacheConfig,
        {"taylor_factors_dtype": torch.float32, "use_lite_mode": True},
        {},
    ),
    "sea": (
        diffusers.SeaCacheConfig,
        {},
        {"raw_vision_callback": lambda _, args, kwargs: list(kwargs["hidden_states"][:, :, None])},
    ),
    "pyramid": (
        diffusers.PyramidAttentionBroadcastConfig,
        {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3, **TIMES},
        {"current_timestep_callback": lambda: NOW[0]},
    ),
    "faster": (
        diffusers.FasterCacheConfig,
        {"unconditional_batch_timestep_skip_range": (-1, 950), "attention_weight_callback": lambda _: 0.3, **TIMES},
        {"current_timestep_callback": lambda: NOW[0], "tensor_format": "BCHW"},
    ),
}
NOW = [0.0]
each_cache = pytest.mark.parametrize("name", CONFIGS)


def config(name):
    cls, arguments, _ = CONFIGS[name]
    return cls(**arguments)


class Upstream(CacheMixin, diffusers.SanaTransformer2DModel):
    """diffusers' class, which has no caches, with diffusers' caches."""


@each_cache
@torch.no_grad()
def test_equals_diffusers(name, monkeypatch):
    monkeypatch.setitem(
        TransformerBlockRegistry._registry,
        UpstreamBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, _cls=UpstreamBlock),
    )
    ours = tiny_model()
    theirs = Upstream.from_config(dict(ours.config)).eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = tiny_inputs(ours, 4)  # the unconditional half has a single-token prompt and another
    text = {key: inputs.pop(key) for key in ("encoder_hidden_states", "encoder_attention_mask")}
    context = ours.encode_text(**text)
    latents = inputs["hidden_states"][:2]
    inputs["hidden_states"] = latents.repeat(2, 1, 1, 1)

    cls, arguments, told = CONFIGS[name]
    plain = copy.deepcopy(ours)
    ours.enable_cache(cls(**arguments))
    theirs.enable_cache(cls(**arguments, **told))
    differences = []
    for step in range(STEPS):
        NOW[0] = 900.0 - 150 * step
        inputs["timestep"] = torch.full((4,), NOW[0])
        inputs["hidden_states"] = 0.95 * inputs["hidden_states"]
        where = {"step_index": step, "num_inference_steps": STEPS, "timestep": NOW[0], "sigma": NOW[0] / 1000}
        with ours.cache_context("text", **where), theirs.cache_context("text", **where):
            actual = ours(encoder_hidden_states=None, text_context=context, **inputs).sample
            assert_close_fp32(actual, theirs(**text, **inputs).sample, tolerance=1e-4)
        differences.append(relative_error(actual, plain(**text, **inputs).sample))
    assert differences[0] < 1e-5
    assert max(differences) > 1e-3  # something was left out


@torch.no_grad()
def test_rows_of_a_text():
    model = tiny_model()
    inputs = tiny_inputs(model, 4)
    inputs["encoder_attention_mask"][1, 1:] = 0  # the first two have a single token
    expected = model(**inputs).sample
    context = model.encode_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    for start, stop in ((0, 1), (0, 2), (1, 3), (2, 4)):
        part = {key: value[start:stop] for key, value in inputs.items()}
        actual = model(encoder_hidden_states=None, text_context=context.rows(start, stop), **part).sample
        assert_close_fp32(actual, expected[start:stop])
    assert [part.batch_size for part in context.chunk(2)] == [2, 2]


@pytest.fixture
def pipe():
    return tiny.pipeline(diffusers_sana, num_layers=3)


def generate(pipe, **arguments):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **arguments).images


def stop_at_third(pipe, step, timestep, tensors):
    if step == 2:
        raise KeyboardInterrupt
    return {}


@each_cache
def test_pipeline_begins_anew(name, pipe):
    plain = generate(pipe)
    pipe.transformer.enable_cache(config(name))
    cached = generate(pipe)
    assert torch.equal(generate(pipe), cached)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, callback_on_step_end=stop_at_third)
    assert torch.equal(generate(pipe), cached)
    assert cached.isfinite().all()
    assert relative_error(cached, plain) > 1e-6
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), plain)


@each_cache
def test_image_prompts(name, pipe):
    """With a cache the image is nearer to that of its image prompt than to that of the text alone."""
    pipe.register_modules(ip_adapter=trained_adapter(pipe.transformer))
    red, blue = ([each] for each in torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(0)))
    plain = generate(pipe, ip_adapter_image_embeds=red)
    pipe.transformer.enable_cache(config(name))
    cached = generate(pipe, ip_adapter_image_embeds=red)
    assert relative_error(cached, plain) < relative_error(cached, generate(pipe))
    assert not torch.equal(generate(pipe, ip_adapter_image_embeds=blue), cached)
    assert torch.equal(generate(pipe, ip_adapter_image_embeds=red), cached)  # of no other call
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe, ip_adapter_image_embeds=red), plain)


def unguided_from_third(pipe, step, timestep, tensors):
    pipe._guidance_scale = 4.5 if step < 2 else 1.0
    return {}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "faster"])
def test_guidance_may_end_early(name, pipe):
    plain = generate(pipe, callback_on_step_end=unguided_from_third)
    pipe.transformer.enable_cache(config(name))
    cached = generate(pipe, callback_on_step_end=unguided_from_third)
    assert cached.shape == plain.shape
    assert cached.isfinite().all()


def test_time_of_the_pipeline(pipe):
    arguments = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 800)}
    pipe.transformer.enable_cache(diffusers.PyramidAttentionBroadcastConfig(**arguments))
    expected = generate(pipe)
    pipe.transformer.disable_cache()
    seen = []

    def callback():
        seen.append(pipe.current_timestep)
        return seen[-1]

    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(**arguments, current_timestep_callback=callback)
    )
    assert torch.equal(generate(pipe), expected)
    pipe.scheduler.set_timesteps(STEPS)
    assert sorted(set(seen), reverse=True) == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", ["lora", "svdquant"])
def test_adapters_and_4_bit(kind, pipe):
    original = generate(pipe)
    if kind == "lora":
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    else:
        diffusers_sana.quantize(pipe, diffusers_sana.SVDQuantConfig(rank=4), progress=False)
    plain, runs = generate(pipe), []
    assert relative_error(plain, original) > 1e-4
    pipe.transformer.transformer_blocks[1].ff.conv_point.register_forward_hook(lambda *_: runs.append(1))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.35))
    assert relative_error(generate(pipe), plain) < 0.5
    assert 0 < len(runs) < STEPS


def test_too_few_steps(pipe):
    pipe.transformer.enable_cache(config("first_block"))
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 5 with a step cache, got 4"):
        generate(pipe, num_inference_steps=4)
    generate(pipe, num_inference_steps=5)
    pipe.transformer.disable_cache()
    generate(pipe, num_inference_steps=1)


def test_what_a_call_cannot_have(pipe):
    pipe.transformer.enable_cache(config("mag"))
    with pytest.raises(ValueError, match="must be the number of steps that are run, got 6 and 10"):
        generate(pipe, num_inference_steps=10)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(config("faster"))
    with pytest.raises(ValueError, match="`is_guidance_distilled` of the FasterCacheConfig must be True"):
        generate(pipe, guidance_scale=1.0)
    with pytest.raises(ValueError, match="`is_guidance_distilled` of the FasterCacheConfig must be True"):
        generate(pipe, callback_on_step_end=unguided_from_third)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(config("first_block"))
    pipe.transformer._parallel_config = object()
    with pytest.raises(ValueError, match="FirstBlockCacheConfig cannot be used with `enable_parallelism`"):
        generate(pipe)


@torch.no_grad()
def test_what_a_model_cannot_have():
    with pytest.raises(ValueError, match="must not be given to SANA-Sprint"):
        tiny_model("sprint").enable_cache(config("first_block"))
    model = tiny_model()
    with pytest.raises(ValueError, match="must not be a TextKVCacheConfig"):
        model.enable_cache(diffusers.TextKVCacheConfig())
    model.enable_cache(config("pyramid"))
    with pytest.raises(ValueError, match="`current_timestep_callback` must be given"):
        model(**tiny_inputs(model))
    model.disable_cache()
    assert model.is_cache_enabled is False


@each_cache
@torch.no_grad()
def test_controlnet(name):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["controlnet_block_samples"] = (torch.ones(2, 48, 32),)
    expected = model(**inputs).sample
    model.enable_cache(config(name))
    with model.cache_context("text", timestep=700.0):
        if name in ("pyramid", "taylor", "taylor_lite"):
            assert_close_fp32(model(**inputs).sample, expected)
        else:
            with pytest.raises(ValueError, match="`controlnet_block_samples` cannot be used with a step cache"):
                model(**inputs)
