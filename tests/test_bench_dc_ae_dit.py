"""The benchmark of compression and diffusion transformers runs, at a small image size, and compares what it says."""

import json

import pytest
import torch

from benchmarks import bench_dc_ae_dit
from benchmarks.tables import dc_ae_dit


def test_every_case(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_dc_ae_dit, "STEPS", 2)
    bench_dc_ae_dit.main(["--rounds", "1", "--clock", "cpu", "--results", str(tmp_path)], image_size=64)
    report = json.loads((tmp_path / "cpu" / "dc_ae_dit.json").read_text())
    rows = report["cases"]
    assert {name: (row["latents"], row["tokens"]) for name, row in rows.items()} == {
        "f8, patch 2": ([4, 8, 8], 16),
        "f32, patch 1": ([32, 2, 2], 4),
        "f64, patch 1": ([128, 1, 1], 1),
    }
    first = rows["f8, patch 2"]
    for row in rows.values():
        for what, images in (("train", 4), ("sample", 1), ("decode", 1)):
            assert row[what]["images_per_second"] == pytest.approx(images / row[what]["seconds"])
            assert row[what]["speedup"] == pytest.approx(first[what]["seconds"] / row[what]["seconds"])
        assert row["images_per_second"] == pytest.approx(1 / (row["sample"]["seconds"] + row["decode"]["seconds"]))
        # The transformers are the same but for how a token enters and leaves.
        assert row["transformer_parameters"] == pytest.approx(first["transformer_parameters"], rel=0.02)


def test_an_autoencoder_of_another_size_is_not_timed():
    vae = bench_dc_ae_dit.dc_autoencoder(6, 32).eval()
    with pytest.raises(ValueError, match=r"must have 64 pixels a side, got \(1, 3, 128, 128\)"):
        bench_dc_ae_dit.decoding(vae, torch.zeros(1, 32, 4, 4), image_size=64)


def test_table():
    assert dc_ae_dit().count("\n| f") == len(bench_dc_ae_dit.CASES)
