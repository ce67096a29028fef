"""`diffusers-sana chat`, and `generate` with a VILA-U."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_sana import VilaUPipeline, checkpoints, cli
from tests.cli.commands import run
from tests.models.vila_u.tiny import shared_model
from tests.models.vila_u.tiny_processor import tiny_processor, write_folders


@pytest.fixture(scope="module")
def pipe():
    pipe = VilaUPipeline(shared_model(), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory):
    """Of a pipeline and of transformers, by kind."""
    folders = write_folders(pipe, tmp_path_factory.mktemp("folders"))
    return {kind: str(folder) for kind, folder in folders.items()}


@pytest.fixture
def picture(tmp_path):
    Image.radial_gradient("L").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_generate(pipe, folders, tmp_path, capsys):
    """Image i of a seed is the first one of seed + i."""
    out = tmp_path / "new" / "picture.png"
    options = ["--num-images", "2", "--seed", "3", "--guidance-scale", "2"]
    cli.main(["generate", "a cat", "--model", folders["pipeline"], "--out", str(out), *options])
    paths = [out.with_stem("picture-seed3"), out.with_stem("picture-seed4")]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    for path, seed in zip(paths, (3, 4), strict=True):
        generated = pipe("a cat", guidance_scale=2.0, generator=torch.Generator().manual_seed(seed)).images[0]
        assert Image.open(path).tobytes() == generated.tobytes()


def test_generate_takes_the_scale_of_the_model(pipe, folders, tmp_path):
    cli.main(["generate", "a cat", "--model", folders["transformers"], "--out", str(tmp_path / "x.png")])
    generated = pipe("a cat", generator=torch.Generator().manual_seed(0)).images[0]
    assert Image.open(tmp_path / "x.png").tobytes() == generated.tobytes()


def test_chat(pipe, folders, picture, capsys):
    command = ["chat", picture, "cat?", "--model", folders["transformers"], "--max-new-tokens", "6"]
    cli.main(command)
    assert capsys.readouterr().out == pipe.chat(picture, "cat?", max_new_tokens=6) + "\n"
    answers = []
    for seed in ("1", "1", "2"):
        cli.main([*command, "--seed", seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("kind", ["pipeline", "transformers"])
def test_options_of_sana(folders, kind, tmp_path):
    options = ["--steps", "4", "--height", "64", "--out", str(tmp_path / "x.png")]
    ended = run("generate", "a cat", "--model", folders[kind], *options)
    assert "--height, --steps must be left out for VILA-U" in ended.error
    assert ended.code == 2
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file.png", "cat?", "--model", "{vila}"], "no-such-file.png"),
        (["{picture}", "cat?", "--model", "no/such/folder"], "no/such/folder"),
        (["{picture}", "cat?", "--model", "{sana}"], "--model must be a VILA-U"),
    ],
)
def test_chat_errors(folders, picture, arguments, message):
    names = {"picture": picture, "vila": folders["pipeline"], "sana": checkpoints.SANA_EMOJI}
    ended = run("chat", *(argument.format(**names) for argument in arguments))
    assert message in ended.error
    assert ended.code == 2


def test_names_of_the_bundled_checkpoints():
    parse = cli.parser().parse_args
    assert parse(["chat", "x.png", "what?"]).model == checkpoints.VILA_U_EMOJI
    assert parse(["generate", "a fox"]).model == checkpoints.SANA_EMOJI
    assert parse(["generate", "a fox", "--model", "vila-u-emoji"]).model == checkpoints.VILA_U_EMOJI
    assert parse(["generate", "a fox", "--model", "./sana-emoji"]).model == "./sana-emoji"
    assert {Path(path).name for path in checkpoints.BUNDLED.values()} == set(checkpoints.BUNDLED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "none.png", "what"], "IMAGE must be a file, but there is no file none.png"),
        (["convert", "none.pth", "-o", "out"], "FILE must be a file, but there is no file none.pth"),
    ],
)
def test_files_that_are_not_there(arguments, message):
    assert message in run(*arguments).error
