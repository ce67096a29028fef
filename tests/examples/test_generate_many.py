"""Pictures of a file of prompts: the same for one process and for two, and drawn once."""

import pytest
import torch
from PIL import Image

from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from examples.generate_many import Task, batches, draw_all, read_tasks
from tests.two_processes import ROOT, run_in_two


PROMPTS = ["a cat", "", "an über-dog", "a fox", "a lemon"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def test_pictures_do_not_depend_on_the_number_of_processes(tmp_path, prompts):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert len(list(draw_all(pipe, read_tasks(prompts, one, seed=7), batch_size=2, num_inference_steps=1))) == 4
    options = ["--prompts", prompts, "--out", two, "--steps", "1", "--batch_size", "2", "--seed", "7"]
    told = run_in_two(ROOT / "examples" / "generate_many.py", *options)
    assert told == [f"process {rank}: drew 2 of 4 pictures\n" for rank in (0, 1)]
    names = ["000000.png", "000002.png", "000003.png", "000004.png"]
    for folder in (one, two):
        assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    with Image.open(one / "000002.png") as image:
        assert image.info["prompt"] == "an über-dog"
        assert image.info["seed"] == "9"


def test_what_is_there_is_not_drawn_again(tmp_path, prompts):
    tasks = read_tasks(prompts, tmp_path, seed=0)
    assert [task.prompt for task in tasks] == ["a cat", "an über-dog", "a fox", "a lemon"]
    assert [task.seed for task in tasks] == [0, 2, 3, 4]
    for task in tasks[:3]:
        task.save(Image.new("RGB", (8, 8)))
    assert batches(tasks, 2) == [tasks[2:]]  # whole, because pictures of a batch are computed together
    assert batches(tasks, 1) == [tasks[3:]]
    other = Task("a wolf", tasks[0].seed, tasks[0].path)
    assert not other.is_done()
    assert not Task(tasks[0].prompt, 1, tasks[0].path).is_done()
