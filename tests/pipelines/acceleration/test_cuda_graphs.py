"""What of the CUDA graphs can be shown without a GPU; the rest is in `tests/test_gpu.py`."""

import copy
import logging
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from peft import LoraConfig

import diffusers_sana
from diffusers_sana import SVDQuantConfig, quantize, set_compute_mode
from diffusers_sana.kernels.dispatch import current_kernel_mode, kernel_mode
from diffusers_sana.kernels.kept import Kept
from diffusers_sana.models.transformers.attention_sana import SanaLinearAttnProcessor
from diffusers_sana.pipelines import sampling
from diffusers_sana.pipelines.acceleration import cuda_graphs
from diffusers_sana.pipelines.acceleration.cuda_graphs import (
    AutomaticGraphs,
    CudaGraphs,
    _fingerprint,
    _flatten,
    _unflatten,
)
from diffusers_sana.pipelines.perturbed_attention import perturbed, self_attentions
from tests import tiny
from tests.pipelines.image_prompt_cases import trained_adapter


@pytest.fixture
def pipe():
    return tiny.pipeline(diffusers_sana)


def text_context(pipe):
    text = torch.randn(2, 5, tiny.TEXT_WIDTH)
    return pipe.transformer.encode_text(text, torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]))


@torch.no_grad()
def test_structures_come_apart_and_together(pipe):
    arguments = {"hidden_states": torch.randn(2, 4), "return_dict": False, "text_context": text_context(pipe)}
    tensors, shape = _flatten(arguments)
    assert len(tensors) > 2
    again, same_shape = _flatten(_unflatten(arguments, iter(tensors)))
    assert same_shape == shape
    assert all(a is b for a, b in zip(again, tensors, strict=True))
    replaced = _unflatten(arguments, iter(tensor + 1 for tensor in tensors))
    assert torch.equal(replaced["text_context"].states[0].key, arguments["text_context"].states[0].key + 1)


@torch.no_grad()
def test_every_constant_and_shape_is_told_apart(pipe):
    base = {"hidden_states": torch.randn(2, 4), "attention_kwargs": None, "text_context": text_context(pipe)}
    shapes = [
        _flatten(base | change)[1]
        for change in (
            {},
            {"attention_kwargs": {"scale": 0.5}},
            {"hidden_states": torch.randn(2, 5)},
            {"hidden_states": torch.randn(4, 2).t()},
            {"hidden_states": torch.randn(2, 4).half()},
        )
    ]
    assert len(set(shapes)) == len(shapes)
    assert _flatten(base | {"hidden_states": torch.randn(2, 4)})[1] == shapes[0]


def test_fingerprint_sees_moved_weights_and_adapters(pipe):
    model = pipe.transformer
    seen = [_fingerprint(model)]
    assert _fingerprint(model) == seen[0]
    model.proj_out.weight.data = model.proj_out.weight.data.clone()
    seen.append(_fingerprint(model))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "a")
    seen.append(_fingerprint(model))
    model.set_adapters(["a"], [0.5])
    seen.append(_fingerprint(model))
    model.fuse_lora()
    seen.append(_fingerprint(model))
    model.unfuse_lora()
    model.disable_adapters()
    seen.append(_fingerprint(model))
    assert len(set(seen)) == len(seen)


def test_fingerprint_sees_how_layers_compute(pipe):
    model = pipe.transformer
    quantize(model, SVDQuantConfig(rank=4))
    seen = [_fingerprint(model)]
    set_compute_mode(model, "w4a16")
    seen.append(_fingerprint(model))
    model.set_attention_backend("_native_math")
    seen.append(_fingerprint(model))
    layer = model.transformer_blocks[0].attn1.to_q
    kept = Kept()
    kept.get(lambda *parts: torch.zeros(1), layer.qweight, layer.wscales)  # as w4a8 keeps an int8 copy on a GPU
    assert _fingerprint(model) == seen[-1]
    layer.wscales.mul_(2)
    seen.append(_fingerprint(model))
    assert len(set(seen)) == len(seen)


def test_needs_a_cuda_device(pipe):
    pipe.enable_cuda_graphs()
    with pytest.raises(RuntimeError, match="needs the transformer on a CUDA device, got cpu"):
        pipe("a cat", num_inference_steps=1)
    pipe.disable_cuda_graphs()
    pipe("a cat", num_inference_steps=1)


def test_refuses_hooks(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    pipe.enable_cuda_graphs()
    with pytest.raises(RuntimeError, match="cannot be combined with offloading"):
        pipe("a cat", num_inference_steps=1)


def test_fingerprint_sees_how_layers_attend(pipe):
    """A graph that perturbs two rows must not be replayed for three."""
    model, attentions = pipe.transformer, self_attentions(pipe.transformer, [0])
    before = _fingerprint(model)
    with perturbed(attentions, 2):
        of_two = _fingerprint(model)
    with perturbed(attentions, 2):
        assert _fingerprint(model) == of_two
    with perturbed(attentions, 3):
        assert len({before, of_two, _fingerprint(model)}) == 3
    assert _fingerprint(model) == before


class NoGraph:
    def replay(self):
        pass


@pytest.fixture
def no_device(monkeypatch):
    """Real graphs without a GPU: they copy their inputs, and their output stays what it was at the recording."""
    for name, stand_in in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": nullcontext,
        "CUDAGraph": NoGraph,
        "graph": lambda graph, **options: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_inputs_written_into_between_calls_are_copied_again(no_device):
    """Users reuse the memory of their latents; the text, which nobody writes into, is copied once."""
    graphs = CudaGraphs(lambda latents: (latents * 2,))
    latents = torch.zeros(2)
    with torch.no_grad():
        graphs(latents=latents)
        graphs(latents=latents.fill_(3.0))
        (graph,) = graphs._graphs.values()
        assert torch.equal(graph.inputs[0], latents)
        version = graph.inputs[0]._version
        graphs(latents=latents)
        assert graph.inputs[0]._version == version


def test_graph_made_in_inference_mode_serves_outside_of_it(no_device):
    graphs = CudaGraphs(lambda latents: (latents * 2,))
    with torch.inference_mode():
        graphs(latents=torch.zeros(2))
    with torch.no_grad():
        graphs(latents=torch.ones(2))
    (graph,) = graphs._graphs.values()
    assert torch.equal(graph.inputs[0], torch.ones(2))
    assert not graph.output.is_inference()
    assert not graph.output.requires_grad


class FakeGraph:
    """What a CUDA graph does, on a CPU: it runs what was recorded on its own memory, and knows no other inputs."""

    made = 0
    wrong = False
    error = None

    def __init__(self, model, arguments, tensors, pool):
        type(self).made += 1
        self.pool = pool or object()
        self.inputs = [tensor.clone() for tensor in tensors]
        self.arguments, self.model, self.replays = _unflatten(arguments, iter(self.inputs)), model, 0
        # The strengths of adapters are constants of the recorded kernels.
        self.strengths = [
            (layer.scaling, dict(layer.scaling)) for layer in model.modules() if hasattr(layer, "scaling")
        ]
        if self.error is not None:
            raise self.error

    def replay(self, tensors):
        self.replays += 1
        for own, tensor in zip(self.inputs, tensors, strict=True):
            own.copy_(tensor)
        now = [dict(scaling) for scaling, _ in self.strengths]
        for scaling, recorded in self.strengths:
            scaling.update(recorded)
        output = self.model(**self.arguments)[0]
        for (scaling, _), strength in zip(self.strengths, now, strict=True):
            scaling.update(strength)
        return output + 1 if self.wrong else output


@pytest.fixture
def fake(monkeypatch):
    """A new class of graphs that record on a CPU, for models of any class."""
    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    graph_class = type("Fake", (FakeGraph,), {})
    monkeypatch.setattr(cuda_graphs, "_Graph", graph_class)
    yield graph_class
    cuda_graphs.release_graphs(torch.device("cpu"))  # those of pipelines that are not yet collected


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_sana"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.INFO, logger=cuda_graphs.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == cuda_graphs.__name__]


def images(pipe, steps=4, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"output_type": "pt"} | options
    return pipe("a cat", num_inference_steps=steps, generator=generator, **options).images


def test_graphs_are_the_default(pipe, fake, messages):
    """The first step of a shape runs as usual, the second is recorded and checked, the others are replayed."""
    expected = images(pipe)
    (graph,) = pipe._automatic_graphs._graphs.values()
    assert (fake.made, graph.replays) == (1, 3)
    assert torch.equal(images(pipe), expected)
    assert (fake.made, graph.replays) == (1, 7)
    images(pipe, guidance_scale=1.0)
    assert fake.made == 2
    first, second = pipe._automatic_graphs._graphs.values()
    assert first.pool is second.pool  # several shapes, the memory of one
    pipe.disable_cuda_graphs()
    assert torch.equal(images(pipe), expected)
    assert (fake.made, pipe._automatic_graphs) == (2, None)
    assert messages() == []


def test_image_prompts_are_inputs_of_a_graph(pipe, fake):
    """Another image, and another strength of it, are replayed by the same graph."""
    adapter = trained_adapter(pipe.transformer)
    pipe.register_modules(ip_adapter=adapter)
    embeds = torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(0))

    def all_images():
        found = [images(pipe, ip_adapter_image_embeds=[each]) for each in embeds]
        adapter.set_scale(0.5)
        found.append(images(pipe, ip_adapter_image_embeds=[embeds[1]]))
        adapter.set_scale(1.0)
        return found

    pipe.disable_cuda_graphs()
    expected = all_images()
    assert not any(torch.equal(first, second) for first, second in pairwise(expected))
    pipe._uses_automatic_graphs = True
    for ours, image in zip(all_images(), expected, strict=True):
        assert torch.equal(ours, image)
    assert fake.made == 1
    images(pipe)  # without an image
    assert fake.made == 2


def test_default_on_a_cpu_says_once_why_not(pipe, messages):
    for _ in range(2):
        images(pipe)
    assert messages() == ["SanaTransformer2DModel runs without CUDA graphs: it is on cpu."]


@torch.no_grad()
def test_what_prevents_graphs(pipe, fake):
    model = pipe.transformer
    assert cuda_graphs.unsupported(model) is None
    handle = model.transformer_blocks[0].register_forward_hook(lambda *args: None)
    assert "another hook" in cuda_graphs.unsupported(model)
    handle.remove()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert "step cache" in cuda_graphs.unsupported(model)
    model.disable_cache()
    processor = model.transformer_blocks[0].attn1.processor
    model.transformer_blocks[0].attn1.processor = type("Edits", (SanaLinearAttnProcessor,), {})()
    assert "the attention processor Edits" in cuda_graphs.unsupported(model)
    model.transformer_blocks[0].attn1.processor = processor
    assert "in training" in cuda_graphs.unsupported(model.train())
    assert cuda_graphs.unsupported(model.eval()) is None
    with torch.enable_grad():
        assert "in training" in cuda_graphs.unsupported(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in cuda_graphs.unsupported(model)
    assert "Linear may have code" in cuda_graphs.unsupported(torch.nn.Linear(1, 1))
    model.transformer_blocks[0].compile(backend="eager")
    assert cuda_graphs.unsupported(model) == "it is compiled"


def test_hooks_between_calls_are_seen(pipe, fake, messages):
    expected = images(pipe)
    handle = pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: output * 2)
    assert not torch.equal(images(pipe), expected)
    assert not pipe._automatic_graphs._graphs
    handle.remove()
    assert torch.equal(images(pipe), expected)
    assert fake.made == 2
    assert len(messages()) == 1


def test_callbacks_may_set_adapters(pipe, fake, messages):
    """What they change takes effect from the next step on, and the next call has graphs again."""
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, "a")

    def weaken(pipe, step, timestep, tensors):
        if step >= 2:
            pipe.transformer.set_adapters(["a"], [0.3 - 0.1 * step])
        return {}

    def all_images():
        pipe.transformer.set_adapters(["a"], [1.0])
        return images(pipe, steps=6, callback_on_step_end=weaken)

    pipe.disable_cuda_graphs()
    expected, constant = all_images(), images(pipe, steps=6)
    pipe._uses_automatic_graphs = True
    for made in (1, 2):
        assert torch.equal(all_images(), expected)
        assert fake.made == made
    assert torch.equal(images(pipe, steps=6), constant)
    assert len(messages()) == 1


def test_graph_with_other_bits_is_dropped_loudly(pipe, fake, messages):
    pipe.disable_cuda_graphs()
    expected = images(pipe)
    pipe._uses_automatic_graphs, fake.wrong = True, True
    for _ in range(2):
        assert torch.equal(images(pipe), expected)
    assert fake.made == 1
    (message,) = messages()
    assert "does not give the bits of the model itself" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("full"), "not enough memory to record"),
        (RuntimeError("operation not permitted"), "recording failed: operation not permitted"),
    ],
    ids=["memory", "recording"],
)
def test_what_cannot_be_recorded_runs_as_usual(pipe, fake, messages, error, message):
    pipe.disable_cuda_graphs()
    expected = images(pipe)
    pipe._uses_automatic_graphs, fake.error = True, error
    for _ in range(2):
        assert torch.equal(images(pipe), expected)
    assert fake.made == 1
    (logged,) = messages()
    assert message in logged


class Model(torch.nn.Module):
    """Doubles its input, or with kernels multiplies it by `factor`."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.weight = factor, torch.nn.Parameter(torch.ones(1))

    def forward(self, hidden_states, **others):
        return (hidden_states * (self.factor if current_kernel_mode() == "auto" else 2.0),)


@torch.no_grad()
def test_wrong_kernels_are_not_used(fake, messages, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "RECORDABLE", (Model,))
    x = torch.ones(2, 3)
    graphs = AutomaticGraphs(Model(3.0).eval())
    graphs.refresh()
    for _ in range(3):
        assert torch.equal(graphs(hidden_states=x), 2 * x)
    (message,) = messages()
    assert "for hidden states [2, 3] with the Triton kernels differs by 50.0% from that with" in message
    assert fake.made == 0
    with kernel_mode("triton"):  # which the user has chosen
        graphs.refresh()
        graphs(hidden_states=x)
    rounded = AutomaticGraphs(Model(2.001).eval())
    rounded.refresh()
    for _ in range(2):
        assert torch.equal(rounded(hidden_states=x), 2.001 * x)
    assert fake.made == 1
    assert len(messages()) == 1


@torch.no_grad()
def test_kernels_are_checked_once_for_all_strengths(pipe, fake, monkeypatch):
    """Another strength of a LoRA needs another graph, not another check; other layers need both."""
    model, check, checks = pipe.transformer, AutomaticGraphs._checked_kernels, []
    monkeypatch.setattr(AutomaticGraphs, "_checked_kernels", lambda *args: checks.append(1) or check(*args))
    inputs = {"hidden_states": torch.randn(2, tiny.LATENT_CHANNELS, 4, 4), "timestep": torch.tensor([500.0])}
    inputs |= {"encoder_hidden_states": None, "text_context": text_context(pipe), "return_dict": False}
    graphs = AutomaticGraphs(model)

    def made():
        expected = model(**inputs)[0]
        graphs.refresh()
        for _ in range(2):
            assert torch.equal(graphs(**inputs), expected)
        return fake.made, len(checks)

    lora = LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False)
    model.add_adapter(lora, "a")
    assert made() == (1, 1)
    for number, strength in enumerate((0.5, 0.2), start=2):
        model.set_adapters(["a"], [strength])
        assert made() == (number, 1)
    for number, strength in enumerate((0.4, 0.3), start=4):
        inputs["attention_kwargs"] = {"scale": strength}
        assert made() == (number, 1)
    inputs["attention_kwargs"] = None
    model.disable_adapters()
    assert made() == (6, 2)
    model.enable_adapters()
    assert made() == (7, 2)
    model.add_adapter(lora, "b")
    assert made() == (8, 3)


@torch.no_grad()
def test_shapes_that_change_at_every_step_are_not_recorded(fake, monkeypatch):
    """As callbacks may change them."""
    monkeypatch.setattr(cuda_graphs, "RECORDABLE", (Model,))
    graphs = AutomaticGraphs(Model(2.0).eval())
    graphs.refresh()
    for size in range(1, 9):
        assert torch.equal(graphs(hidden_states=torch.ones(size)), 2 * torch.ones(size))
    assert fake.made == 0


@torch.no_grad()
def test_bounds(fake, monkeypatch):
    """No more than `MAX_GRAPHS` shapes are kept, those that were used last; copies have none."""
    monkeypatch.setattr(cuda_graphs, "RECORDABLE", (Model,))
    graphs = AutomaticGraphs(Model(2.0).eval())
    graphs.refresh()
    for size in range(1, cuda_graphs.MAX_GRAPHS + 2):
        for _ in range(2):
            graphs(hidden_states=torch.ones(size))
        graphs(hidden_states=torch.ones(1))
    sizes = [graph.inputs[0].numel() for graph in graphs._graphs.values()]
    assert sorted(sizes) == [1, *range(3, cuda_graphs.MAX_GRAPHS + 2)]
    for size in range(2, 3 * cuda_graphs.MAX_SEEN):
        graphs(hidden_states=torch.ones(size, 2))
    assert len(graphs._seen) == cuda_graphs.MAX_SEEN
    copied = copy.deepcopy(graphs)
    assert copied._graphs == {}
    assert copied.model is not graphs.model
    graphs(hidden_states=torch.ones(1), controlnet_block_samples=lambda states: states)
    assert graphs._logged == {"an argument of the model is a function"}


@pytest.mark.parametrize("is_asked_for", [False, True], ids=["default", "asked for"])
def test_an_autoencoder_without_memory_frees_graphs(pipe, fake, messages, monkeypatch, is_asked_for):
    """It then needs no tiles. Graphs by default are not recorded again, as they would be in the way again."""
    monkeypatch.setattr(cuda_graphs, "_check", lambda model: None)
    pipe.disable_cuda_graphs()
    expected = images(pipe, steps=3)
    pipe._uses_automatic_graphs = True
    if is_asked_for:
        pipe.enable_cuda_graphs()
    decode, held = pipe.vae.decode, []

    def decode_beside_graphs(*args, **options):
        graphs = pipe._cuda_graphs or pipe._automatic_graphs
        held.append(len(graphs._graphs))
        if held[-1]:
            raise torch.OutOfMemoryError("the pool of the graphs is in the way")
        return decode(*args, **options)

    monkeypatch.setattr(pipe.vae, "decode", decode_beside_graphs)
    for _ in range(2):
        assert torch.equal(images(pipe, steps=3), expected)
    assert held == ([1, 0, 1, 0] if is_asked_for else [1, 0, 0])
    assert not cuda_graphs.release_graphs(torch.device("cpu"))
    reason = "SanaTransformer2DModel runs without CUDA graphs: something else needs their memory."
    assert messages() == ([] if is_asked_for else [reason])


def test_a_step_without_memory_frees_graphs(pipe, fake, caplog, monkeypatch):
    """Once more without the graphs of other shapes, which are not recorded again; without graphs it is an error."""
    pipe.disable_cuda_graphs()
    expected, larger = images(pipe, steps=3), images(pipe, steps=3, num_images_per_prompt=2)
    pipe._uses_automatic_graphs = True
    images(pipe, steps=3)
    assert pipe._automatic_graphs._graphs
    transformer_class = type(pipe.transformer)
    forward, held = transformer_class.forward, []

    def forward_beside_graphs(self, hidden_states, *args, **options):
        if len(hidden_states) == 4:
            held.append(len(pipe._automatic_graphs._graphs))
            if held == [1]:
                raise torch.OutOfMemoryError("the pool of the graphs is in the way")
        return forward(self, hidden_states, *args, **options)

    monkeypatch.setattr(transformer_class, "forward", forward_beside_graphs)
    assert torch.equal(images(pipe, steps=3, num_images_per_prompt=2), larger)
    assert held[:2] == [1, 0]
    assert "Out of memory in a step; trying again without the CUDA graphs. the pool of" in caplog.text
    made = fake.made
    assert torch.equal(images(pipe, steps=3), expected)
    assert fake.made == made
    pipe._automatic_graphs.release(torch.device("cpu"))

    def without_memory(self, *args, **options):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(transformer_class, "forward", without_memory)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        images(pipe, steps=3)


def test_a_step_with_a_cache_is_not_run_again(pipe, monkeypatch):
    """What ran of it may be in the cache already."""
    monkeypatch.setattr(sampling, "release_graphs", lambda device: True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    calls = []

    def without_memory(*args):
        calls.append(1)
        raise torch.OutOfMemoryError("full")

    pipe.transformer.proj_out.register_forward_pre_hook(without_memory)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        images(pipe, steps=6)
    assert len(calls) == 1


def test_graphs_on_another_device_stay(pipe, fake):
    images(pipe, steps=2)
    assert not cuda_graphs.release_graphs(torch.device("cuda:0"))
    assert pipe._automatic_graphs._graphs


def test_moving_the_pipeline_frees_graphs(pipe, fake):
    images(pipe)
    assert pipe._automatic_graphs._graphs
    pipe.to("cpu")
    assert pipe._automatic_graphs is None
