"""Every family of models through the round trip, compiled, trained under adapters, and whole pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from optimum.quanto import QLinear
from peft import LoraConfig
from transformers import QuantoConfig

import diffusers_sana
from diffusers_sana import SVDQuantConfig, set_compute_mode
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests import tiny
from tests.numerics import relative_error
from tests.quantizers import tiny_models
from tests.quantizers.tiny_models import output


# Relative errors. SANA-Video 2.0 has no residual stream, which carries most of the output past the layers elsewhere.
MOST = dict.fromkeys(tiny_models.FAMILIES, 0.1) | {"sana_video2": 0.2}


@pytest.mark.parametrize(
    ("family", "precision", "dtype"),
    [
        *((family, "int4", torch.bfloat16) for family in tiny_models.FAMILIES if family != "sana_wm"),
        ("sana_wm", "int4", torch.float32),  # diffusers turns its cameras in fp32 only, on a CPU
        *((family, "nvfp4", torch.float32) for family in tiny_models.FAMILIES),
        ("sana", "nvfp4", torch.bfloat16),
        ("sana", "int4", torch.float32),
    ],
)
def test_round_trip(family, precision, dtype, tmp_path):
    model, inputs = tiny_models.FAMILIES[family]()
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "original")

    smoothing = "search" if family == "sana" else "none"
    config = SVDQuantConfig(rank=4, precision=precision, smoothing=smoothing)
    load, folder = type(model).from_pretrained, tmp_path / "quantized"
    first = load(tmp_path / "original", quantization_config=config, dtype=dtype)
    assert {layer.precision for layer in quantized_layers(first)} >= {precision}
    result = output(first, inputs, dtype)
    assert result.dtype == dtype
    assert relative_error(result, expected) < MOST[family]

    first.save_pretrained(folder)
    again = load(folder, dtype=dtype)
    assert torch.equal(output(again, inputs, dtype), result)
    for name, parameter in first.named_parameters():
        other = again.get_parameter(name)
        assert (other.dtype, other.shape) == (parameter.dtype, parameter.shape)
    second = load(tmp_path / "original", quantization_config=config, dtype=dtype)
    assert torch.equal(output(second, inputs, dtype), result)  # same seed, same bits


def test_a_16_bit_folder_in_fp32_has_the_same_numbers(tmp_path):
    """Without a dtype it has that of the folder."""
    model, _ = tiny_models.sana()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "original")
    config = SVDQuantConfig(rank=4, precision="nvfp4", compute_mode="w4a16")
    load = type(model).from_pretrained
    quantized = load(tmp_path / "original", quantization_config=config, dtype=torch.bfloat16)
    quantized.save_pretrained(tmp_path / "quantized")
    assert load(tmp_path / "quantized").dtype == torch.bfloat16
    again = load(tmp_path / "quantized", dtype=torch.float32)
    assert again.dtype == torch.float32
    for layer, other in zip(quantized_layers(quantized), quantized_layers(again), strict=True):
        assert other.wscales.dtype in (torch.float8_e4m3fn, torch.float32)
        assert torch.equal(layer.dequantize(torch.float32), other.dequantize())


@pytest.mark.parametrize("family", ["sana", "flux"])
def test_compile_whole_graph(family, tmp_path):
    model, inputs = tiny_models.sana(num_layers=1) if family == "sana" else tiny_models.flux()
    model.save_pretrained(tmp_path)
    quantized = type(model).from_pretrained(tmp_path, quantization_config=SVDQuantConfig(rank=4))
    for mode in ("w4a16", "auto"):  # the latter is w4a8 on most processors
        set_compute_mode(quantized, mode)
        expected = output(quantized, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(quantized, fullgraph=True, backend="eager")
        assert relative_error(output(compiled, inputs), expected) < 1e-6


def test_adapters_can_be_trained(tmp_path):
    model, inputs = tiny_models.sana()
    model.save_pretrained(tmp_path)
    quantized = type(model).from_pretrained(tmp_path, quantization_config=SVDQuantConfig(rank=4))
    before = output(quantized, inputs)
    quantized.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv_point"]))
    quantized.requires_grad_(False)
    trained = {name: value for name, value in quantized.named_parameters() if "lora" in name}
    for value in trained.values():
        value.requires_grad_(True)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    target, losses = torch.zeros_like(before), []
    for _ in range(3):
        loss = (quantized(**inputs, return_dict=False)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(trained) == 20
    assert all(value.grad is not None for value in trained.values())
    assert losses[0] > losses[1] > losses[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a pipeline."""
    return tiny.write_official_folder(tmp_path_factory.mktemp("pipeline"))


class TestPipelines:
    def images(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a cat", num_inference_steps=2, height=32, width=32, use_resolution_binning=False, generator=generator,
            output_type="np",
        ).images  # fmt: skip

    @pytest.mark.parametrize(
        ("pipeline", "transformer"),
        [
            (diffusers_sana.SanaPipeline, diffusers_sana.SanaTransformer2DModel),
            (diffusers.SanaPipeline, diffusers.SanaTransformer2DModel),
        ],
    )
    def test_beside_quanto(self, folder, pipeline, transformer):
        mapping = {"transformer": SVDQuantConfig(rank=4), "text_encoder": QuantoConfig(weights="int8")}
        pipe = pipeline.from_pretrained(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
        assert type(pipe.transformer) is transformer
        assert len(list(quantized_layers(pipe.transformer))) == 21
        assert any(isinstance(module, QLinear) for module in pipe.text_encoder.modules())
        assert np.isfinite(self.images(pipe)).all()

    @pytest.mark.parametrize("pipeline", [diffusers_sana.SanaPipeline, DiffusionPipeline])
    def test_text_encoder_too(self, folder, pipeline, tmp_path):
        mapping = {"transformer": SVDQuantConfig(rank=4), "text_encoder": SVDQuantConfig(rank=2)}
        pipe = pipeline.from_pretrained(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
        assert len(list(quantized_layers(pipe.text_encoder))) == 7
        expected = self.images(pipe)
        pipe.save_pretrained(tmp_path)
        again = pipeline.from_pretrained(tmp_path)
        assert {layer.rank for layer in quantized_layers(again.text_encoder)} == {2}
        assert np.array_equal(self.images(again), expected)
        with pytest.raises(ValueError, match="Casting a quantized model"):
            again.to(dtype=torch.bfloat16)

    def test_by_name(self, folder):
        config = PipelineQuantizationConfig(
            quant_backend="svdquant",
            quant_kwargs={"rank": 4},
            components_to_quantize=["transformer", "text_encoder"],
        )
        pipe = diffusers_sana.SanaPipeline.from_pretrained(folder, quantization_config=config)
        assert {layer.rank for layer in quantized_layers(pipe.text_encoder)} == {4}
        assert {layer.rank for layer in quantized_layers(pipe.transformer)} == {4}

    def test_model_offload(self, folder):
        mapping = {"transformer": SVDQuantConfig(rank=4), "text_encoder": SVDQuantConfig(rank=2)}
        config = PipelineQuantizationConfig(quant_mapping=mapping)
        pipe = diffusers_sana.SanaPipeline.from_pretrained(folder, quantization_config=config)
        expected = self.images(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert np.array_equal(self.images(pipe), expected)
