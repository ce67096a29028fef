"""`diffusers-sana generate`: what the pipelines check reaches the user as one line, and no image is wrong."""

import numpy as np
import pytest
from PIL import Image

from diffusers_sana.cli import main


def generate(tmp_path, *options):
    main(
        ["generate", "a red apple", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "image.png"), *options]
    )
    return np.asarray(Image.open(tmp_path / "image.png")).astype(float)


def test_float16(tmp_path, caplog, capfd):
    image = generate(tmp_path, "--dtype", "float16")
    assert caplog.text.count("float16 is slow on a CPU; float32 or bfloat16 (--dtype) is faster there.") == 1
    assert "cannot run with `cpu`" not in capfd.readouterr().err + caplog.text
    caplog.clear()
    wanted = generate(tmp_path, "--dtype", "bfloat16")
    assert "is slow" not in caplog.text
    assert 20 * np.log10(255 / np.sqrt(((image - wanted) ** 2).mean())) > 40


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_guidance_that_is_not_finite(tmp_path, capsys, scale):
    with pytest.raises(SystemExit):
        generate(tmp_path, "--guidance-scale", scale)
    assert f"argument --guidance-scale: must be finite, got {scale}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [str(2**70), str(-(2**70)), "one"])
def test_seeds_that_no_generator_takes(tmp_path, capsys, seed):
    with pytest.raises(SystemExit):
        generate(tmp_path, "--seed", seed)
    assert f"argument --seed: must be an integer of 64 bits, got '{seed}'" in capsys.readouterr().err


def test_largest_seed(tmp_path):
    assert generate(tmp_path, "--seed", str(2**63 - 1)).std() > 1
