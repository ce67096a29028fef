"""The bundled checkpoints: ordinary folders, small, deterministic; one generates what a prompt says, one names it."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

from diffusers_sana import (
    AutoencoderDC,
    FlowDPMSolverScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    VilaUPipeline,
    cli,
)
from diffusers_sana.checkpoints import BUNDLED, SANA_EMOJI, VILA_U_EMOJI


@pytest.fixture(scope="module")
def pipe():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt: str, **kwargs) -> torch.Tensor:
    """An image `[3, H, W]` in [0, 1]."""
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images[0]


@pytest.mark.parametrize("folder", BUNDLED.values(), ids=BUNDLED)
def test_folder(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 31e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".jinja", ".txt"}
    for path in Path(folder).rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert dtypes - {torch.uint8} == {torch.bfloat16}, path
        assert (torch.uint8 in dtypes) == ("vila-u" in folder), "the only one in 4 bits"


def test_components(pipe):
    assert isinstance(pipe.transformer, SanaTransformer2DModel)
    assert isinstance(pipe.vae, AutoencoderDC)
    assert isinstance(pipe.scheduler, FlowDPMSolverScheduler)


def test_follows_the_prompt(pipe):
    """A red object in the middle of a blue image; a green background when it is asked for."""
    image = generate(pipe, "an apple on a blue background")
    assert image.shape == (3, 256, 256)
    red, green, blue = image[:, 8:40, 8:40].mean((1, 2))
    assert blue > red + 0.2
    assert blue > green + 0.1
    red, green, blue = image[:, 112:160, 112:160].mean((1, 2))
    assert red > green + 0.2
    assert red > blue + 0.2
    red, green, blue = generate(pipe, "an apple on a green background")[:, 8:40, 8:40].mean((1, 2))
    assert green > red + 0.1
    assert green > blue + 0.1


def test_same_seed_same_bits(pipe):
    first, again = (generate(pipe, "a tiger", num_inference_steps=4) for _ in range(2))
    assert torch.equal(first, again)


def test_plain_diffusers_generates_the_same(pipe):
    plain = diffusers.SanaPipeline.from_pretrained(SANA_EMOJI)
    plain.set_progress_bar_config(disable=True)
    assert type(plain.transformer).__module__.startswith("diffusers.")
    size = {"height": 256, "width": 256, "use_resolution_binning": False, "num_inference_steps": 8}
    difference = generate(pipe, "an octopus on a white background", **size) - generate(
        plain, "an octopus on a white background", **size
    )
    assert difference.abs().max() < 1e-3


def test_command_line(tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    cli.main(["generate", "a fox", "--out", str(out), "--steps", "2", "--num-images", "2", "--seed", "3"])
    files = [out.with_stem("picture-seed3"), out.with_stem("picture-seed4")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert diffusers.utils.load_image(str(files[1])).size == (256, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "--height must"),
        (["--model", "no/such/folder/anywhere"], "no/such/folder"),
        (["--steps", "0"], "--steps: must be at least 1"),
    ],
)
def test_command_line_errors(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "a fox", "--out", str(tmp_path / "x.png"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_vila_u_names_what_sana_draws(pipe):
    """Images of a model whose images VILA-U was not trained on."""
    things = {"a lemon": "black", "a frog": "blue", "a fox": "green", "a star": "purple", "a panda": "pink"}
    prompts = [f"{thing} on a {color} background, flat style" for thing, color in things.items()]
    images = pipe(prompts, generator=[torch.Generator().manual_seed(0) for _ in prompts]).images
    vila_u = VilaUPipeline.from_pretrained(VILA_U_EMOJI, dtype=torch.float32)
    named = vila_u.chat(images, "What is this?", do_sample=False)
    assert sum(said == thing for said, thing in zip(named, things, strict=True)) >= 4
    colors = vila_u.chat(images, "Which colour is the background?", do_sample=False)
    assert sum(said == color for said, color in zip(colors, things.values(), strict=True)) >= 4


def test_vila_u_generates_on_the_color_of_the_prompt():
    vila_u = VilaUPipeline.from_pretrained(VILA_U_EMOJI, dtype=torch.float32)
    vila_u.set_progress_bar_config(disable=True)
    prompts = ["a frog on a blue background, flat style", "a lemon on a red background, flat style"]
    generated = vila_u(prompts, generator=[torch.Generator().manual_seed(0) for _ in prompts], output_type="pt").images
    corners = generated[:, :, :8, :8].mean((2, 3))
    assert corners.argmax(1).tolist() == [2, 0]
    again = vila_u(prompts[1], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(again[0], generated[1])
