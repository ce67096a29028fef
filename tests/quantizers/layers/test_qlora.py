"""Training adapters on a quantized base: gradients as through dense weights, which are not kept in memory."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffusers_sana
from diffusers_sana.quantizers.svdquant.api import set_compute_mode
from diffusers_sana.quantizers.svdquant.layers.linear import forward_mode_products
from tests.models.sana_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32
from tests.quantizers import tiny_models
from tests.quantizers.lora_cases import dense_twin, layers_by_name, quantized, run


TARGETS = ["to_q", "to_k", "to_out.0", "conv_inverted", "conv_point", "proj_mlp"]


def sana():
    model = tiny_model(num_layers=2)
    return model, tiny_inputs(model)


@pytest.fixture(params=[sana, tiny_models.flux], ids=["sana", "flux"])
def case(request):
    """The quantized model, its dense twin, and inputs; both with the same adapters, which change the output."""
    model, inputs = request.param()
    model = quantized(model)
    twin = dense_twin(model)
    for each in (model, twin):
        torch.manual_seed(1)
        each.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=TARGETS))
        each.requires_grad_(False)
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model, twin, inputs


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_those_of_the_dense_model(case):
    model, twin, inputs = case
    expected = gradients(twin, inputs)
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    assert len(actual) > 10
    assert all("lora_" in name for name in actual)
    for name, gradient in actual.items():
        assert gradient.abs().max() > 0, name
        assert_close_fp32(gradient, expected[name], tolerance=1e-4)  # backwards through all layers


def test_gradient_checkpointing(case):
    model, _, inputs = case
    expected = gradients(model, inputs)
    model.train()
    model.enable_gradient_checkpointing()
    actual = gradients(model, inputs)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_no_weight_is_kept_for_the_backward(case):
    """The dense model keeps each of them: the same test finds them there."""
    model, twin, inputs = case
    norms = torch.stack([layer.weight.double().norm() for _, layer in layers_by_name(model)])

    def num_kept(model):
        found = 0

        def pack(tensor):
            nonlocal found
            # The norm tells a weight, transposed or not, from everything else.
            found += bool(torch.isclose(tensor.double().norm(), norms, rtol=1e-6).any())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs)
        return found

    assert num_kept(twin) > 5
    assert num_kept(model) == 0


@pytest.mark.parametrize("mode", ["w4a16", "auto"])
def test_loss_goes_down(case, mode):
    model, twin, inputs = case
    set_compute_mode(model, mode)
    target = run(twin, inputs)  # what the adapters with their first values give; to be learnt again from others
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-2)
    losses = []
    for _ in range(25):
        loss = nn.functional.mse_loss(model(**inputs).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name].view(torch.uint8), old.view(torch.uint8)) for name, old in frozen.items())


def test_what_was_trained_is_an_ordinary_lora(case, tmp_path):
    model, _, inputs = case
    trained = run(model, inputs)
    # `model.save_lora_adapter` asks for a conversion first, which diffusers refuses for every quantized model.
    diffusers_sana.SanaPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(model))
    model.unload_lora()
    assert not torch.equal(run(model, inputs), trained)
    model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), trained)


def test_forward_mode_goes_through_quantized_layers():
    """A quantized Sana's derivative along a direction is its dense twin's; afterwards all is as before."""
    model, inputs = sana()
    model = quantized(model, compute_mode="auto")  # on a CPU in int8, which has no derivative
    twin = dense_twin(model)
    generator = torch.Generator().manual_seed(0)
    latents = inputs.pop("hidden_states")
    direction = torch.randn(latents.shape, generator=generator)
    before = run(model, {"hidden_states": latents, **inputs})
    derivatives = []
    for each, products in ((model, forward_mode_products(model)), (twin, nullcontext())):
        with torch.no_grad(), products, sdpa_kernel(SDPBackend.MATH):
            predict = partial(lambda each, x: each(hidden_states=x, **inputs).sample, each)
            derivatives.append(torch.func.jvp(predict, (latents,), (direction,))[1])
    assert derivatives[1].abs().max() > 1e-3
    assert_close_fp32(derivatives[0], derivatives[1], tolerance=1e-4)
    assert torch.equal(run(model, {"hidden_states": latents, **inputs}), before)
    assert not any("matmul" in vars(module) for module in model.modules())
