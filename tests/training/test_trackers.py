"""Trackers: what they are told, that a resumed run continues theirs, and that they change nothing."""

import random
import sys
import types

import pytest
import torch
from accelerate import tracking
from PIL import Image

from diffusers_sana.training import config as config_module
from diffusers_sana.training.config import TrainingConfig, parse_options
from tests.training.test_loop import numbered, read_log
from tests.training.test_resume import nan_at, start


class ListTracker(tracking.GeneralTracker):
    """Keeps what it is told, and uses random numbers as some trackers do."""

    name = "list"
    requires_logging_directory = False
    runs = []

    def __init__(self, project, **arguments):
        super().__init__()
        self.project, self.arguments, self.rows, self.images, self.is_open = project, arguments, [], [], True
        self.runs.append(self)
        random.random()
        torch.rand(3)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **kwargs):
        assert self.is_open
        torch.rand(1)
        self.rows.append((step, values))

    def log_images(self, values, step=None, **kwargs):
        self.images.append((step, values, kwargs))

    def finish(self):
        self.is_open = False


class FolderTracker(ListTracker):
    """As TensorBoard: it is told where to write."""

    requires_logging_directory = True

    def __init__(self, project, folder, **arguments):
        super().__init__(project, **arguments)
        self.folder = folder


@pytest.fixture
def runs(monkeypatch):
    """The trackers that were started."""
    classes = {
        "list": ListTracker,
        "tensorboard": type("TensorBoard", (FolderTracker,), {"name": "tensorboard"}),
        "wandb": type("WandB", (ListTracker,), {"name": "wandb"}),
        "trackio": type("Trackio", (ListTracker,), {"name": "trackio"}),
    }
    for name, tracker_class in classes.items():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, tracker_class)
    monkeypatch.setattr(config_module, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(Image=lambda pixels: ("image", pixels.shape)))
    monkeypatch.setattr(ListTracker, "runs", [])
    return ListTracker.runs


def train(folder, sample=lambda path: None, spoil=lambda number, loss: loss, **settings):
    loop, model, run = start(folder, spoil=spoil, **settings)
    loop.sample = sample
    run(numbered)
    return [parameter.detach().clone() for parameter in model.parameters()]


def write_grid(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (255, 0, 0)).save(path)


def test_trackers_get_the_log_the_settings_and_the_grids(runs, tmp_path):
    train(tmp_path, write_grid, nan_at(1), report_to=("list", "tensorboard"), tracker_project="dogs", max_steps=3)
    plain, board = runs
    assert (plain.project, plain.arguments, board.folder) == ("dogs", {}, str(tmp_path / "tensorboard"))
    log = read_log(tmp_path)
    expected = [(row.pop("step"), {name: value for name, value in row.items() if value is not None}) for row in log]
    assert plain.rows == board.rows == expected
    assert "loss" not in plain.rows[1][1], "it was NaN"
    assert plain.settings["max_steps"] == 3
    assert plain.settings["betas"] == "[0.9, 0.999]"
    assert all(isinstance(value, bool | int | float | str) for value in plain.settings.values())
    [(step, images, arguments)] = plain.images
    assert (step, images["samples"].shape, arguments) == (3, (1, 4, 6, 3), {})
    assert images["samples"][0, 0, 0].tolist() == [255, 0, 0]
    assert board.images[0][2] == {"dataformats": "NHWC"}
    assert not plain.is_open
    assert not board.is_open


def test_a_resumed_run_continues_the_run_of_the_tracker(runs, tmp_path):
    names = ("tensorboard", "wandb", "trackio")
    train(tmp_path, write_grid, max_steps=2, report_to=names)
    train(tmp_path, write_grid, max_steps=4, report_to=names, resume=True)
    board, wandb, trackio, resumed_board, resumed_wandb, resumed_trackio = runs
    assert (board.arguments, resumed_board.arguments) == ({}, {"purge_step": 3})
    assert wandb.arguments == resumed_wandb.arguments
    assert wandb.arguments["resume"] == trackio.arguments["resume"] == "allow"
    assert trackio.arguments == resumed_trackio.arguments
    assert [step for step, _ in wandb.rows + resumed_wandb.rows] == [1, 2, 3, 4]
    assert trackio.rows[-1] == (2, {"samples": ("image", (4, 6, 3))})
    train(tmp_path / "other", max_steps=1, report_to=("wandb",))
    assert runs[-1].arguments["id"] != wandb.arguments["id"]


def test_trackers_change_no_number_of_the_training(runs, tmp_path):
    without = train(tmp_path / "without")
    tracked = train(tmp_path / "tracked", write_grid, report_to=("list",), sample_minutes=0)
    assert len(runs[0].images) > 1
    assert all(torch.equal(a, b) for a, b in zip(without, tracked, strict=True))


def test_a_tracker_is_closed_after_an_error(runs, tmp_path):
    with pytest.raises(RuntimeError, match="in a row"):
        train(tmp_path, spoil=nan_at(*range(9)), max_steps=9, max_skipped_steps=2, report_to=("list",))
    assert not runs[0].is_open


def test_names_and_packages_are_checked(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="`report_to` must name trackers of Accelerate, got 'notebook'"):
        start(tmp_path, report_to=("notebook",))
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`report_to` 'wandb' needs a package .* `pip install wandb`"):
        parse_options([TrainingConfig], ["--report-to", "wandb"])
