"""Inference changes nothing that the user owns: weights, modes, random numbers, settings; whatever comes after works.

Checkpointing libraries tell tensors apart by their storage, and tensors made under `torch.inference_mode` cannot be
trained. So each parameter must be the same tensor in the same memory after an image as before.
"""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from diffusers_sana.models.layers import hooks_of
from tests.numerics import assert_close_fp32
from tests.pipelines.test_matrix import PIPELINES, generate, make


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def modules_of(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def tensors_of(pipe):
    for part_name, part in modules_of(pipe).items():
        for kind in (part.named_parameters, part.named_buffers):
            yield from ((f"{part_name}.{name}", tensor) for name, tensor in kind(remove_duplicate=False))


def facts(tensor):
    storage = tensor.untyped_storage()
    where = tensor.data_ptr(), storage.data_ptr(), storage.nbytes(), tensor.stride(), tensor.storage_offset()
    return id(tensor), where, tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_inference(), tensor._version


def settings(pipe):
    """Of the parts: modes and attributes of each module, of each class of ours, the tokenizer and the configs."""
    found = {}
    for part_name, part in modules_of(pipe).items():
        for name, module in part.named_modules():
            cls, attributes = type(module), set(vars(module))
            if not name:  # diffusers' `maybe_free_model_hooks` puts an empty registry of hooks on whole models
                assert not hooks_of(module)
                attributes -= {"_diffusers_hook"}
            found[f"{part_name}.{name}"] = (
                module.training,
                sorted(attributes),
                sorted(module._modules),
                [id(hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()],
                type(getattr(module, "processor", None)),
                cls,
            )
            found[cls] = sorted(vars(cls))
        found[part_name] = str(part.config)
    return found


def surroundings():
    """Of the process."""
    matmul = torch.backends.cuda.matmul
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "backends": (
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32,
            matmul.allow_tf32,
            matmul.allow_bf16_reduced_precision_reduction,
            torch.backends.mkldnn.enabled,
        ),
        "hooks": (sys.excepthook, sys.displayhook),
    }


def make_any(name):
    if name != "VilaUPipeline":
        return make(name, "fp32")
    # Here, so that the other pipelines are tested with versions of transformers that VILA-U does not support.
    from diffusers_sana import VilaUPipeline
    from tests.models.vila_u.tiny import tiny_model
    from tests.models.vila_u.tiny_processor import tiny_processor

    pipe = VilaUPipeline(tiny_model(), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe):
    if type(pipe).__name__ == "VilaUPipeline":
        pipe.chat(Image.new("RGB", (8, 8), "red"), "cat?", max_new_tokens=3)
        return pipe("a cat", generator=torch.Generator().manual_seed(3), output_type="pt").images
    return generate(pipe, type(pipe).__name__)


def train(pipe):
    """One backward pass through the denoiser and the autoencoder, or through the language model."""
    if type(pipe).__name__ == "VilaUPipeline":
        inputs = pipe.processor(text=["a cat"], generation_mode="text")
        pipe.model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad for p in pipe.model.parameters() if p.requires_grad and p.grad is not None]
    torch.manual_seed(0)
    # The text features come from the pipeline, as in a trainer that keeps the encoder frozen.
    pipe.text_encoder.requires_grad_(False)
    embeds, mask = pipe.encode_prompt("a cat", num_images_per_prompt=1)[:2]
    assert not embeds.is_inference()
    latents = pipe.vae.encode(torch.rand(1, 3, 32, 32)).latent
    guidance = {"guidance": torch.full((1,), 0.45)} if pipe.transformer.config.guidance_embeds else {}
    prediction = pipe.transformer.train()(
        latents, embeds, torch.tensor([500.0]), encoder_attention_mask=mask, **guidance
    ).sample
    (pipe.vae.decode(prediction).sample.square().mean() + prediction.square().mean()).backward()
    return [p.grad for part in (pipe.transformer, pipe.vae) for p in part.parameters()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*PIPELINES, "VilaUPipeline"])
def test_inference_leaves_no_trace(name, mode):
    pipe = make_any(name)
    for role, part in modules_of(pipe).items():  # whatever modes there are, they stay
        next(m for m in part.modules() if isinstance(m, torch.nn.Linear)).train(role != "text_encoder")
    twin = copy.deepcopy(pipe)
    tensors = dict(tensors_of(pipe))
    bits = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    before = {key: facts(tensor) for key, tensor in tensors.items()}
    settings_before, surroundings_before = settings(pipe), surroundings()
    config = copy.deepcopy(dict(pipe.config))

    with MODES[mode]():
        run(pipe)
        around = surroundings()
    assert around | {"grad": None} == surroundings_before | {"grad": None}
    assert surroundings() == surroundings_before

    after = dict(tensors_of(pipe))
    assert {key: facts(tensor) for key, tensor in after.items()} == before
    assert all(torch.equal(tensor, bits[key]) for key, tensor in after.items())
    storages = [tensor.untyped_storage().data_ptr() for tensor in after.values() if tensor.numel()]
    assert len(set(storages)) == len({id(tensor) for tensor in after.values() if tensor.numel()})
    assert settings(pipe) == settings_before
    assert dict(pipe.config) == config

    grads, expected = train(pipe), train(twin)
    assert len(grads) == len(expected) > 10
    for one, other in zip(grads, expected, strict=True):
        assert one.isfinite().all()
        assert_close_fp32(one, other)


@pytest.fixture
def used():
    """A pipeline that has generated."""
    pipe = make("SanaPipeline", "fp32")
    generate(pipe, "SanaPipeline")
    return pipe


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_checkpoints_of_accelerate(used, part, tmp_path):
    model = getattr(used, part)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == expected.keys()

    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    state = accelerator.unwrap_model(prepared).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_state_dict_of_distributed_checkpoints(used, part):
    model = getattr(used, part)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value.clone() for key, value in get_model_state_dict(model).items()}
    assert state.keys() == expected.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_model_state_dict(model, state)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_weights_swapped_between_images(used):
    """As trainers do for validation with the EMA."""
    model = used.transformer
    plain = generate(used, "SanaPipeline")
    ema = EMAModel(model.parameters())
    with torch.no_grad():
        for shadow in ema.shadow_params:
            shadow.mul_(1.5)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    averaged = generate(used, "SanaPipeline")
    ema.restore(model.parameters())
    assert torch.equal(generate(used, "SanaPipeline"), plain)

    fresh = make("SanaPipeline", "fp32")
    with torch.no_grad():
        for parameter in fresh.transformer.parameters():
            parameter.mul_(1.5)
    assert torch.equal(averaged, generate(fresh, "SanaPipeline"))
    assert not torch.equal(averaged, plain)


def test_fusing_projections_is_left_out(used):
    """As in diffusers, whose Sana has no fused projections either."""
    plain, keys = generate(used, "SanaPipeline"), list(used.transformer.state_dict())
    used.transformer.fuse_qkv_projections()
    assert list(used.transformer.state_dict()) == keys
    assert torch.equal(generate(used, "SanaPipeline"), plain)


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_strengths_of_adapters_are_put_back(scale):
    """To the bit: dividing by 0.7 what was multiplied by it rounds, and by 0 it cannot be divided."""
    pipe = make("SanaPipeline", "fp32")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv_point"], init_lora_weights=False), "a")
    pipe.transformer.set_adapters(["a"], [0.3])
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=0.6, target_modules=["q_proj"]), pipe.text_encoder)
    layers = [
        module for part in modules_of(pipe).values() for module in part.modules() if isinstance(module, BaseTunerLayer)
    ]
    before = [dict(layer.scaling) for layer in layers]
    plain = generate(pipe, "SanaPipeline")
    scaled = generate(pipe, "SanaPipeline", attention_kwargs={"scale": scale})
    assert [layer.scaling for layer in layers] == before
    assert not torch.allclose(scaled, plain, atol=1e-4)
    assert torch.equal(generate(pipe, "SanaPipeline"), plain)

    def fail(*args):
        assert layers[-1].scaling != before[-1]
        raise KeyboardInterrupt

    layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, "SanaPipeline", attention_kwargs={"scale": scale})
    assert [layer.scaling for layer in layers] == before
