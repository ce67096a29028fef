"""What the models share: attention written out, against PyTorch's own."""

import torch
from torch import nn

from diffusers_sana.models.layers import eager_attention


def test_eager_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8).double()
    mask = torch.randn(5, 5).double()
    out, weights = eager_attention(nn.Identity(), query, key, value, mask, scaling=0.3)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5).double(), rtol=1e-6, atol=1e-6)


def test_eager_attention_drops_out_in_training_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 64, 8)
    identity = torch.eye(64)[None, None]  # as values they make the output the weights
    module = nn.Identity()
    out, weights = eager_attention(module.eval(), query, key, identity, None, scaling=1.0, dropout=0.5)
    torch.testing.assert_close(out[0, :, 0], weights[0, 0])
    out, weights = eager_attention(module.train(), query, key, identity, None, scaling=1.0, dropout=0.5)
    is_kept = out[0, :, 0] != 0
    assert 0.4 < is_kept.float().mean() < 0.6
    torch.testing.assert_close(out[0, :, 0][is_kept], 2 * weights[0, 0][is_kept])
