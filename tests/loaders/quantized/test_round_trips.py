"""From our layers to each format and back: codes and scales bit for bit, everything else within one rounding."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana.loaders.quantized import TARGETS
from diffusers_sana.loaders.quantized.hub import WRITERS, export_quantized, load_quantized
from diffusers_sana.loaders.quantized.modelopt import measure_input_scales
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from tests.loaders.quantized import tiny_models as tiny
from tests.loaders.quantized.tiny_models import as_bytes, assert_equal_state, unpacked


ROUNDING = 2.0**-8  # of bf16
ADALN = ("norm1.linear", "norm1_context.linear", "norm.linear", "img_mod.1", "txt_mod.1")
EXACT = [
    *((family, precision, "nunchaku") for family in tiny.FAMILIES for precision in ("int4", "nvfp4")),
    *((family, precision, "cache-dit") for family in ("flux", "qwen", "sdxl") for precision in ("int4", "nvfp4")),
    *(("flux", precision, "nunchaku-lite") for precision in ("int4", "nvfp4")),
    *((family, "nvfp4", "vllm-omni") for family in tiny.FAMILIES),
    *((family, "nvfp4", "modelopt") for family in ("flux", "sana", "z_image")),
    *((family, "int4", "comfy") for family in ("qwen", "z_image", "sdxl")),
    *((family, precision, "diffusers-sana") for family in ("flux", "sana") for precision in ("int4", "nvfp4")),
]


def build(family, precision, to):
    """A model that the format can hold: adaLN, which Nunchaku has in 4 bits without a branch, is made so."""
    excluded = ()
    if family == "sana":
        excluded = () if to == "nunchaku" else ("conv_inverted", "conv_point")
    model = copy.deepcopy(tiny.quantized(family, precision, 16, excluded))
    if to == "nunchaku":
        for name, layer in tiny.layers(model).items():
            if name.endswith(ADALN):
                layer.proj_up.data.zero_()
                layer.smooth_factor.data.fill_(1)
    if to == "modelopt":
        for number, layer in enumerate(tiny.layers(model).values()):
            layer.input_scale = 0.5 + number if not layer.is_weight_only else None
    return model


@pytest.fixture
def base(tmp_path):
    def save(family):
        tiny.FAMILIES[family]().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.mark.parametrize(("family", "precision", "to"), EXACT)
def test_exact(family, precision, to, tmp_path, base):
    model = build(family, precision, to)
    options = {"model_cls": type(model), "base": base(family)}
    first = load_quantized(export_quantized(model, tmp_path / "first", to), **options)
    again, in_16_bits = unpacked(first), []
    for name, layer in unpacked(model).items():
        if name not in again:
            in_16_bits.append(name)
            continue
        other = again[name]
        assert other.weight_only == layer.weight_only
        assert torch.equal(codes(other), codes(layer)), name
        assert_same_scales(other, layer, name)
        assert_close(other.smooth, layer.smooth)
        # Ranks may have grown: by padding, or because fused layers have the branches of all.
        steps = 2 if to == "modelopt" else 1  # there D is rounded as D * smooth, and again when it is read
        assert_close(other.up.float() @ other.down.float(), layer.up.float() @ layer.down.float(), steps)
        assert (other.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            # Nunchaku stores a sum with 1, or with the shift of GELU's output.
            residual = layer.matrix() - layer.up.float() @ layer.down.float()
            shifted = layer.bias.float().abs().amax() + 0.171875 * residual.sum(1).abs().amax()
            stored = torch.ones(1) if name.endswith(ADALN) else shifted
            assert_close(other.bias, layer.bias, largest=stored)
        assert other.input_scale == layer.input_scale
    for name in in_16_bits:
        layer = tiny.layers(model)[name]
        assert layer.is_weight_only
        if to != "cache-dit":  # where the base model has these
            assert_close(first.get_submodule(name).weight, layer.dequantize(torch.float32))
    second = load_quantized(export_quantized(first, tmp_path / "second", to), **options)
    assert_equal_state(second, first)


def codes(layer):
    """Without the sign of NVFP4's zero."""
    return torch.where(layer.codes == 8, 0, layer.codes) if layer.row_scales is not None else layer.codes


def assert_same_scales(actual, expected, name):
    if expected.row_scales is None:
        assert torch.equal(actual.scales, expected.scales), name
        return
    used = expected.codes.unflatten(1, (-1, 16)).bitwise_and(7).ne(0).any(2)  # a group of zeros has any scale
    if torch.equal(actual.row_scales, expected.row_scales):
        assert torch.equal(as_bytes(actual.scales)[used], as_bytes(expected.scales)[used]), name
    products = [item.scales.float() * item.row_scales[:, None] for item in (actual, expected)]
    assert torch.equal(products[0][used], products[1][used]), name


def assert_close(actual, expected, steps=1, largest=None):
    largest = expected.float().abs().amax() if largest is None else largest
    difference = (actual.float() - expected.float()).abs().amax()
    assert difference <= steps * ROUNDING * largest


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_rotated_weights(precision, num_bits, tmp_path, base, caplog):
    """ComfyUI's: rounded once more, and read in as many bits; from then on codes and scales stay."""
    model = tiny.quantized("flux", precision)
    path = export_quantized(model, tmp_path / "comfy", "comfy-convrot", num_bits=num_bits)
    assert f"rounded once more, to {num_bits} bits; the relative error of the weights is at most 0." in caplog.text
    caplog.clear()
    first = load_quantized(path, base=base("flux"))
    assert first.dtype == torch.bfloat16
    for name, layer in tiny.layers(model).items():
        other = first.get_submodule(name)
        assert other.precision == f"int{num_bits}"
        exact = layer.dequantize(torch.float32)
        assert relative(other.dequantize(torch.float32), exact) < (0.02 if num_bits == 8 else 0.25)
    for to, options in (("comfy-convrot", {"num_bits": num_bits}), ("comfy", {"requantize": True})):
        again = load_quantized(export_quantized(first, tmp_path / to, to, **options), base=tmp_path / "base")
        assert_equal_state(again, first)
    first.save_pretrained(tmp_path / "ours")
    assert_equal_state(type(first).from_pretrained(tmp_path / "ours"), first)
    assert not any(words in caplog.text for words in ("rounded once more", "16-bit layers now"))


@pytest.mark.parametrize("to", ["comfy-convrot", "comfy", "diffusers-sana"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_int8(to, rotation, tmp_path, base, caplog):
    """Codes and scales are kept where there are neither smoothing factors nor a branch, in fused layers too."""
    model = tiny.FAMILIES["flux"]()
    quantize(model, SVDQuantConfig(precision="int8", smoothing="none", rotation=rotation), progress=False)
    options = {"model_cls": type(model), "base": base("flux")}
    first = load_quantized(export_quantized(model, tmp_path / "first", to), **options)
    assert "rounded once more" not in caplog.text
    assert_equal_state(first, model)
    attention = first.transformer_blocks[0].attn.to_q
    assert (attention.precision, attention.rotation_size) == ("int8", 64 if rotation == "hadamard" else None)
    kinds = {name: layer.is_weight_only for name, layer in tiny.layers(model).items()}
    assert {name: layer.is_weight_only for name, layer in tiny.layers(first).items()} == kinds
    second = load_quantized(export_quantized(first, tmp_path / "second", to), **options)
    assert_equal_state(second, first)
    assert load_quantized(tmp_path / "second").dtype == torch.bfloat16 if to == "diffusers-sana" else True


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_float8(family, per_row, tmp_path, caplog):
    """Bytes, scales and what else the file says stay, in fused layers too; ours has one byte per weight."""
    model = tiny.float8(tiny.FAMILIES[family](), tmp_path, per_row)
    assert {layer.precision for layer in tiny.layers(model).values()} == {"float8"}
    assert {layer.is_weight_only for layer in tiny.layers(model).values()} == {True, False}
    options = {"model_cls": type(model), "base": tmp_path / "base"}
    path = export_quantized(model, tmp_path / "first", "comfy")
    again = load_quantized(path, **options)
    assert_equal_state(again, model)
    for name, layer in tiny.layers(model).items():
        weight = layer.qweight[:, : layer.smooth_factor.shape[0]].view(torch.float8_e4m3fn).float()
        assert torch.equal(layer.dequantize(torch.float32), weight * layer.wscales[:, None])
        assert layer.qweight.itemsize == 1
        if family == "qwen":
            assert again.get_submodule(name).input_scale == layer.input_scale
    assert export_quantized(again, tmp_path / "second", "comfy").read_bytes() == path.read_bytes()
    if family == "qwen":
        original, written = load_file(tmp_path / "float8.safetensors"), load_file(path)
        assert original.keys() == written.keys()
        for key, tensor in original.items():
            assert tensor.dtype == written[key].dtype
            assert torch.equal(as_bytes(tensor), as_bytes(written[key])), key
    assert not any(words in caplog.text for words in ("rounded once more", "16-bit layers now"))


def test_float8_in_other_formats(tmp_path, caplog):
    """Refused, or rounded once more; with a branch ComfyUI has no format for it."""
    model = tiny.float8(tiny.flux(), tmp_path)
    with pytest.raises(ValueError, match=r"cannot hold \d+ layers as they are, .* needs int4"):
        export_quantized(model, tmp_path / "refused", "cache-dit")
    other = load_quantized(export_quantized(model, tmp_path / "int8", "comfy-convrot"), base=tmp_path / "base")
    assert "rounded once more, to 8 bits" in caplog.text
    layer, original = (item.transformer_blocks[0].attn.to_add_out for item in (other, model))
    assert relative(layer.dequantize(torch.float32), original.dequantize(torch.float32)) < 0.01
    layer = model.transformer_blocks[0].attn.to_add_out
    change = torch.randn(len(layer.qweight), 2) @ torch.randn(2, layer.smooth_factor.shape[0])
    layer.add_to_weight(change.to(layer.proj_up.dtype))
    with pytest.raises(ValueError, match=r"'transformer_blocks.0.attn.to_add_out': 8-bit layers there have neither"):
        export_quantized(model, tmp_path / "refused", "comfy")
    export_quantized(model, tmp_path / "rounded", "comfy", requantize=True)


def test_rotated_groups_of_several_sizes_in_our_layout(tmp_path, base):
    """ComfyUI rotates the largest group that fits a layer."""
    path = export_quantized(tiny.quantized("flux", "int8", 8), tmp_path / "comfy", "comfy-convrot")
    model = load_quantized(path, base=base("flux"))
    sizes = {name: layer.rotation_size for name, layer in tiny.layers(model).items()}
    assert {64, 256} <= set(sizes.values())
    model.save_pretrained(tmp_path / "ours")
    recorded = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert recorded["layout"] == "diffusers_sana/3"
    assert set(recorded["rotated"].values()) == set(sizes.values()) - {None}
    again = type(model).from_pretrained(tmp_path / "ours")
    assert_equal_state(again, model)
    assert {name: layer.rotation_size for name, layer in tiny.layers(again).items()} == sizes
    config = recorded | {"rotated": {name: 16 for name in recorded["rotated"]}}
    content = json.loads((tmp_path / "ours" / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"rotation' must be torch.int8 of shape \[2\]"):
        type(model).from_pretrained(tmp_path / "ours")


def test_int8_with_what_the_format_lacks(tmp_path, base, caplog):
    model = tiny.quantized("flux", "int8", 8)
    with pytest.raises(ValueError, match=r"ComfyUI cannot express .*neither smoothing factors nor a branch"):
        export_quantized(model, tmp_path / "refused", "comfy")
    for to in ("nunchaku-lite", "cache-dit", "vllm-omni", "modelopt", "nunchaku"):
        with pytest.raises(ValueError, match=r"int8|cannot hold \d+ layers as they are"):
            export_quantized(model, tmp_path / "refused", to)
    for to, options in (("comfy", {"requantize": True}), ("comfy-convrot", {}), ("cache-dit", {"requantize": True})):
        caplog.clear()
        first = load_quantized(export_quantized(model, tmp_path / to, to, **options), base=base("flux"))
        assert "rounded once more" in caplog.text
        for name, layer in tiny.layers(first).items():
            if not layer.is_weight_only:
                error = relative(layer.dequantize(torch.float32), model.get_submodule(name).dequantize(torch.float32))
                assert error < (0.15 if to == "cache-dit" else 0.015)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_cache_dit_without_a_branch(precision, tmp_path, base):
    """Its header says rank 0, and its projections are empty."""
    model = tiny.FAMILIES["flux"]()
    quantize(model, SVDQuantConfig(precision=precision, rank=0), progress=False)
    again = load_quantized(export_quantized(model, tmp_path, "cache-dit"), base=base("flux"))
    layers = {name: layer for name, layer in tiny.layers(model).items() if not layer.is_weight_only}
    for name, layer in layers.items():
        assert again.get_submodule(name).rank == 0
        assert torch.equal(again.get_submodule(name).dequantize(torch.float32), layer.dequantize(torch.float32))


def relative(actual, expected):
    return (actual - expected).norm() / expected.norm()


def test_layers_in_4_and_8_bits(tmp_path, base):
    """One file with both kinds, for ComfyUI."""
    model = tiny.FAMILIES["qwen"]()
    modules = {"transformer_blocks.*.img_mlp.*": "w8a8", "transformer_blocks.*.attn.*": "w4a4"}
    quantize(model, SVDQuantConfig(rank=8, smoothing="none", refinements=0, modules=modules), progress=False)
    layer = model.transformer_blocks[0].img_mlp.net[0].proj
    path = export_quantized(model, tmp_path / "comfy", "comfy", requantize=True)
    again = load_quantized(path, model_cls=type(model), base=base("qwen"))
    assert {item.precision for item in tiny.layers(again).values()} == {"int4", "int8"}
    other = again.transformer_blocks[0].img_mlp.net[0].proj
    assert relative(other.dequantize(torch.float32), layer.dequantize(torch.float32)) < 0.015


@pytest.mark.parametrize("to", ["nunchaku", "nunchaku-lite", "cache-dit", "vllm-omni", "comfy"])
def test_the_other_precision_is_rounded_once_more(to, tmp_path, base, caplog):
    """Only if that is asked for; the error is stated."""
    other = "int4" if to == "vllm-omni" else "nvfp4"
    model = tiny.quantized("flux", other)
    if to in ("vllm-omni", "comfy"):
        with pytest.raises(ValueError, match=r"cannot hold 1\d layers as they are, such as 'transformer_blocks.0"):
            export_quantized(model, tmp_path / "refused", to)
        assert not (tmp_path / "refused").exists()
        path = export_quantized(model, tmp_path / "done", to, requantize=True)
        assert "layers were rounded once more" in caplog.text
        first = load_quantized(path, base=base("flux"))
        for name, layer in tiny.layers(model).items():
            exact = layer.dequantize(torch.float32)
            assert (first.get_submodule(name).weight.float() - exact).norm() / exact.norm() < 0.15, name
    else:
        export_quantized(model, tmp_path / "done", to, requantize=True)


def test_rotated_layers(tmp_path, base, caplog):
    """With a branch, in our own layout only: refused by name, or rounded once more. `comfy-convrot` takes any."""
    model = tiny.FAMILIES["qwen"]()
    quantize(model, SVDQuantConfig(rank=8, smoothing="none", refinements=0, rotation="hadamard"), progress=False)
    name = "transformer_blocks.0.attn.to_q"
    assert model.get_submodule(name).rotation is not None
    for to in ("nunchaku", "cache-dit", "comfy", "vllm-omni", "modelopt", "nunchaku-lite"):
        with pytest.raises(
            ValueError, match=r"'transformer_blocks.0.* is rotated, which the format cannot express for this layer"
        ):
            export_quantized(model, tmp_path / "refused", to)
    assert not (tmp_path / "refused").exists()
    for to, options in (("cache-dit", {"requantize": True}), ("comfy-convrot", {})):
        caplog.clear()
        first = load_quantized(export_quantized(model, tmp_path / to, to, **options), base=base("qwen"))
        assert "rounded once more" in caplog.text
        expected = model.get_submodule(name).dequantize(torch.float32)
        actual = first.get_submodule(name).weight.float()
        assert (actual - expected).norm() / expected.norm() < 0.15


def test_input_scales(tmp_path):
    """Measured, saved with our own layout, and written for TensorRT-LLM."""
    model = tiny.FAMILIES["sana"]()

    quantize(model, SVDQuantConfig(precision="nvfp4", rank=8, smoothing="none"), progress=False)
    with pytest.raises(ValueError, match=r"'transformer_blocks.0.attn1.to_q': it needs a static scale of its input"):
        export_quantized(model, tmp_path / "refused", "modelopt")
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=tiny.DTYPE),
        "encoder_hidden_states": torch.randn(2, 5, 16, dtype=tiny.DTYPE),
        "timestep": torch.ones(2, dtype=tiny.DTYPE),
    }
    layer, seen = model.transformer_blocks[0].attn1.to_q, []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with measure_input_scales(model):
        model(**inputs)
        model(**inputs | {"timestep": torch.zeros(2, dtype=tiny.DTYPE)})
    handle.remove()
    expected = max((x.float() / layer.smooth_factor.float()).abs().amax().item() for x in seen) / (6 * 448)
    assert layer.input_scale == expected
    model(**{name: 100 * value for name, value in inputs.items()})
    assert layer.input_scale == expected  # nothing is measured after the block

    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    assert again.transformer_blocks[0].attn1.to_q.input_scale == expected
    folder = export_quantized(again, tmp_path / "modelopt", "modelopt")
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert written["transformer_blocks.0.attn1.to_q.input_scale"].item() == pytest.approx(expected)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["lora_rank"] == 32  # a multiple for the fused kernel
    assert "proj_out" in config["ignore"]
    with (
        pytest.raises(ValueError, match="has no linear layers quantized by SVDQuant"),
        measure_input_scales(tiny.sana()),
    ):
        pass


def test_refusals(tmp_path):
    assert (*WRITERS, "diffusers-sana") == TARGETS
    model = tiny.quantized("flux")
    with pytest.raises(ValueError, match=r"`to` must be one of .*, got 'gguf'"):
        export_quantized(model, tmp_path / "out", "gguf")
    for to in TARGETS[:-1]:
        with pytest.raises(ValueError, match=r"must have layers quantized by SVDQuant, but FluxTransf.* has none"):
            export_quantized(tiny.flux(), tmp_path / "out", to)
    cases = [
        (tiny.quantized("flux"), "nunchaku", r"'transformer_blocks.0.norm1.linear': it is 4 bits without branch and"),
        (tiny.quantized("flux", "int4", 16, ("proj_mlp",)), "nunchaku", r"not quantized, such as '.*proj_mlp'"),
        (tiny.quantized("sana"), "nunchaku-lite", "linear layers only"),
        (tiny.quantized("flux"), "modelopt", "needs nvfp4"),
    ]
    for case, to, message in cases:
        with pytest.raises(ValueError, match=message):
            export_quantized(case, tmp_path / "out", to)
    with pytest.raises(ValueError, match=r"`num_bits` must be one of \[4, 8\], got 6"):
        export_quantized(model, tmp_path / "out", "comfy-convrot", num_bits=6)
    assert not (tmp_path / "out").exists()
