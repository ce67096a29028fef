"""Every kernel against its reference, on a GPU: `pytest tests` in an environment with this kernel installed."""

import diffusers_sana_kernels as ops
import pytest
import torch


CASES = {
    "gated_residual": {"residual": (2, 70, 96), "hidden_states": (2, 70, 96), "gate": (2, 1, 96)},
    "glu_depthwise_conv": {"hidden_states": (2, 9, 11, 64), "weight": (64, 1, 3, 3), "bias": (64,)},
    "modulated_layer_norm": {"hidden_states": (2, 70, 96), "scale": (2, 1, 96), "shift": (2, 1, 96)},
    "relu_linear_attention": dict.fromkeys(("query", "key", "value"), (2, 70, 3, 32)),
    "rms_norm": {"hidden_states": (2, 70, 96), "weight": (96,)},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape, device="cuda") for key, shape in CASES[name].items()}
    with ops.kernel_mode("triton"):
        out = getattr(ops, name)(**tensors)
    exact = getattr(ops, f"{name}_reference")(**{key: tensor.double() for key, tensor in tensors.items()})
    assert (out - exact).norm() < 1e-5 * exact.norm()
