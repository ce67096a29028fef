"""What of the CUDA graphs can be shown without a GPU; the rest is in `tests/test_gpu.py`."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

import diffusers_sana
from diffusers_sana.pipelines.acceleration.cuda_graphs import CudaGraphs, _fingerprint, _flatten, _unflatten
from diffusers_sana.pipelines.perturbed_attention import perturbed, self_attentions
from tests import tiny


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
    from peft import LoraConfig

    model = pipe.transformer
    seen = [_fingerprint(model)]
    assert _fingerprint(model) == seen[0]
    model.proj_out.weight.data = model.proj_out.weight.data.clone()
    seen.append(_fingerprint(model))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "a")
    seen.append(_fingerprint(model))
    model.set_adapters(["a"], [0.5])
    seen.append(_fingerprint(model))
    model.disable_adapters()
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


def test_graph_made_in_inference_mode_serves_outside_of_it(pipe, monkeypatch):
    class NoGraph:
        def replay(self):
            pass

    for name, stand_in in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": nullcontext,
        "CUDAGraph": NoGraph,
        "graph": lambda graph, **options: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs = CudaGraphs(lambda latents: (latents * 2,))
    with torch.inference_mode():
        graphs(latents=torch.zeros(2))
    with torch.no_grad():
        graphs(latents=torch.ones(2))
    (graph,) = graphs._graphs.values()
    assert torch.equal(graph.inputs[0], torch.ones(2))
    assert not graph.output.is_inference()
    assert not graph.output.requires_grad
