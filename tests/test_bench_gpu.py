"""The benchmark for a GPU: a dry run of every case, and a kernel that computes something else is not only fast."""

import dataclasses
import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_gpu, gpu_timing
from benchmarks.kernel_benchmark import load, operations, run_on_gpu
from diffusers_sana.kernels.dispatch import current_kernel_mode
from tests import gpu_cases


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    bench_gpu.main(["--minutes", "30", "--results", str(folder)], gpu_cases.with_faults)
    return json.loads((folder / "cpu" / "gpu.json").read_text())


def test_every_case_runs_beside_those_that_fail(report):
    assert report["failed"].keys() == {gpu_cases.TRITON_ERROR, gpu_cases.KILLED}, report["failed"]
    assert report["failed"][gpu_cases.TRITON_ERROR].startswith("OutOfResources: out of resource: shared memory")
    assert report["failed"][gpu_cases.KILLED] == "the process died with exit code -9"
    assert report["not run"] == {}
    assert list(report["cases"]) == list(gpu_cases.dry_cases())
    assert len(report["cases"]) > 15 + len(operations())


def test_what_decides_a_default_says_so(report):
    rows = {name: row for name, row in report["cases"].items() if name.split()[0] in ("ways", "linear", "kernel")}
    rows |= {name: row for name, row in report["cases"].items() if name.endswith(("px int4", "px nvfp4"))}
    assert len(rows) == 2 + 6 + len(operations()) + 2
    for name, row in rows.items():
        assert row["decides"], name
        for part in row["cases"].values() if "cases" in row else [row]:
            assert part["error"].keys() <= part["costs"].keys() | {"torch"}
            assert all(0 <= error < 1 for error in part["error"].values()), name
            for cost in part["costs"].values():
                assert cost["gpu_seconds"] > 0
                assert cost["launch_seconds"] > 0
                assert cost["timed_by"] == "clock"
    for operation in operations():
        assert not any(part["wrong"] for part in rows[f"kernel {operation}"]["cases"].values()), operation
    assert rows["ways sana-1.6b 1024px"]["graph_is_exact"]
    assert list(report["cases"]).index("ways sana-1.6b 1024px") == 1  # what matters most first


def test_a_wrong_kernel_is_named():
    def doubled(hidden_states, **others):
        return hidden_states * (1 + (current_kernel_mode() == "triton"))

    benchmark = dataclasses.replace(load("rms_norm"), operation=doubled)
    (row,) = run_on_gpu(benchmark, rounds=1, with_compiled=False, device="cpu", tiny=True)["cases"].values()
    assert row["wrong"]
    assert row["error"] == {"kernel": pytest.approx(1), "torch": pytest.approx(0)}


class Cuda:
    """What `gpu_timing` asks of `torch.cuda`, with a clock that calls and replays of graphs move on."""

    def __init__(self):
        self.now, self.recording = 0.0, None
        self.is_available = lambda: True
        self.synchronize = lambda: None
        self.stream = lambda stream: nullcontext()
        self.current_stream = self.Stream = lambda: SimpleNamespace(wait_stream=lambda stream: None)

    def CUDAGraph(self):
        graph = SimpleNamespace(seconds=0.0)
        graph.replay = lambda: self.work(graph.seconds)
        return graph

    @contextmanager
    def graph(self, graph):
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None

    def Event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event

    def work(self, seconds, launch=0.0):
        if self.recording is None:
            self.now += seconds + launch
        else:
            self.recording.seconds += seconds


def test_the_work_is_timed_without_the_launch(monkeypatch):
    """Where a function can be recorded; where not, it says so."""
    cuda = Cuda()

    def waits(seconds):
        if cuda.recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.work(seconds, launch=0.5)

    functions = {
        "kernel": lambda seconds: cuda.work(seconds, launch=0.5),
        "waits": waits,
        "replay": lambda seconds: cuda.work(seconds, launch=0.25),
    }
    flush = torch.empty(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cuda", cuda)
        patch.setattr(torch, "empty", lambda *sizes, **options: flush)
        found = gpu_timing.costs(functions, [{"seconds": 1.0}, {"seconds": 3.0}], rounds=3, replays=["replay"])
    assert {name: (cost["timed_by"], cost["gpu_seconds"]) for name, cost in found.items()} == {
        "kernel": ("graph", 2.0),
        "waits": ("events", 2.5),
        "replay": ("events", 2.25),
    }
    assert all(0 < cost["launch_seconds"] < 1 for cost in found.values())


def test_errors():
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    assert gpu_timing.error((codes, torch.ones(2)), (codes.roll(1), torch.ones(2))) == 1
    assert gpu_timing.error([torch.ones(4)], [torch.full((4,), 2.0)]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="zip"):
        gpu_timing.error((codes,), (codes, codes))
    wide = gpu_timing.in_fp32({"x": codes, "y": [torch.ones(1).bfloat16()], "dtype": torch.float16, "n": None})
    assert wide["x"] is codes
    assert (wide["y"][0].dtype, wide["dtype"], wide["n"]) == (torch.float32, torch.float32, None)
