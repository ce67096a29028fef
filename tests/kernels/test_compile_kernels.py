"""Every kernel compiles for every architecture, at the shapes of real models, without spilling registers.

In a separate process, because the interpreter that runs the other tests' kernels is chosen at import. A kernel that is
to the compiler what it was when the committed table was made is not compiled again.
"""

import importlib.util
import json
import linecache
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.compiler import ASTSource, make_backend

from benchmarks.compile_kernels import RESULTS, SHARED_KIB, TARGETS, as_json, digest, loop_lengths
from benchmarks.kernel_benchmark import load, operations


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(out.parent / "cache")}
    command = [sys.executable, "-m", "benchmarks.compile_kernels", "--first-case", "--reuse", RESULTS, "--out", out]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads(out.read_text())


def test_the_committed_table_has_a_line_per_kernel():
    text = RESULTS.read_text(encoding="utf-8")
    assert text == as_json(json.loads(text))
    assert sum('"operation": ' in line for line in text.splitlines()) == len(json.loads(text)["kernels"])


def test_all_kernels_fit_all_architectures(report):
    for row in report["kernels"]:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_kib"] <= SHARED_KIB[row["architecture"]], row
        assert row["registers"] <= 255 or row["architecture"] == "gfx942", row


def test_none_is_missing(report):
    names = set(operations())
    files = {path.stem for path in (ROOT / "diffusers_sana" / "kernels" / "triton").glob("*.py")}
    assert files - {"__init__", "low_bit", "requantize_rows", "rows"} == names
    for architecture in SHARED_KIB:
        compiled = {row["operation"] for row in report["kernels"] if row["architecture"] == architecture}
        assert compiled == names
        for benchmark in map(load, names):
            kernels = {row["kernel"] for row in report["kernels"] if row["operation"] == benchmark.name}
            assert len(kernels) >= len(benchmark.launches)


def test_the_committed_table_has_the_same_kernels(report):
    committed = json.loads(RESULTS.read_text())["kernels"]
    assert {row["kernel"] for row in committed} == {row["kernel"] for row in report["kernels"]}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_quantize_lowrank_has_short_loops(report, architecture):
    """Each warp passes over 512 elements at a time: for their largest magnitudes, then for codes and projection."""
    (row,) = (
        row
        for row in report["kernels"]
        if (row["operation"], row["architecture"]) == ("quantize_lowrank", architecture)
    )
    assert row["unswizzled_operands"] == 0
    largest, codes = row["loops"]
    assert largest <= 115
    assert codes <= 220


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   BRA `(.L_x_3);
"""

AMD = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dword s0, s[0:1], 0x0
\t.p2align\t8
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_add_f32_e32 v0, v0, v1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


@pytest.mark.parametrize(("assembly", "lengths"), [(SASS, [3]), (AMD, [2])])
def test_loop_lengths(assembly, lengths):
    assert loop_lengths(assembly) == lengths


KERNEL = """import triton.language as tl
from triton.runtime import JITFunction

{before}
SCALE = tl.constexpr({scale})

@JITFunction
def times(x):
    return x * {factor}

@JITFunction
def kernel(x, n: tl.constexpr):
    tl.store(x, times(tl.load(x)) * SCALE + n)
"""


@pytest.fixture
def digest_of(tmp_path):
    def of(architecture="sm_90", n=1, num_warps=4, before="", scale=2, factor=3):
        path = tmp_path / "kernel.py"
        path.write_text(KERNEL.format(before=before, scale=scale, factor=factor), encoding="utf-8")
        linecache.clearcache()
        spec = importlib.util.spec_from_file_location("a_kernel", path)
        module = importlib.util.module_from_spec(spec)
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), vars(module))
        source = ASTSource(module.kernel, {"x": "*fp32", "n": "constexpr"}, {(1,): n})
        target = TARGETS[architecture]
        return digest(source, target, make_backend(target).parse_options({"num_warps": num_warps}))

    return of


def test_what_is_not_compiled_again(digest_of):
    """What has another result is compiled, what only stands elsewhere in its file is not."""
    first = digest_of()
    assert digest_of() == digest_of(before="# a comment\n") == first
    changes = [
        {"architecture": "sm_80"},
        {"architecture": "gfx942"},
        {"n": 2},
        {"num_warps": 8},
        {"scale": 5},
        {"factor": 4},
    ]
    assert len({first, *(digest_of(**change) for change in changes)}) == 1 + len(changes)
