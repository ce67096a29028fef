"""The residual quantizer against brute force: codes, dtypes, gradients."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sana.models.vila_u import quantizer_vila_u
from diffusers_sana.models.vila_u.quantizer_vila_u import VilaUResidualQuantizer, nearest_entry
from tests.models.vila_u.tiny import CODES, DEPTH, tiny_vision_config
from tests.numerics import assert_close_fp32


CHANNELS = 32


def quantizer(dtype=torch.float32, training=False, **overrides):
    module = VilaUResidualQuantizer(tiny_vision_config(**overrides)).train(training)
    return module.to(dtype)


def literal_codes(features, table):
    """The definition, one vector and one depth at a time, in float64."""
    codes = []
    for vector in features.double():
        for _ in range(DEPTH):
            codes.append(min(range(len(table)), key=lambda k: (vector - table[k].double()).square().sum().item()))
            vector = vector - table[codes[-1]].double()
    return torch.tensor(codes).view(len(features), DEPTH)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_codes_equal_brute_force():
    module, features = quantizer(), torch.randn(20, CHANNELS)
    assert torch.equal(module.encode(features), literal_codes(features, module.embedding.weight))


def test_residual_identity():
    module, features = quantizer(), torch.randn(2, 5, CHANNELS)
    out = module(features)
    residual = features
    for depth in range(DEPTH):
        residual = residual - module.embedding(out.codes[..., depth])
    assert out.codes.shape == (2, 5, DEPTH)
    assert_close_fp32(out.quantized + residual, features)
    assert torch.equal(out.codes, module.encode(features))
    assert torch.equal(out.quantized, module.decode(out.codes))


def test_search_in_blocks(monkeypatch):
    vectors, table = torch.randn(101, CHANNELS), torch.randn(CODES, CHANNELS)
    whole = nearest_entry(vectors, table)
    monkeypatch.setattr(quantizer_vila_u, "MAX_DISTANCES", 50 * CODES)
    with LargestTensor() as largest:
        blocks = nearest_entry(vectors, table)
    assert torch.equal(blocks, whole)
    assert largest.size == 50 * CODES
    assert nearest_entry(vectors[:0], table).shape == (0,)


def test_first_of_equal_entries():
    table = torch.randn(8, CHANNELS).repeat(3, 1)
    vectors = table[:8] + 1e-3 * torch.randn(8, CHANNELS)
    assert nearest_entry(vectors, table).tolist() == list(range(8))


def test_search_dtype():
    """bf16 distances are rounded, as officially; fp32 ones find what the fp32 model finds."""
    features = (torch.randn(400, CHANNELS) * 3).bfloat16()
    rounded, exact = quantizer(torch.bfloat16), quantizer(torch.bfloat16, quantizer_dtype="float32")
    exact.load_state_dict(rounded.state_dict())
    table = rounded.embedding.weight
    norms = features.square().sum(dim=1, keepdim=True) + table.square().sum(dim=1)
    distances = norms.float() - 2 * features.float() @ table.float().T
    assert torch.equal(rounded.encode(features)[:, 0], distances.bfloat16().argmin(dim=1))
    reference = quantizer()
    reference.load_state_dict(rounded.state_dict())
    assert torch.equal(exact.encode(features), reference.encode(features.float()))
    assert not torch.equal(exact.encode(features), rounded.encode(features))
    for module in (rounded, exact):
        out = module(features)
        assert out.quantized.dtype == torch.bfloat16
        assert out.commitment_loss.dtype == torch.float32
        assert torch.equal(out.quantized, module.decode(out.codes))


def test_fp16_distances_do_not_overflow():
    features = torch.randn(50, CHANNELS) * 300  # squares beyond 65504
    module, reference = quantizer(torch.float16), quantizer()
    reference.load_state_dict(module.state_dict())
    assert torch.equal(module.encode(features.half())[:, 0], reference.encode(features.half().float())[:, 0])


def test_autocast_does_not_round_the_search():
    module, features = quantizer(), torch.randn(300, CHANNELS)
    with torch.autocast("cpu", torch.bfloat16):
        codes = module.encode(features)
    assert torch.equal(codes, module.encode(features))


def test_gradients():
    """Straight through to z, of the commitment loss by its formula, and none to the codebook."""
    module, features = quantizer(), torch.randn(6, CHANNELS, requires_grad=True)
    out, weights = module(features), torch.randn(6, CHANNELS)
    (gradient,) = torch.autograd.grad((out.quantized * weights).sum(), features, retain_graph=True)
    assert torch.equal(gradient, weights)
    partial = module.embedding(out.codes).detach().cumsum(dim=1)
    assert_close_fp32(out.commitment_loss, (features[:, None] - partial).square().mean())
    out.commitment_loss.backward()
    assert_close_fp32(features.grad, 2 * (features[:, None] - partial).mean(dim=1).detach() / features.numel())
    assert module.embedding.weight.grad is None
