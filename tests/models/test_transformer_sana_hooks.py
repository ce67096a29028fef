"""What diffusers hangs on a model from outside: attention backends and processors, step caches, regional compiling."""

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

from diffusers_sana.models.transformers.attention_sana import SanaAttnProcessor, SanaLinearAttnProcessor
from tests.models import sana_transformers, sana_video_transformers
from tests.models.sana_transformers import tiny_inputs, tiny_model, upstream_twin
from tests.numerics import assert_close_fp32, relative_error


@pytest.fixture
def backend_calls(monkeypatch):
    """Counts the calls of a stand-in for a backend, of the name "_native_math", that works on any machine."""
    registry, calls = attention_dispatch._AttentionBackendRegistry, []
    name = AttentionBackendName._NATIVE_MATH
    original = registry._backends[name]

    def spy(*args, **kwargs):
        calls.append(kwargs["attn_mask"])
        return original(*args, **kwargs)

    monkeypatch.setitem(registry._backends, name, spy)
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    return calls


@torch.no_grad()
def test_set_attention_backend_is_honoured(backend_calls):
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs).sample
    assert not backend_calls
    model.set_attention_backend("_native_math")
    # It also sets the default of the process; undone here, as another model with another backend would.
    attention_dispatch._AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert_close_fp32(model(**inputs).sample, expected)
    assert len(backend_calls) == 3  # one cross-attention a block
    model.reset_attention_backend()
    model(**inputs)
    assert len(backend_calls) == 3


@torch.no_grad()
def test_attention_backend_context_is_honoured(backend_calls):
    model = tiny_model()
    inputs = tiny_inputs(model)
    context = model.encode_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    with attention_backend("_native_math"):
        model(encoder_hidden_states=None, text_context=context, **inputs)
    assert len(backend_calls) == 3
    assert set(backend_calls) == {None}  # one prompt is left after the single-token one: the mask-free path is open


def test_masks_are_boolean_as_variable_length_backends_need():
    model = tiny_model()
    inputs = tiny_inputs(model, 3)
    mask = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]).attention_mask
    normalized = attention_dispatch._normalize_attn_mask(mask, batch_size=2, seq_len_k=5)
    assert normalized.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_processors_are_listed_and_set_by_name():
    model = tiny_model()
    processors = model.attn_processors
    assert sorted(processors) == sorted(f"transformer_blocks.{i}.attn{j}.processor" for i in range(3) for j in (1, 2))
    for name, processor in processors.items():
        assert type(processor) is (SanaLinearAttnProcessor if "attn1" in name else SanaAttnProcessor)
    replaced = {
        name: SanaLinearAttnProcessor() if "attn1" in name else SanaAttnProcessor() for name in model.attn_processors
    }
    model.set_attn_processor(dict(replaced))
    assert model.attn_processors == replaced


class Counting:
    def __init__(self):
        self.count = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.count += 1
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def test_one_processor_for_all_layers():
    model = tiny_model()
    counting = Counting()
    model.set_attn_processor(counting)
    model(**tiny_inputs(model))
    assert counting.count == 6


@torch.no_grad()
def test_processors_of_diffusers_work():
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs).sample
    for block in model.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
    assert_close_fp32(model(**inputs).sample, expected)


@torch.no_grad()
def test_first_block_cache():
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs).sample
    runs = []
    model.transformer_blocks[2].ff.register_forward_hook(lambda *_: runs.append(1))

    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with model.cache_context("cond"):
        assert torch.equal(model(**inputs).sample, expected)
        assert len(runs) == 1
        near = model(**inputs | {"timestep": inputs["timestep"] - 0.5}).sample  # the first block changed little
        assert len(runs) == 1
        assert relative_error(near, expected) < 0.2
        model(**inputs | {"hidden_states": torch.randn(2, 4, 8, 6)})
        assert len(runs) == 2
    with model.cache_context("uncond"):
        model(**inputs)
        assert len(runs) == 3

    model.disable_cache()
    assert torch.equal(model(**inputs).sample, expected)
    assert len(runs) == 4


@pytest.mark.parametrize("kind", ["pyramid", "faster"])
@torch.no_grad()
def test_attention_caches_skip_layers(kind):
    model = tiny_model()
    inputs = tiny_inputs(model, 2)
    calls = {"attn1": 0, "attn2": 0}
    for block in model.transformer_blocks:
        for name in calls:
            getattr(block, name).to_q.register_forward_hook(
                lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
            )
    now = 900
    if kind == "pyramid":
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_timestep_skip_range=(100, 800),
            cross_attention_timestep_skip_range=(100, 800),
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            current_timestep_callback=lambda: now,
        )
    else:
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            current_timestep_callback=lambda: now,
            spatial_attention_timestep_skip_range=(-1, 681),
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
        )
    expected = None
    model.enable_cache(config)
    with model.cache_context("cond"):
        for now in (900, 900, 700, 600, 500, 400):  # noqa: B007  # read by the callbacks
            sample = model(**inputs).sample
            expected = sample if expected is None else expected
            assert_close_fp32(sample, expected)  # equal inputs: what is reused is what would be computed
    assert calls["attn1"] < 18
    assert (calls["attn2"] < 18) == (kind == "pyramid")


@torch.no_grad()
def test_compile_repeated_blocks():
    model = tiny_model(num_layers=2)
    inputs = tiny_inputs(model)
    expected = model(**inputs).sample
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert_close_fp32(model(**inputs).sample, expected)
    assert len(graphs) == 1  # one graph serves all blocks


@pytest.mark.parametrize("models", [sana_transformers, sana_video_transformers], ids=["image", "video"])
@torch.no_grad()
def test_hooks_on_norms_see_what_they_see_in_diffusers(models):
    model = models.tiny_model(norm_elementwise_affine=True)
    twin, inputs = models.upstream_twin(model), models.tiny_inputs(model)
    expected = model(**inputs).sample
    seen = []
    for each in (model, twin):
        block = each.transformer_blocks[1]
        for norm in (block.norm1, block.norm2, each.norm_out, each.norm_out.norm):
            norm.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    assert_close_fp32(model(**inputs).sample, expected)
    twin(**inputs)
    assert len(seen) == 8
    for ours, theirs in zip(seen[:4], seen[4:], strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert_close_fp32(mine, its)


@torch.no_grad()
def test_a_module_in_the_place_of_a_norm_is_called_as_in_diffusers():
    model = tiny_model()
    twin, inputs = upstream_twin(model), tiny_inputs(model)
    expected = model(**inputs).sample
    for each in (model, twin):
        block = each.transformer_blocks[1]
        block.norm1, block.norm2 = torch.nn.RMSNorm(32), torch.nn.LayerNorm(32, bias=False)
        block.norm2.weight.fill_(3.0)
    sample = model(**inputs).sample
    assert relative_error(sample, expected) > 0.01
    assert_close_fp32(sample, twin(**inputs).sample)


def test_gradient_hooks_on_norms_are_called():
    model, gradients = tiny_model(), []
    model.transformer_blocks[1].norm2.register_full_backward_hook(lambda module, to, of: gradients.append(of[0]))
    model(**tiny_inputs(model)).sample.sum().backward()
    assert len(gradients) == 1
    assert gradients[0].abs().max() > 0


def test_classes_named_to_diffusers_exist():
    names = {type(module).__name__ for module in tiny_model().modules()}
    assert names >= set(tiny_model()._no_split_modules)
    assert names >= set(tiny_model()._repeated_blocks)
