"""Devices, dtypes, offloading and copies of a quantized model, as far as a CPU can show them."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import compute_module_sizes
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

from diffusers_sana import SanaTransformer2DModel, SVDQuantConfig
from diffusers_sana._compat import release, version_of
from diffusers_sana.quantizers.svdquant.integrations.diffusers import SVDQuantQuantizer
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests.numerics import relative_error
from tests.quantizers import tiny_models
from tests.quantizers.tiny_models import output


CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def saved(request, tmp_path_factory):
    """Folders of the original and the quantized model, config, inputs, and the quantized model's output."""
    model, inputs = tiny_models.sana()
    folder, config = tmp_path_factory.mktemp("models"), SVDQuantConfig(rank=4, precision=request.param)
    model.save_pretrained(folder / "original")
    quantized = SanaTransformer2DModel.from_pretrained(folder / "original", quantization_config=config)
    quantized.save_pretrained(folder / "quantized")
    return folder / "original", folder / "quantized", config, inputs, output(quantized, inputs)


@pytest.fixture
def model(saved):
    return SanaTransformer2DModel.from_pretrained(saved[1])


def assert_twice_the_same(model, saved):
    for _ in range(2):
        assert torch.equal(output(model, saved[3]), saved[4])


def test_copy(model, saved):
    output(model, saved[3])  # with what layers keep after a forward
    twin = copy.deepcopy(model)
    next(quantized_layers(model)).proj_up.zero_()
    assert_twice_the_same(twin, saved)


def test_to_a_device(model, saved):
    assert_twice_the_same(model.to("cpu"), saved)
    assert {parameter.device.type for parameter in model.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_no_cast(model, cast):
    with pytest.raises(ValueError, match="quantized model"):
        cast(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_loading(saved, dtype):
    model = SanaTransformer2DModel.from_pretrained(saved[1], dtype=dtype)
    assert model.dtype == dtype
    result = output(model, saved[3], dtype)
    assert result.dtype == dtype
    assert relative_error(result, saved[4]) < 0.05


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload], ids=lambda offload: offload.__name__)
def test_sequential_offload(model, saved, offload, tmp_path):
    arguments = [tmp_path] if offload is disk_offload else []
    # Older versions of accelerate cannot write fp8 numbers, which scales of NVFP4 are, into its files.
    has_fp8_files = release(version_of("accelerate")) >= (1, 15)
    if offload is disk_offload and saved[2].precision == "nvfp4" and not has_fp8_files:
        with pytest.raises(TypeError, match="Float8_e4m3fn"):
            offload(model, *arguments, execution_device=CPU)
        return
    offload(model, *arguments, execution_device=CPU)
    assert all(parameter.is_meta for layer in quantized_layers(model) for parameter in layer.parameters())
    assert_twice_the_same(model, saved)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(model, saved, options):
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, num_blocks_per_group=1, **options)
    assert_twice_the_same(model, saved)


def test_group_offload_to_disk(model, saved, tmp_path):
    model.enable_group_offload(onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert list(tmp_path.iterdir())
    assert_twice_the_same(model, saved)


def test_layerwise_casting(model, saved):
    """The 16-bit rest may be kept in fp8; quantized layers stay as they are, and refuse where one insists."""
    layers = [parameter.dtype for layer in quantized_layers(model) for parameter in layer.parameters()]
    model.enable_layerwise_casting(storage_dtype=torch.float8_e5m2, compute_dtype=torch.float32)
    assert model.caption_projection.linear_1.weight.dtype == torch.float8_e5m2
    assert layers == [parameter.dtype for layer in quantized_layers(model) for parameter in layer.parameters()]
    assert 0 < relative_error(output(model, saved[3]), saved[4]) < 0.1
    with pytest.raises(ValueError, match=r"a quantized layer cannot be kept in torch.float8_e5m2"):
        apply_layerwise_casting(model.transformer_blocks, torch.float8_e5m2, torch.float32)


class TestDeviceMap:
    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
    def test_one_device(self, saved, device_map):
        original, folder, config, *_ = saved
        memory = {"max_memory": {"cpu": "1GB"}} if device_map == "auto" else {}
        loaded = SanaTransformer2DModel.from_pretrained(
            original, quantization_config=config, device_map=device_map, **memory
        )
        assert_twice_the_same(loaded, saved)
        assert_twice_the_same(SanaTransformer2DModel.from_pretrained(folder, device_map=device_map, **memory), saved)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_estimate(self, saved, dtype):
        """What "auto" divides among devices: what the model will take, on the fly and from a quantized folder."""
        _, _, config, *_ = saved
        with torch.device("meta"):
            reference = SanaTransformer2DModel(num_layers=1).to(dtype)
        ours = SVDQuantConfig(precision=config.precision)
        sizes, warm_up = {}, {}
        for pre_quantized in (False, True):
            quantizer = SVDQuantQuantizer(ours, pre_quantized=pre_quantized)
            model = copy.deepcopy(reference)
            quantizer.preprocess_model(model)
            ours = quantizer.quantization_config
            special = quantizer.get_special_dtypes_update(model, dtype)
            target = quantizer.adjust_target_dtype(dtype)
            elements = sum(parameter.numel() for parameter in model.parameters())
            warm_up[pre_quantized] = elements // quantizer.get_cuda_warm_up_factor() * 2
            sizes[pre_quantized] = compute_module_sizes(model, dtype=target, special_dtypes=special)[""]
        true = sum(parameter.nbytes for parameter in model.parameters())
        assert sizes[True] == pytest.approx(true, rel=1e-3)
        assert 0.75 * true < sizes[False] < 1.05 * true
        if dtype == torch.bfloat16:
            assert all(0.5 * true < size < 1.05 * true for size in warm_up.values())
