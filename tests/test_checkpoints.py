"""The bundled checkpoint: an ordinary folder, small, deterministic, and it draws what the prompt says."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

from diffusers_sana import AutoencoderDC, FlowDPMSolverScheduler, SanaPipeline, SanaTransformer2DModel, cli
from diffusers_sana.checkpoints import SANA_EMOJI


@pytest.fixture(scope="module")
def pipe():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str, **kwargs) -> torch.Tensor:
    """A picture `[3, H, W]` in [0, 1]."""
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images[0]


def test_folder():
    files = [path for path in Path(SANA_EMOJI).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 31e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".jinja"}
    for path in Path(SANA_EMOJI).rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}, path  # noqa: SIM118


def test_components(pipe):
    assert isinstance(pipe.transformer, SanaTransformer2DModel)
    assert isinstance(pipe.vae, AutoencoderDC)
    assert isinstance(pipe.scheduler, FlowDPMSolverScheduler)


def test_follows_the_prompt(pipe):
    """A red object in the middle of a blue picture; a green background when it is asked for."""
    picture = draw(pipe, "a red apple on a blue background")
    assert picture.shape == (3, 128, 128)
    red, green, blue = picture[:, 4:12, 4:12].mean((1, 2))
    assert blue > red + 0.2
    assert blue > green + 0.1
    red, green, blue = picture[:, 56:80, 56:80].mean((1, 2))
    assert red > green + 0.2
    assert red > blue + 0.2
    red, green, blue = draw(pipe, "a red apple on a green background")[:, 4:12, 4:12].mean((1, 2))
    assert green > red + 0.1
    assert green > blue + 0.1


def test_same_seed_same_bits(pipe):
    first, again = (draw(pipe, "a tiger", num_inference_steps=4) for _ in range(2))
    assert torch.equal(first, again)


def test_plain_diffusers_draws_the_same(pipe):
    plain = diffusers.SanaPipeline.from_pretrained(SANA_EMOJI)
    plain.set_progress_bar_config(disable=True)
    assert type(plain.transformer).__module__.startswith("diffusers.")
    size = {"height": 128, "width": 128, "use_resolution_binning": False, "num_inference_steps": 8}
    difference = draw(pipe, "an octopus on a white background", **size) - draw(
        plain, "an octopus on a white background", **size
    )
    assert difference.abs().max() < 1e-3


def test_command_line(tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    cli.main(["generate", "a fox", "--out", str(out), "--steps", "2", "--num-images", "2", "--seed", "3"])
    assert capsys.readouterr().out.split() == [str(out), str(out.with_stem("picture-1"))]
    assert diffusers.utils.load_image(str(out)).size == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "`height`"),
        (["--model", "no/such/folder/anywhere"], "no/such/folder"),
        (["--steps", "0"], "num_inference_steps"),
    ],
)
def test_command_line_errors(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as error:
        cli.main(["generate", "a fox", "--out", str(tmp_path / "x.png"), *arguments])
    assert message in str(error.value)
    assert not (tmp_path / "x.png").exists()
