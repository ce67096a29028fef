"""The benchmarks of VILA-U: the floor is arithmetic on known sizes, and every case runs, on a tiny model."""

import json

import pytest
import torch

from benchmarks import bench_vila_u, vila_u_gpu
from benchmarks.official_vila_u import official_images
from benchmarks.vila_u import LAYOUT_384, PROMPT_TOKENS, image_bytes, prompts, vila_u
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from tests.models.vila_u.tiny import (
    CELLS,
    CODES,
    DEPTH,
    IMAGE,
    IMAGE_START,
    tiny_depth_config,
    tiny_text_config,
    tiny_vision_config,
)


TINY = {
    "text_config": tiny_text_config(num_hidden_layers=1),
    "vision_config": tiny_vision_config().to_dict(),
    "depth_config": tiny_depth_config(num_hidden_layers=1).to_dict(),
    "image_token_id": IMAGE,
    "image_start_token_id": IMAGE_START,
}


def on_meta(sizes) -> VilaUForConditionalGeneration:
    with torch.device("meta"):
        return VilaUForConditionalGeneration(VilaUConfig(**sizes)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("sizes", "cells", "gigabytes_per_cell", "depth_share"),
    [({}, 256, 17.1, 0.24), (LAYOUT_384, 729, 29.5, 0.56)],
    ids=["256px", "384px"],
)
def test_bytes_of_the_real_models(sizes, cells, gigabytes_per_cell, depth_share):
    """7 B weights a cell, 0.5 B for each code, half a MiB of keys and values for each position of a row."""
    parts = image_bytes(on_meta(sizes), rows=2, prompt=64)
    weights = sum(parts.values()) - parts["kv_cache"]
    assert weights / cells / 1e9 == pytest.approx(gigabytes_per_cell, abs=0.06)
    assert parts["depth_transformer"] / weights == pytest.approx(depth_share, abs=0.01)
    positions = sum(range(65, 64 + cells))
    assert parts["kv_cache"] == 2 * positions * 2**19


def test_bytes_follow_rows_and_storage():
    model = vila_u(VilaUConfig(**TINY), "cpu", torch.float32)
    one, four = (image_bytes(model, rows, 10) for rows in (1, 4))
    assert four == one | {"kv_cache": 4 * one["kv_cache"]}
    assert image_bytes(model, 2, 11)["kv_cache"] > 2 * one["kv_cache"]
    assert {part: 2 * read for part, read in image_bytes(model.bfloat16(), 1, 10).items()} == one


@pytest.mark.parametrize("batch", [1, 3])
def test_the_official_way_finds_our_codes(batch):
    config = VilaUConfig(**TINY)
    model, inputs = vila_u(config, "cpu", torch.float32), prompts(config, batch, "cpu")
    codes, pixels = official_images(model, inputs, do_sample=False)
    ours, our_pixels = bench_vila_u.our_images(model, inputs, do_sample=False)
    assert codes.shape == (batch, CELLS, DEPTH)
    assert codes.unique().numel() > 10
    assert torch.equal(codes, ours)
    torch.testing.assert_close(pixels, our_pixels)
    sampled, _ = official_images(model, inputs, do_sample=True)
    assert not torch.equal(sampled, codes)


def test_codes_that_differ_are_not_timed(monkeypatch):
    def other(model, inputs, do_sample):
        codes, pixels = bench_vila_u.our_images(model, inputs, do_sample)
        return (codes + 1) % CODES, pixels

    monkeypatch.setattr(bench_vila_u, "official_images", other)
    with pytest.raises(ValueError, match=r"agree on 0\.0% of the codes"):
        bench_vila_u.measure("image fp32", TINY, 0, bench_vila_u.CLOCKS["cpu"])


def test_every_cpu_case(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_vila_u, "TEXT_TOKENS", 3)
    path, arguments = tmp_path / "cpu" / "vila_u.json", ["--clock", "cpu", "--results", str(tmp_path)]
    bench_vila_u.main([*arguments, "--cases", "decode bf16", "--rounds", "3"], sizes=TINY)
    first = json.loads(path.read_text())["cases"]["decode bf16"]
    assert first["rounds"] == 3
    bench_vila_u.main([*arguments, "--rounds", "0"], sizes=TINY)
    report = json.loads(path.read_text())
    assert report["cases"].keys() == bench_vila_u.CASES.keys()
    assert report["cases"]["decode bf16"] == first  # what is there stays
    assert report["clock"] == "cpu"
    for name, case in report["cases"].items():
        kind, dtype, batch, _ = bench_vila_u.CASES[name]
        seconds = case["seconds"]["diffusers_sana"]
        assert seconds > 0
        if kind in ("images", "deep"):
            cells, depth = (CELLS, DEPTH) if kind == "images" else (CELLS // 4, 16)
            assert case["cells_per_second"]["diffusers_sana"] == batch * cells / seconds
            assert (case["same_best_codes"] or {}).get("codes") == (batch * cells * depth if dtype == "fp32" else None)
        elif kind == "text":
            assert case["prompt_tokens"] == PROMPT_TOKENS + CELLS
        else:
            assert case["images_per_second"] == 1 / seconds


def test_every_gpu_case(monkeypatch):
    monkeypatch.setattr(vila_u_gpu, "TEXT_TOKENS", 3)
    # Tracing takes seconds, and the tests of the generation compile the same loop.
    monkeypatch.setitem(vila_u_gpu.COMPILED, "compile_config", None)
    cases = dict(vila_u_gpu.cases("cpu", TINY, TINY))
    for name, function in cases.items():
        row = function()
        if name.endswith("text"):
            assert row["prompt_tokens"] == PROMPT_TOKENS + CELLS
            continue
        assert row["floor_seconds_per_image"] > 0
        for way, seconds in row["seconds_per_image"].items():
            assert row["times_the_floor"][way] == pytest.approx(seconds / row["floor_seconds_per_image"])
    assert len(cases) == 6
