"""The benchmark of models: the case of a video at a tiny size, and the names of its files."""

import json

import pytest
import torch

from benchmarks import bench_models, harness
from tests import tiny_video


def test_a_step_of_a_video(tmp_path, monkeypatch):
    config = tiny_video.TRANSFORMER | {"caption_channels": 2304}
    case = ("video", bench_models.video_case, (64, 96, 9, "fp32", config, "cpu"), 1)
    monkeypatch.setattr(bench_models, "CASES", {"tiny": case})
    bench_models.main(["--only", "video", "--results", str(tmp_path)])
    row = json.loads(next((tmp_path / "cpu").iterdir()).read_text())["cases"]["tiny"]
    assert row["difference"] < 1e-5
    assert row["seconds"].keys() == {"diffusers", "diffusers_sana"}
    with torch.no_grad():
        assert bench_models.video_case(64, 96, 9, "fp32", config, "cpu")["diffusers"]().shape == (2, 16, 3, 8, 12)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("EPYC (2 cores, avx2)", "models"),
        ("EPYC (2 cores, avx2 avx512f avx512_bf16)", "models-avx512_bf16"),
        ("Xeon (2 cores, avx2 avx512f avx512_bf16 amx_bf16)", "models-amx_bf16"),
    ],
)
def test_results_are_named_by_the_processor(device, name, monkeypatch):
    monkeypatch.setattr(harness, "device_name", lambda device_type: device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert harness.named_by_processor("models") == name
