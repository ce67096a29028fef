"""`diffusers-sana quantize` and `env`."""

import json
import sys
import tomllib

import pytest
import torch

from diffusers_sana import SanaPipeline, cli
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.cli import env
from diffusers_sana.kernels import external
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from diffusers_sana.quantizers.svdquant.unfinished_run import UnfinishedRun
from tests import tiny
from tests.cli.commands import run
from tests.two_processes import ROOT


def test_quantize(tmp_path, capsys):
    out, prompts = tmp_path / "new" / "quantized", tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\nan apple on a blue background\n")
    options = ["--precision", "nvfp4", "--rank", "8", "--steps", "2", "--prompts", str(prompts)]
    folder = str(tiny.write_official_folder(tmp_path / "official"))
    cli.main(["quantize", folder, "-o", str(out), *options])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(out)
    assert lines[1].endswith("layers in nvfp4, rank 8, 2 prompts")
    assert "import diffusers_sana" in (out / "README.md").read_text()
    assert (out / "quantization_report.png").exists()

    pipe = SanaPipeline.from_pretrained(out, dtype=torch.bfloat16)
    assert {layer.rank for layer in quantized_layers(pipe.transformer)} == {8}
    cli.main(["generate", "a fox", "--model", str(out), "--out", str(tmp_path / "x.png"), "--steps", "2"])
    assert (tmp_path / "x.png").exists()

    assert "--out must be new or empty" in run("quantize", folder, "-o", str(out), *options).error


def test_two_commands_in_one_folder(tmp_path):
    folder, out = str(tiny.write_official_folder(tmp_path / "official")), tmp_path / "out"
    other = UnfinishedRun(out, {})
    ended = run("quantize", folder, "-o", str(out), "--rank", "4")
    assert f"diffusers-sana quantize: Another process quantizes into '{out}'. Wait" in ended.error
    assert ended.code == 1
    other.close()


def test_other_pipelines(tmp_path, capsys):
    folder = tiny.write_official_folder(tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "SanaPAGPipeline"  # whose class is ours with this package imported
    (folder / "model_index.json").write_text(json.dumps(index))
    cli.main(["quantize", str(folder), "-o", str(tmp_path / "out"), "--precision", "int8", "--dtype", "float32"])
    assert "layers in int8, rank 0, no prompts" in capsys.readouterr().out
    assert "from diffusers_sana import SanaPAGPipeline" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder"),
        ([SANA_EMOJI, "--rank", "4000"], "--rank must be at most"),
        ([SANA_EMOJI, "--gptq"], "--gptq needs calibration data"),
        ([SANA_EMOJI, "--prompts", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_errors(arguments, message, tmp_path):
    ended = run("quantize", *arguments, "-o", str(tmp_path / "out"))
    assert message in ended.error
    assert ended.code == 2
    assert list(tmp_path.iterdir()) == []


def test_env(capsys):
    cli.main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert 12 <= len(lines) - len(env.EXTRAS) <= 16
    described = {line.split()[0]: line for line in lines}
    assert torch.__version__ in described["torch"]
    assert described["int4"].split(":")[0].endswith(("w4a4", "w4a8", "w4a16"))
    assert described["int8"].split(":")[0].endswith(("w8a8", "w8a16"))
    assert described["float8"].split(":")[0].endswith(("f8a8", "f8a16"))
    with kernel_mode("torch"):
        cli.main(["env"])
    assert "PyTorch in mode 'torch'" in capsys.readouterr().out


def test_env_names_the_package_of_a_kernel_mode(capsys, monkeypatch):
    monkeypatch.setattr(external, "find_spec", lambda module: None)
    for name in external.PACKAGES.values():
        monkeypatch.delitem(sys.modules, name, raising=False)
    cli.main(["env"])
    out = capsys.readouterr().out
    assert "w4a4 products   ours; comfy-kitchen is not found, flashinfer is not found\n" in out
    assert f", threads: {torch.get_num_threads()}" in out
    monkeypatch.setitem(sys.modules, "comfy_kitchen", object())
    for mode, said in (
        (
            "comfy-kitchen",
            "comfy-kitchen, which is found, for int4 and nvfp4 where its first result is right, else ours",
        ),
        ("flashinfer", "ours, as flashinfer is not found: pip install flashinfer-python"),
    ):
        with kernel_mode(mode):
            cli.main(["env"])
        printed = capsys.readouterr().out
        assert f"in mode {mode!r} of DIFFUSERS_SANA_KERNELS" in printed
        assert f"w4a4 products   {said}\n" in printed


def test_env_says_what_to_install(capsys, monkeypatch):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert env.EXTRAS.keys() | {"dev", "docs", "publish"} == pyproject["project"]["optional-dependencies"].keys()
    requires = ["torch>=2.8", 'gradio>=6; extra == "demo"', "no-such>=1; extra == 'eval'", 'other; extra == "eval"']
    monkeypatch.setattr(env.metadata, "requires", lambda package: requires)
    monkeypatch.setattr(env, "_is_installed", lambda package: package == "gradio")
    cli.main(["env"])
    printed = capsys.readouterr().out
    assert "the web page of `diffusers-sana demo`: installed" in printed
    assert 'SSIM and plots of evaluations: pip install "diffusers_sana[eval]", for no-such, other' in printed
