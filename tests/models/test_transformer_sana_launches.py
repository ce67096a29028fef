"""What one step of the transformer asks of the host: operations that launch kernels, at Sana's 20 blocks."""

import collections

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sana import kernel_mode
from diffusers_sana.models.transformers.attention_sana import SanaTextState
from diffusers_sana.models.transformers.text_sana import SanaTextContext
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel, are_chained
from tests.models.sana_transformers import tiny_inputs, tiny_model


# Their work is the same in every implementation.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution", "an_attention"}
KERNELS = {"diffusers_sana::relu_linear_attention_forward": 2}  # of an operation, where it is not one


class Launches(TorchDispatchMode):
    """Counts what launches a kernel on a GPU: every operation but views and allocations."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not (func.is_view or name in {"aten::empty", "aten::_unsafe_view"}):
            self.counts[name] += KERNELS.get(name, 1)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch):
    """Launches of a forward pass on meta tensors, for two prompts of which the first has a single token."""
    launches = Launches()

    def attention(query, key, value, **kwargs):
        launches.counts["an_attention"] += 1  # on a GPU softmax attention is one kernel
        return query

    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, attention_dispatch.AttentionBackendName.NATIVE, attention)

    def count(blocks, **fields):
        with torch.device("meta"):
            config = {"num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32}
            config |= {"cross_attention_dim": 64, "caption_channels": 64, "num_layers": blocks}
            model = SanaTransformer2DModel(**config, **fields).eval().bfloat16()
            latents, time, one = (torch.empty(shape).bfloat16() for shape in ((2, 32, 4, 4), (2,), (1, 1, 64)))
            text = SanaTextState(*(torch.empty(1, 9, 2, 32).bfloat16() for _ in range(2)), one)
        launches.counts.clear()
        with torch.no_grad(), kernel_mode("triton"), launches:
            model(latents, None, time, text_context=SanaTextContext((text,) * blocks, None, 2))
        return launches.counts.copy()

    return count


def test_launches_of_a_step(counted):
    counts = counted(20)
    products = sum(counts[name] for name in PRODUCTS)
    assert products == 9 * 20 + 5, counts  # a block's q, k, v, out; q, attention, out; expansion, projection
    ours = {name: count for name, count in counts.items() if name.startswith("diffusers_sana::")}
    # Attention is two; gate; norm with the addition before it, twice; the middle of the Mix-FFN. The first block adds
    # nothing before its norm; at last come an addition and a norm.
    assert sum(ours.values()) == 6 * 20 + 2, ours
    assert sum(counts.values()) - products <= 200, counts
    assert sum(counts.values()) <= 350, counts


def test_modulation_costs_no_launch_per_block(counted):
    """What a block adds: 9 products, 6 kernels of ours, and the output for the prompt of one token put in front."""
    difference = counted(5) - counted(4)
    assert sum(difference.values()) == 16, difference
    difference = counted(5, qk_norm="rms_norm_across_heads") - counted(4, qk_norm="rms_norm_across_heads")
    assert sum(difference.values()) == 19, difference


@pytest.mark.parametrize("family", ["sana_1.5", "sprint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_chained_blocks_give_the_same_bits(family, dtype):
    model = tiny_model(family, norm_elementwise_affine=True).to(dtype)
    inputs = tiny_inputs(model, 3)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(dtype)
    assert are_chained(model.transformer_blocks)
    chained = model(**inputs).sample
    outputs = []
    handle = model.transformer_blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    assert not are_chained(model.transformer_blocks)
    assert torch.equal(model(**inputs).sample, chained)
    assert len(outputs) == 1  # the hook saw the output of its block
    handle.remove()
    assert are_chained(model.transformer_blocks)


def test_what_ends_the_chain():
    blocks = tiny_model().transformer_blocks
    assert not are_chained(blocks)  # gradients may be wanted
    with torch.no_grad():
        assert are_chained(blocks)
        handle = blocks[2].register_forward_pre_hook(lambda module, args: None)
        assert not are_chained(blocks)
        handle.remove()
        original = blocks[0].forward
        blocks[0].forward = lambda *args: original(*args)
        assert not are_chained(blocks)
        blocks[0].forward = original  # as diffusers' hooks leave it
        assert are_chained(blocks)
        blocks[0].compile(backend="eager")
        assert not are_chained(blocks)
