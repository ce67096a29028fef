"""SANA-Video 2.0's transformer; against the authors' own code it is held in `test_recorded.py`."""

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TensorParallelConfig,
    TextKVCacheConfig,
)
from peft import LoraConfig

from diffusers_sana import SanaVideo2Transformer3DModel, cli
from diffusers_sana.loaders.nvlabs.load import read_official
from diffusers_sana.models.transformers import attention_sana_video2
from diffusers_sana.models.transformers.transformer_sana_video2 import SanaVideo2DepthAttention, default_softmax_layers
from tests.models.sana_transformers import excite
from tests.numerics import assert_close_fp32, relative_error


TINY = {
    "in_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "softmax_head_dim": 16,
    "num_layers": 5,
    "softmax_layers": [1, 4],
    "attn_res_block_size": 2,
    "num_cross_attention_heads": 2,
    "caption_channels": 12,
    "mlp_ratio": 2.0,
    "sample_size": 2,
    "rope_max_seq_len": 16,
}
HEADS = {name: TINY[name] for name in ("softmax_head_dim", "attn_res_block_size", "num_cross_attention_heads")}


def tiny_model(**changes):
    torch.manual_seed(0)
    model = excite(SanaVideo2Transformer3DModel(**TINY | changes)).eval()
    for layer in model.attn_res.children():  # which begin at zero
        torch.nn.init.normal_(layer.weight)
    return model


def tiny_inputs(dtype=torch.float32, frames=3):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, frames, 2, 4, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, 12, generator=generator).to(dtype),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[1], [5]])).long(),
        "timestep": torch.tensor([700.0, 40.0]),
    }


def test_published_sizes():
    """And the config that is derived from the tensors alone."""
    with torch.device("meta"):
        model = SanaVideo2Transformer3DModel()
    tensors = model.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == 4_466_980_960
    assert len(tensors) == 795
    softmax = [index for index in range(32) if f"blocks.{index}.attn.beta_proj.bias" not in tensors]
    assert softmax == [3, 7, 11, 15, 19, 23, 27, 31]
    buffers = {"pos_embed": torch.zeros(1, 4, 8), "y_embedder.y_embedding": torch.zeros(300, 2304)}
    official = read_official(SanaVideo2Transformer3DModel, tensors | buffers)
    expected = {name: model.config[name] for name in official.config}
    assert official.config == expected | {"softmax_layers": softmax, "out_channels": 128}
    assert sorted(official.left_out) == sorted(buffers)
    assert official.names == {name: (name,) for name in tensors}


def test_published_size_of_14b():
    """From models of 4 and 8 of its 40 layers, of which every fourth has softmax attention."""
    sizes = []
    for num_layers in (4, 8):
        with torch.device("meta"):
            heads = {"num_attention_heads": 32, "num_cross_attention_heads": 32}
            tensors = SanaVideo2Transformer3DModel(num_layers=num_layers, **heads).state_dict().values()
        sizes.append((sum(tensor.numel() for tensor in tensors), len(tensors)))
    assert [four + 9 * (eight - four) for four, eight in zip(*sizes, strict=True)] == [14_246_716_224, 989]
    assert default_softmax_layers(40) == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert default_softmax_layers(9) == [3, 8]


def test_names_of_layers():
    """As the authors' checkpoints have them, written out."""
    block = [name.removeprefix("blocks.0.") for name in tiny_model().state_dict() if name.startswith("blocks.0.")]
    linear = ("beta_proj.weight", "beta_proj.bias", "o_norm.weight")
    both = ("qkv.weight", "q_norm.weight", "k_norm.weight", "output_gate.weight", "output_gate.bias")
    attn = [f"attn.{name}" for name in (*linear, *both, "proj.weight", "proj.bias")]
    cross = [f"cross_attn.{name}.{part}" for name in ("q_linear", "kv_linear", "proj") for part in ("weight", "bias")]
    cross += ["cross_attn.q_norm.weight", "cross_attn.k_norm.weight"]
    mlp = [f"mlp.{name}_proj.{part}" for name in ("gate", "up", "down") for part in ("weight", "bias")]
    assert sorted(block) == sorted([*attn, *cross, *mlp, "scale_shift_table"])


def test_depth_attention_is_a_softmax_per_token():
    torch.manual_seed(0)
    depth = SanaVideo2DepthAttention(6)
    torch.nn.init.normal_(depth.mlp_proj.weight)
    values = torch.randn(3, 2, 4, 6)
    sources = depth.add(values[1], depth.add(values[0]))
    keys = values / values.square().mean(dim=-1, keepdim=True).sqrt()
    weights = (keys @ depth.mlp_proj.weight[0]).softmax(dim=0)[..., None]
    assert_close_fp32(depth("mlp_proj", sources, values[2]), (weights * values).sum(dim=0))
    assert_close_fp32(depth("attn_proj", sources), values[:2].mean(dim=0))


@torch.no_grad()
def test_text_context_and_times():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs).sample
    assert expected.shape == inputs["hidden_states"].shape
    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    rest = {name: inputs[name] for name in ("hidden_states", "timestep")}
    assert_close_fp32(model(**rest, encoder_hidden_states=None, text_context=context).sample, expected)
    of_frames = inputs["timestep"][:, None].expand(2, 3)
    assert_close_fp32(model(**inputs | {"timestep": of_frames}).sample, expected)
    of_frames = of_frames * torch.tensor([0.0, 1.0, 1.0])
    assert relative_error(model(**inputs | {"timestep": of_frames}).sample, expected) > 1e-2
    assert torch.equal(model(**inputs | {"timestep": inputs["timestep"] + 0.75}).sample, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(dtype):
    model = tiny_model()
    expected = model(**tiny_inputs()).sample
    out = model.to(dtype)(**tiny_inputs(dtype)).sample
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < 8 * torch.finfo(dtype).eps


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = tiny_model().train(), []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**tiny_inputs()).sample.square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize(
    "config",
    [
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2),
        TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32),
    ],
    ids=lambda config: type(config).__name__,
)
@torch.no_grad()
def test_step_caches_skip_attention(config, monkeypatch):
    """Where the inputs stay the same, what is reused is right."""
    model, inputs, computed = tiny_model(), tiny_inputs(), []
    expected = model(**inputs).sample
    for name in ("SanaVideo2LinearAttnProcessor", "SanaVideo2SoftmaxAttnProcessor", "SanaVideo2TextAttnProcessor"):
        processor = getattr(attention_sana_video2, name)

        def spy(self, *args, call=processor.__call__, name=name, **kwargs):
            computed.append(name)
            return call(self, *args, **kwargs)

        monkeypatch.setattr(processor, "__call__", spy)
    model.enable_cache(config)
    for step in range(6):
        with model.cache_context("text", step_index=step, num_inference_steps=6, timestep=500.0):
            assert_close_fp32(model(**inputs).sample, expected)
    layers = {
        "SanaVideo2LinearAttnProcessor": 3,
        "SanaVideo2SoftmaxAttnProcessor": 2,
        "SanaVideo2TextAttnProcessor": 5,
    }
    is_pyramid = isinstance(config, PyramidAttentionBroadcastConfig)
    steps = {name: computed.count(name) / number for name, number in layers.items()}
    assert set(steps.values()) == ({3.0} if is_pyramid else {4.0})
    model.disable_cache()
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize(
    "config", [FirstBlockCacheConfig(), TaylorSeerCacheConfig(use_lite_mode=True), TextKVCacheConfig()], ids=str
)
def test_what_skips_blocks_is_refused(config):
    model = tiny_model()
    with pytest.raises(ValueError, match="add to no residual stream"):
        model.enable_cache(config)
    assert not model.is_cache_enabled


def test_what_cannot_be_parallel():
    with pytest.raises(ValueError, match="`config` must be a ContextParallelConfig"):
        tiny_model().enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    with pytest.raises(ValueError, match="`ulysses_degree` must divide the 2 heads of the softmax attention, got 4"):
        tiny_model().enable_parallelism(config=ContextParallelConfig(ulysses_degree=4))


@torch.no_grad()
def test_lora_and_its_scale():
    model, inputs = tiny_model(), tiny_inputs()
    plain = model(**inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv", "kv_linear", "up_proj"], init_lora_weights=False))
    assert relative_error(model(**inputs).sample, plain) > 1e-2
    assert_close_fp32(model(**inputs, attention_kwargs={"scale": 0.0}).sample, plain)


@pytest.mark.parametrize("container", ["state_dict", "state_dict_ema"])
def test_files_of_the_authors(container, tmp_path, capsys):
    """The released ones have `state_dict`, those of the 4-step preview `state_dict_ema`; `convert` makes folders."""
    model = tiny_model()
    buffers = {"pos_embed": torch.zeros(1, 4, 32), "y_embedder.y_embedding": torch.zeros(7, 12)}
    file, folder = tmp_path / "video.pth", tmp_path / "folder"
    torch.save({container: model.state_dict() | buffers}, file)
    weights = "ema" if container == "state_dict_ema" else "model"
    loaded = SanaVideo2Transformer3DModel.from_single_file(file, weights=weights, **HEADS)
    assert {name: loaded.config[name] for name in TINY} == TINY | {"sample_size": 23, "rope_max_seq_len": 1024}
    options = [word for name, value in HEADS.items() for word in ("--set", f"{name}={value}")]
    cli.main(["convert", str(file), "--out", str(folder), "--weights", weights, *options])
    assert "SanaVideo2Transformer3DModel" in capsys.readouterr().out
    with torch.no_grad():
        expected = model(**tiny_inputs()).sample
        for same in (loaded, SanaVideo2Transformer3DModel.from_pretrained(folder)):
            assert torch.equal(same(**tiny_inputs()).sample, expected)


def test_wrong_files_are_named():
    state = dict(tiny_model().state_dict())
    with pytest.raises(ValueError, match="num_cross_attention_heads"):
        SanaVideo2Transformer3DModel.from_single_file(state)
    del state["blocks.2.mlp.down_proj.bias"]
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.down_proj\.bias"):
        SanaVideo2Transformer3DModel.from_single_file(state, **HEADS)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"softmax_head_dim": 12}, ValueError, "softmax_head_dim"),
        ({"num_cross_attention_heads": 5}, ValueError, "num_cross_attention_heads"),
        ({"attention_head_dim": 5, "num_attention_heads": 32}, ValueError, "attention_head_dim"),
        ({"softmax_layers": [5]}, ValueError, "softmax_layers"),
        ({"patch_size": 1}, TypeError, "patch_size"),
        ({"relu_divisor": 1}, TypeError, "relu_divisor"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio"),
    ],
)
def test_invalid_configs(changes, error, match):
    with pytest.raises(error, match=match):
        SanaVideo2Transformer3DModel(**TINY | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_states": torch.zeros(2, 3, 3, 2, 4)}, "hidden_states"),
        ({"hidden_states": torch.zeros(2, 4, 17, 1, 1)}, "rope_max_seq_len"),
        ({"timestep": torch.zeros(4)}, "timestep"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 5)}, "encoder_hidden_states"),
        ({"attention_kwargs": {"other": 1}}, "attention_kwargs"),
    ],
)
def test_invalid_inputs(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_model()(**tiny_inputs() | changes)
