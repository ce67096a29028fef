"""`AutoencoderDC` to and from disk, to and from the diffusers class, and under its memory savers."""

import diffusers
import pytest
import torch

from diffusers_sana import AutoencoderDC
from tests.models.autoencoder_dc_cases import image, small_model, small_pair
from tests.numerics import assert_close_fp32


@pytest.mark.parametrize("name", ["sana", "in", "1.5"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}, {"safe_serialization": False}],
    ids=["plain", "sharded", "variant", "pickle"],
)
@torch.no_grad()
def test_files_are_shared_with_diffusers(tmp_path, name, arguments):
    ours, stock = small_pair(name)
    x = image()
    load = {"variant": arguments["variant"]} if "variant" in arguments else {}

    ours.save_pretrained(tmp_path / "ours", **arguments)
    stock.save_pretrained(tmp_path / "stock", **arguments)
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("ours", "stock")]
    assert names[0] == names[1]
    assert ("max_shard_size" in arguments) == any("00002" in name for name in names[0])

    theirs = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ours", **load)
    mine = AutoencoderDC.from_pretrained(tmp_path / "stock", **load)
    assert not mine.training
    assert type(mine) is AutoencoderDC
    assert torch.equal(theirs(x).sample, stock(x).sample)
    assert torch.equal(mine(x).sample, ours(x).sample)


def test_half_precision_load(tmp_path):
    small_model("in").save_pretrained(tmp_path)
    model = AutoencoderDC.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(image().bfloat16()).sample.isfinite().all()


@pytest.mark.parametrize("name", ["sana", "in"])
@torch.no_grad()
def test_from_single_file(tmp_path, name):
    ours, stock = small_pair(name)
    stock.save_config(tmp_path)
    model = AutoencoderDC.from_single_file(authors_layout(stock), config=str(tmp_path))
    assert type(model) is AutoencoderDC
    assert not model.training
    x = image()
    assert torch.equal(model(x).sample, ours(x).sample)


def authors_layout(model: diffusers.AutoencoderDC) -> dict[str, torch.Tensor]:
    """The state dict as the efficientvit repository names it."""
    names = {
        "encoder.conv_in.": "encoder.project_in.conv.",
        "encoder.conv_out.": "encoder.project_out.0.conv.",
        "decoder.conv_in.": "decoder.project_in.conv.",
        "decoder.norm_out.": "decoder.project_out.0.",
        "decoder.conv_out.": "decoder.project_out.2.conv.",
        "down_blocks": "stages",
        "up_blocks": "stages",
        ".attn.norm_out.": ".attn.proj.norm.",
        ".conv_out.norm.": ".conv_out.point_conv.norm.",
        "conv_depth": "depth_conv.conv",
        "conv_inverted": "inverted_conv.conv",
        "conv_point": "point_conv.conv",
        ".attn.to_out.": ".attn.proj.conv.",
        "to_qkv_multiscale.0.proj_in": "aggreg.0.0",
        "to_qkv_multiscale.0.proj_out": "aggreg.0.1",
        ".attn.": ".context_module.",
        ".conv_out.inv": ".local_module.inv",
        ".conv_out.dep": ".local_module.dep",
        ".conv_out.poi": ".local_module.poi",
        "conv1": "conv1.conv",
        "conv2": "conv2.conv",
    }
    state = dict(model.state_dict())
    for key in [key for key in state if key.endswith("to_q.weight")]:
        rows = [state.pop(key.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        state[key.replace("to_q.", "qkv.conv.")] = torch.cat(rows)[..., None, None]
    out = {}
    for key, value in state.items():
        is_res_block_norm = ".norm." in key and "conv_out" not in key
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        key = key.replace(".norm.", ".conv2.norm.") if is_res_block_norm else key
        out[key] = value[..., None, None] if key.endswith("proj.conv.weight") else value
    return out


@pytest.mark.parametrize("name", ["sana", "in"])
@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offloading(tmp_path, name, tiling, offload_type):
    """Weights go to disk, which leaves NaN in memory: a module that is not brought back in time shows.

    With hooks at the leaves the layers run one by one, which rounds in other places.
    """
    model = small_model(name)
    x = image(1, 96, 160)
    if tiling:
        model.enable_tiling(128, 128)
    expected = model(x).sample
    cpu = torch.device("cpu")
    model.enable_group_offload(
        cpu, cpu, offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path), low_cpu_mem_usage=True
    )
    assert model.encoder.conv_out.weight.isnan().all()
    assert_close_fp32(model.decode(model.encode(x).latent).sample, expected)


@torch.no_grad()
def test_layerwise_casting():
    ours, stock = small_pair("sana")
    x = image()
    for model in (ours, stock):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert ours.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert ours.decoder.norm_out.weight.dtype == torch.float32
    assert_close_fp32(ours(x).sample, stock(x).sample)


@torch.no_grad()
def test_model_offload_hook_runs_before_encode_and_decode():
    """Pipelines never call `forward`, so the hook must fire on the methods they call."""
    model = small_model("1.5")
    calls = []

    class Hook:
        def pre_forward(self, module):
            calls.append(type(module).__name__)

    model._hf_hook = Hook()
    model.decode(model.encode(image()).latent)
    assert calls == ["AutoencoderDC"] * 2
