"""Training and memory: gradient checkpointing, adapters, weights held in other places or types."""

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from peft.utils import get_peft_model_state_dict

from diffusers_sana.models.layers import PointwiseConv2d
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from tests.models.sana_transformers import tiny_config, tiny_inputs, tiny_model, to_dtype, upstream_twin
from tests.numerics import assert_close_fp32, relative_error


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["conv_inverted", "conv_point"]  # PEFT asks a rank divisible by the groups of conv_depth


def lora(targets, rank=2, **kwargs):
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, **kwargs)


def run(model, inputs=None, **kwargs):
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(model)), **kwargs).sample


@pytest.mark.parametrize("family", ["sana_1.5", "sprint"])
def test_gradient_checkpointing(family):
    model = tiny_model(family).train()
    inputs = tiny_inputs(model)
    inputs["controlnet_block_samples"] = tuple(torch.randn(2, 2, 48, 32))
    runs, results = [], []
    model.transformer_blocks[1].ff.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        loss = model(**inputs).sample.square().mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
        model.enable_gradient_checkpointing()
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results, strict=True))
    assert len(runs) == 1 + 2  # the second pass ran the block again for its gradients
    run(model, inputs)
    assert len(runs) == 4  # but not without gradients


@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD, ["linear_1", "linear", "proj", "proj_out"]], ids=str)
def test_lora_equals_diffusers(targets):
    model = tiny_model()
    before, inputs = run(model), tiny_inputs(model)
    twin = upstream_twin(model)
    for module in (model, twin):
        module.add_adapter(lora(targets))
    twin.load_state_dict(model.state_dict())
    assert relative_error(run(model), before) > 1e-3
    assert_close_fp32(run(model), run(twin, inputs))
    assert_close_fp32(run(model, attention_kwargs={"scale": 0.3}), run(twin, inputs, attention_kwargs={"scale": 0.3}))


def test_lora_trains_only_itself():
    model = tiny_model().train()
    model.requires_grad_(False)
    model.add_adapter(lora(ATTENTION + FEED_FORWARD))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    model(**tiny_inputs(model)).sample.square().mean().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == trainable
    assert isinstance(model.transformer_blocks[0].ff.conv_point.lora_A["default"], PointwiseConv2d)


def test_lora_files(tmp_path):
    model = tiny_model()
    model.add_adapter(lora(ATTENTION + FEED_FORWARD))
    expected = run(model)
    model.save_lora_adapter(tmp_path)
    twin = upstream_twin(tiny_model())
    for other in (tiny_model(), twin):
        other.load_state_dict(
            {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
        )
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert_close_fp32(run(other, tiny_inputs(model)), expected)
        assert (
            get_peft_model_state_dict(other, adapter_name="default_0").keys()
            == get_peft_model_state_dict(model, adapter_name="default").keys()
        )


def test_adapters_can_be_chosen_weighted_fused_and_removed():
    model = tiny_model()
    plain, outputs = run(model), {}
    for name, targets in (("a", ATTENTION), ("b", FEED_FORWARD)):
        model.add_adapter(lora(targets), adapter_name=name)
        model.set_adapter(name)
        outputs[name] = run(model)
    model.set_adapters(["a", "b"], [0.7, 0.4])
    both = run(model)
    assert min(relative_error(both, other) for other in (plain, *outputs.values())) > 1e-3
    model.set_adapters("a")
    assert_close_fp32(run(model), outputs["a"])
    model.disable_adapters()
    assert_close_fp32(run(model), plain)
    model.enable_adapters()
    model.fuse_lora(adapter_names=["a"])
    assert_close_fp32(run(model), outputs["a"])
    model.unfuse_lora()
    model.delete_adapters("a")
    model.set_adapters("b")
    assert_close_fp32(run(model), outputs["b"], 1e-4)
    model.unload_lora()
    assert_close_fp32(run(model), plain, 1e-4)


def test_exponential_moving_average(tmp_path):
    model = tiny_model()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=SanaTransformer2DModel, model_config=dict(model.config))
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, SanaTransformer2DModel)
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, model.parameters(), strict=True))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting(compute_dtype):
    model = tiny_model("sana_2k").to(compute_dtype)
    inputs = to_dtype(tiny_inputs(model), compute_dtype)
    expected = run(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in dtypes.items():
        kept = "norm" in name or "patch_embed" in name or "scale_shift_table" in name or name.startswith("proj_out")
        assert dtype == (compute_dtype if kept else torch.float8_e4m3fn), name
    sample = run(model, inputs)
    assert 1e-3 < relative_error(sample, expected) < 0.3  # 3 bits of mantissa
    context = model.encode_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    assert relative_error(run(model, {"encoder_hidden_states": None, **inputs}, text_context=context), sample) < 0.05
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes


def test_layerwise_casting_with_lora():
    model = tiny_model()
    model.add_adapter(lora(ATTENTION + FEED_FORWARD))
    expected = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert relative_error(run(model), expected) < 0.5


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(level, tmp_path):
    model = tiny_model("sprint")
    expected = run(model)
    groups = {"num_blocks_per_group": 2} if level == "block_level" else {}
    # What is on disk leaves uninitialized memory behind, which the test session fills with NaN.
    apply_group_offloading(
        model, torch.device("cpu"), offload_type=level, offload_to_disk_path=str(tmp_path), **groups
    )
    assert all(parameter.isnan().all() for parameter in model.parameters())
    for _ in range(2):
        assert_close_fp32(run(model), expected)


def test_split_over_devices(tmp_path):
    """`device_map` with half of the blocks on disk: the classes that may not be split are not."""
    model = tiny_model("sana_2k")
    expected = run(model)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    loaded = SanaTransformer2DModel.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert {str(device) for device in loaded.hf_device_map.values()} == {"cpu", "disk"}
    assert not [name for name in loaded.hf_device_map if name.count(".") > 1]
    assert_close_fp32(run(loaded), expected)


def test_sequential_offload():
    model = tiny_model()
    expected = run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert_close_fp32(run(model), expected)


def test_learns():
    """A few steps on one batch under autocast, as `examples` train: the loss falls."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(**tiny_config()).train()
    inputs = tiny_inputs(model)
    target = torch.randn_like(inputs["hidden_states"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(**inputs).sample.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
