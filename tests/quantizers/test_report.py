"""The report in JSON, as a plot and as a model card."""

import json
from dataclasses import replace

import diffusers
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import diffusers_sana
from diffusers_sana import SVDQuantConfig, quantize
from diffusers_sana.quantizers.svdquant import report as module
from diffusers_sana.quantizers.svdquant.model_card import model_card, save_card
from diffusers_sana.quantizers.svdquant.report import LayerResult, QuantizationReport
from tests.quantizers import tiny_models


def layer(name, mode, exponents, error, naive_error):
    return LayerResult(
        layer=f"transformer.{name}",
        shape=(64, 128),
        mode=mode,
        precision="int4",
        exponents=exponents,
        error=error,
        naive_error=naive_error,
        bytes=5000,
        original_bytes=16384,
        computed_in="w4a8" if mode == "w4a4" else mode,
        gptq=False,
        rotated=False,
        rank=16,
    )


LAYERS = [
    layer("blocks.0.to_q", "w4a4", (0.5, 0.5), 0.1, 0.3),
    layer("blocks.1.to_q", "w4a4", (0.0, 0.0), 0.2, 0.5),
    layer("norm1.linear", "w4a16", (1.0, 0.0), 0.05, 0.1),
]


@pytest.fixture
def report():
    return QuantizationReport(SVDQuantConfig(rank=16), LAYERS, prompts=3)


def test_summary(report):
    assert str(report).splitlines() == [
        "3 layers in int4, rank 16, 3 prompts",
        "memory of their weights: 48 KiB before, 14.65 KiB after",
        "relative error of a layer's output: median 0.100, 0.300 with plain rounding",
        "largest: 0.200 in transformer.blocks.1.to_q, 0.100 in transformer.blocks.0.to_q, "
        "0.050 in transformer.norm1.linear",
    ]


def test_summary_says_where_int8_is_smaller(report):
    """64 x 128 weights of a byte, 64 scales in fp32 and 128 factors in 16 bits."""
    large = [replace(each, bytes=9000) for each in LAYERS]
    hinted = QuantizationReport(SVDQuantConfig(rank=32), large)
    assert hinted.sizes == "48 KiB before, 26.37 KiB after; precision='int8' would take 25.5 KiB"
    assert "int8" not in QuantizationReport(SVDQuantConfig(precision="int8"), large).sizes
    assert "int8" not in report.sizes


def test_size_in_int8_is_that_of_int8_layers():
    model, _ = tiny_models.sana()
    layers = quantize(model, SVDQuantConfig(precision="int8"), progress=False).layers
    assert [layer.int8_bytes for layer in layers] == [layer.bytes for layer in layers]


def test_files(report, tmp_path):
    report.save(tmp_path / "new")
    content = json.loads((tmp_path / "new" / "quantization_report.json").read_text())
    assert SVDQuantConfig.from_dict(content["config"]) == report.config
    assert content["layers"][0] == {
        "layer": "transformer.blocks.0.to_q",
        "shape": [64, 128],
        "mode": "w4a4",
        "precision": "int4",
        "exponents": [0.5, 0.5],
        "error": 0.1,
        "naive_error": 0.3,
        "bytes": 5000,
        "original_bytes": 16384,
        "computed_in": "w4a8",
        "gptq": False,
        "rotated": False,
        "rank": 16,
    }
    colors = Image.open(tmp_path / "new" / "quantization_report.png").convert("RGB").getcolors(10**6)
    assert len(colors) > 3


def test_no_plot_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    report.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quantization_report.json"]


def test_card(report, tmp_path):
    report.save(tmp_path)
    card = model_card(
        report, diffusers_sana.SanaPipeline, name="sana-int4", dtype="bfloat16", base_model="someone/Sana"
    )
    save_card(card, tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.base_model == "someone/Sana"
    assert loaded.data.base_model_relation == "quantized"
    assert loaded.data.library_name == "diffusers"
    code = loaded.text.split("```")[1].removeprefix("python\n")
    assert "import diffusers_sana" in code
    assert 'SanaPipeline.from_pretrained("sana-int4", dtype=torch.bfloat16)' in code
    compile(code, "card", "exec")
    assert "`pip install diffusers_sana`" in loaded.text
    for fact in ("| rank | 16 |", "| layers | 2 in w4a4, 1 in w4a16 |", "| calibration | 3 prompts |"):
        assert fact in loaded.text
    assert "(quantization_report.png)" in loaded.text


def test_card_says_only_what_is_known(report):
    class Own(diffusers.SanaPipeline):
        """Of a module that nobody else has."""

    card = model_card(report, Own, name="x", dtype="float16")
    assert "base_model" not in card.content
    assert "base model" not in card.content
    assert "licen" not in card.content.lower()
    assert "from diffusers import DiffusionPipeline" in card.content
