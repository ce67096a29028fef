"""The benchmark beside other runtimes: everyone's turn at a tiny size, and those that are not installed or fail."""

import json

import pytest
import torch

from benchmarks import bench_rivals
from benchmarks.harness import named_by_processor
from benchmarks.models import TINY_AUTOENCODER


def installed(name: str) -> bool:
    return bench_rivals.version_of(name) != ""


def test_every_contender(tmp_path, monkeypatch):
    cases = {
        "step": lambda: bench_rivals.step_case("tiny", 64, 1),
        "decode": lambda: bench_rivals.decode_case(64, TINY_AUTOENCODER),
    }
    monkeypatch.setattr(bench_rivals, "CASES", cases)

    def without_compilers(*arguments):
        return ((name, make) for name, make in everyone(*arguments) if "compile" not in name)

    everyone = bench_rivals.rivals
    monkeypatch.setattr(bench_rivals, "rivals", without_compilers)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    bench_rivals.main(["--cases", "step", "decode", "--rounds", "1", "--results", str(tmp_path)])
    report = json.loads((tmp_path / "cpu" / f"{named_by_processor('rivals')}.json").read_text())
    assert set(report["versions"]) > set(bench_rivals.PACKAGES)
    step, decode = report["cases"]["step"], report["cases"]["decode"]
    assert step["error"]["diffusers_sana"] < 1e-5
    assert decode["error"]["diffusers_sana"] < 1e-5
    assert all(seconds > 0 for seconds in step["seconds"].values())
    assert step["seconds"].keys() == step["error"].keys() == step["peak_mib"].keys()
    for package in ("openvino", "onnxruntime", "sdnq"):
        if not installed(package):
            failed = {name for name in step["failed"] if name.startswith(package)}
            assert len(failed) >= 2, step["failed"]
            assert all("No module named" in step["failed"][name] for name in failed)
    assert not any("int" in name for name in [*decode["seconds"], *decode["failed"]])


def test_one_that_fails_costs_nobody_else_their_turn():
    def broken():
        raise RuntimeError("no such instruction\nsecond line")

    makers = {"exact": lambda: lambda: torch.ones(2), "broken": broken, "off": lambda: lambda: torch.full((2,), 1.1)}
    row = bench_rivals.measure(makers, "exact", rounds=2)
    assert row["failed"] == {"broken": "RuntimeError: no such instruction"}
    assert row["error"] == {"exact": 0.0, "off": pytest.approx(0.1)}
