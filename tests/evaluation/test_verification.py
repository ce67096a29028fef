"""`verify`: equal packages pass, and what is wrong in ours, in a kernel or in the arguments is found."""

import json

import diffusers
import pytest
import torch

import diffusers_sana
from diffusers_sana.cli import main
from diffusers_sana.evaluation import verification
from diffusers_sana.evaluation.kernel_checks import checked_kernels
from diffusers_sana.evaluation.verification import summary, verify
from diffusers_sana.kernels.dispatch import kernel_mode
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_official_folder(tmp_path_factory.mktemp("official"), qk_norm="rms_norm_across_heads"))


def test_equal_packages_pass(folder):
    report = verify(folder, num_images=2, steps=3, device="cpu")
    assert report["settings"] | {"steps": 3, "pixels": [32, 32], "dtype": "float32"} == report["settings"]
    assert {check["name"].split(",")[0] for check in report["checks"]} == {
        "one forward of the transformer",
        "latents after all steps",
    }
    assert all(check["passed"] for check in report["checks"])
    # Two implementations: equal but for rounding, yet not one and the same.
    assert 0 < report["differences"]["forward"] < 1e-5
    assert min(value or 200 for value in report["differences"]["psnr_db"]) > 80
    for side in ("diffusers", "diffusers_sana"):
        figures = report[side]
        assert 0 < figures["seconds_per_step"] < figures["seconds_per_image"]
        assert figures["transformer_bytes"] == sum(
            p.nbytes
            for p in diffusers.SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer").parameters()
        )
    why = {kernel["operation"]: kernel["why"] for kernel in report["kernels"]}
    assert why["rms_norm"] == why["relu_linear_attention"] == "the tensors are on the CPU"
    assert why["multiscale_projection"] == "groups of 2 channels, not one of (16, 32, 64)"
    assert "No kernel ran here, only PyTorch references." in summary(report)
    assert report["kernel_mode"] == "auto"
    assert f"kernel mode 'auto'; products in w4a4: {report['w4a4_products']}\n" in summary(report)


def test_half_precision_is_measured_by_fp32(folder):
    report = verify(folder, num_images=2, steps=2, device="cpu", dtype="bfloat16")
    errors = report["differences"]["forward_to_fp32"]
    assert all(1e-4 < error < 0.1 for error in errors.values())
    (check,) = report["checks"]
    assert check["value"] == errors["diffusers_sana"]
    assert check["limit"] == pytest.approx(1.1 * errors["diffusers"] + 2**-8)


def test_wrong_results_are_found(folder, tmp_path, monkeypatch, capsys):
    load = verification._load

    def damaged(pipeline_class, **places):
        pipe = load(pipeline_class, **places)
        if pipeline_class is diffusers_sana.SanaPipeline:
            pipe.transformer.proj_out.weight.data *= 1 + 1e-4
        return pipe

    monkeypatch.setattr(verification, "_load", damaged)
    out = tmp_path / "new" / "report.json"
    with pytest.raises(SystemExit) as error:
        main(["verify", folder, "--num-images", "2", "--steps", "2", "--device", "cpu", "--out", str(out)])
    assert error.value.code == 1
    assert "FAILED: one forward of the transformer, relative difference: " in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["differences"]["forward"] == pytest.approx(1e-4, rel=0.1)


def test_sprint():
    """Bundled without what it shares with sana-emoji; both packages get the same parts."""
    report = verify("sana-emoji-sprint", num_images=2, steps=2, device="cpu")
    assert report["settings"]["pipeline"] == "SanaSprintPipeline"
    assert all(check["passed"] for check in report["checks"])
    assert 0 < report["differences"]["forward"] < 1e-5


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "report.json"
    main(
        [
            "verify",
            "sana-emoji",
            "--num-images",
            "2",
            "--steps",
            "2",
            "--quantize",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["settings"]["model"] == "sana-emoji"
    assert report["settings"]["pixels"] == [256, 256]
    assert all(check["passed"] for check in report["checks"])
    four = report["quantized"]
    assert four["transformer_bytes"] < 0.6 * report["diffusers_sana"]["transformer_bytes"]
    assert all(25 < value < 80 for value in four["psnr_db"])
    assert f"{min(four['psnr_db']):.1f}" in printed
    assert {"command", "device", "threads", "versions"} <= report.keys()
    assert "checks passed." in printed
    assert str(out) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vila-u-emoji"}, "`model` must be a Sana or a SANA-Sprint, .* vila-u-emoji is a VilaUPipeline"),
        ({"num_images": 1}, "`num_images` must be at least 2, got 1"),
        ({"steps": 1}, "`steps` must be at least 2, got 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(**{"model": "sana-emoji"} | arguments)


def run_in_interpreter(transformer):
    """Two images of 2 x 2 tokens; in mode "triton", which on a CPU is the interpreter."""
    inputs = {
        "hidden_states": torch.randn(2, tiny.LATENT_CHANNELS, 2, 2),
        "encoder_hidden_states": torch.randn(2, 3, tiny.TEXT_WIDTH),
        "timestep": torch.tensor([1.0, 500.0]),
    }
    with torch.no_grad(), kernel_mode("triton"), checked_kernels() as checks:
        transformer(**inputs)
    return checks


@pytest.fixture(scope="module")
def transformer():
    return tiny.transformer(diffusers_sana, qk_norm="rms_norm_across_heads")


def test_kernels_are_held_to_their_references(transformer):
    checks = run_in_interpreter(transformer)
    kernels = {check.operation for check in checks}
    assert kernels >= {"rms_norm", "modulated_layer_norm", "gated_residual", "relu_linear_attention"}
    for check in checks:
        assert check.runs == "Triton kernel", check.why
        assert check.passed
        assert 0 <= check.error < 1e-6
    # Of each block with a gate and without one; after the last block follows no norm of a block.
    norms = [check for check in checks if check.operation == "gated_residual_norm"]
    assert sum(norm.calls for norm in norms) == 2 * len(transformer.transformer_blocks) - 1
    assert norms[0].shapes[0] == [2, 4, 16]


def test_a_wrong_kernel_is_found(transformer, monkeypatch):
    from diffusers_sana.kernels.triton import gated_residual

    right = gated_residual.gated_residual_forward
    monkeypatch.setattr(gated_residual, "gated_residual_forward", lambda *arguments: right(*arguments) * (1 + 1e-5))
    checks = run_in_interpreter(transformer)
    assert {check.operation for check in checks if not check.passed} == {"gated_residual"}
