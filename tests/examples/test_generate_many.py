"""Images of a file of prompts: the same for one process and for two, and generated once."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.files import model_identity
from diffusers_sana.loading import checkpoint_path
from examples.generate_many import Task, batches, generate_all, prepare, read_tasks, settings_of
from tests.two_processes import ROOT, run_in_two


PROMPTS = ["a cat", "", "an über-dog", "a fox", "a lemon"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def test_images_do_not_depend_on_the_number_of_processes(tmp_path, prompts):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = settings_of(SimpleNamespace(model=SANA_EMOJI, steps=1, guidance_scale=None, dtype="float32"))
    tasks = read_tasks(prompts, one, 7, settings)
    assert len(list(generate_all(pipe, tasks, batch_size=2, num_inference_steps=1))) == 4
    options = ["--prompts", prompts, "--out", two, "--steps", "1", "--batch-size", "2", "--seed", "7"]
    told = run_in_two(ROOT / "examples" / "generate_many.py", *options)
    assert told == [f"process {rank}: generated 2 of 4 images\n" for rank in (0, 1)]
    names = ["000000.png", "000002.png", "000003.png", "000004.png"]
    for folder in (one, two):
        assert sorted(path.name for path in folder.glob("*.png")) == names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    with Image.open(one / "000002.png") as image:
        assert image.info["prompt"] == "an über-dog"
        assert image.info["seed"] == "9"


def test_what_is_there_is_not_generated_again(tmp_path, prompts):
    tasks = read_tasks(prompts, tmp_path, seed=0)
    assert [task.prompt for task in tasks] == ["a cat", "an über-dog", "a fox", "a lemon"]
    assert [task.seed for task in tasks] == [0, 2, 3, 4]
    for task in tasks[:3]:
        task.save(Image.new("RGB", (8, 8)))
    assert batches(tasks, 2) == [tasks[2:]]  # whole, because images of a batch are computed together
    assert batches(tasks, 1) == [tasks[3:]]
    (tmp_path / "prompts.txt").write_text("\n".join(["a cat\u2028two", *PROMPTS[1:]]), "utf-8-sig")
    assert [task.prompt for task in read_tasks(prompts, tmp_path, seed=0)][:2] == ["a cat\u2028two", "an über-dog"]
    other = Task("a wolf", tasks[0].seed, tasks[0].path)
    assert not other.is_done()
    assert not Task(tasks[0].prompt, 1, tasks[0].path).is_done()


def test_images_of_other_settings_are_refused(tmp_path, prompts):
    (task, *_) = read_tasks(prompts, tmp_path, 0, {"model": "a", "steps": 20})
    task.save(Image.new("RGB", (8, 8)))
    assert task.is_done()
    (other, *_) = read_tasks(prompts, tmp_path, 0, {"model": "b", "steps": 20})
    with pytest.raises(ValueError, match=r'`--out` must be new.*`model`: "a" there, "b" now\. Choose'):
        other.is_done()
    Image.new("RGB", (8, 8)).save(task.path)  # of another program
    with pytest.raises(ValueError, match="`--out` must be new"):
        task.is_done()


def test_settings_know_the_files_of_the_model(tmp_path):
    """A checkpoint that was replaced under its old name is another one."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_bytes(b"0" * 3_000_000)
    before = model_identity(str(tmp_path))
    assert model_identity(str(tmp_path)) == before
    (tmp_path / "vae" / "weights").write_bytes(b"0" * 2_999_999 + b"1")
    assert model_identity(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("model", "message"),
    [("vila-u-emoji", "--model must be a Sana or a SANA-Sprint"), ("sana-emoji-edges", "is a component")],
)
def test_other_models_are_refused_before_loading(prompts, tmp_path, model, message):
    args = SimpleNamespace(model=checkpoint_path(model), prompts=prompts, out=tmp_path / "out")
    with pytest.raises((ValueError, OSError), match=message):
        prepare(args)
    assert not (tmp_path / "out").exists()
