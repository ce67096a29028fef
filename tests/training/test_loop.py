"""Configs, schedules, and the loop's stopping, saving and refusing."""

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from diffusers_sana.training.config import TrainingConfig, parse_options
from diffusers_sana.training.data.batches import iterate_batches
from diffusers_sana.training.loop import TrainingLoop, budget_used, learning_rate_factor
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.run_folder import checkpoints


def make_loop(config, save=lambda folder: folder.mkdir(), sample=lambda path: None, weight=0.0):
    """A loop around one number, and a function that runs it with gradients of one."""
    accelerator = Accelerator(gradient_accumulation_steps=config.gradient_accumulation_steps)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample)

    def run(batches):
        for batch in loop.run(batches):
            with accelerator.accumulate(model):
                loss = -model.weight.sum()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            loop.report(images=2, loss=loss)
            yield batch

    return loop, model, run


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbered(start):
    while True:
        yield {"number": start}
        start += 1


def test_parse_options_reads_every_kind_of_option():
    argv = ["--max_minutes", "2.5", "--betas", "0.5", "0.9", "--compile", "--max_steps", "7"]
    [config] = parse_options([TrainingConfig], argv)
    assert (config.max_minutes, config.betas, config.compile, config.max_steps) == (2.5, (0.5, 0.9), True, 7)
    assert parse_options([TrainingConfig], []) == [TrainingConfig()]


def test_config_refuses_bad_values():
    with pytest.raises(ValueError, match="`lr_schedule` must be one of"):
        TrainingConfig(lr_schedule="linear")
    with pytest.raises(ValueError, match="`ema_decay` must be in"):
        TrainingConfig(ema_decay=1.0)
    with pytest.raises(ValueError, match="`max_steps` must be at least 1"):
        TrainingConfig(max_steps=0)


def test_the_learning_rate_follows_the_budget_used_most():
    assert budget_used(5, minutes=1, max_steps=10, max_minutes=None) == 0.5
    assert budget_used(5, minutes=8, max_steps=10, max_minutes=10) == 0.8
    assert learning_rate_factor(100, 0.5, "cosine", 0) == pytest.approx(0.5)
    assert learning_rate_factor(100, 1.2, "cosine", 0) == pytest.approx(0)
    assert learning_rate_factor(100, 0.9, "constant", 0) == 1
    assert [learning_rate_factor(step, 0, "constant", 4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_run_sets_the_rate_logs_and_saves(tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path), max_steps=4, lr_schedule="cosine", log_every=2)
    _, model, run = make_loop(config)
    assert [batch["number"] for batch in run(numbered)] == [0, 1, 2, 3]
    rates = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) for step in range(4)]
    assert model.weight.item() == pytest.approx(sum(rates))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["loss"] == pytest.approx(-rates[0] / 2)  # mean of 0 and the first step
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000004"]
    assert (tmp_path / "model").is_dir()
    assert (tmp_path / "loss.png").exists()


def test_run_counts_optimizer_steps_when_accumulating(tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path), max_steps=2, gradient_accumulation_steps=3)
    loop, _, run = make_loop(config)
    assert [batch["number"] for batch in run(numbered)] == list(range(6))
    assert (loop.step, loop.batches_used) == (2, 6)


def test_run_ends_with_the_clock(tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path), max_minutes=1e-9)
    loop, _, run = make_loop(config)
    list(run(numbered))
    assert loop.step == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, number):
    loop, _, run = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=100))
    before = signal.getsignal(number)
    for batch in run(numbered):
        if batch["number"] == 2:
            os.kill(os.getpid(), number)
    assert loop.step == 3
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000003"]
    assert signal.getsignal(number) is before

    _, model, run = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=5, resume=True))
    assert model.weight.item() == 3
    assert [batch["number"] for batch in run(numbered)] == [3, 4]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000003", "step_0000005"]


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path):
    def die(folder):
        raise KeyboardInterrupt

    _, _, run = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=2, log_every=1))
    list(run(numbered))
    _, _, run = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=4, log_every=1, resume=True), save=die)
    with pytest.raises(KeyboardInterrupt):
        list(run(numbered))
    loop, model, run = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=5, log_every=1, resume=True))
    assert loop.step == model.weight.item() == 2
    next(run(numbered))
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]  # what the lost steps logged is gone


def test_averaged_weights_are_saved_and_put_back(tmp_path):
    saved = []

    def save(folder):
        folder.mkdir()
        saved.append(model.weight.item())

    config = TrainingConfig(output_dir=str(tmp_path), max_steps=3, ema_decay=0.5)
    _, model, run = make_loop(config, save=save)
    list(run(numbered))
    # diffusers' decay starts at (1 + n) / (10 + n) for the n-th step, and grows up to 0.5
    averaged = 1.0
    for step, weight in ((1, 2.0), (2, 3.0)):
        decay = min(0.5, (1 + step) / (10 + step))
        averaged = decay * averaged + (1 - decay) * weight
    assert saved == [pytest.approx(averaged, abs=1e-6)]
    assert model.weight.item() == 3
    resumed, model, _ = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=3, ema_decay=0.5, resume=True))
    with resumed.ema_weights():
        assert model.weight.item() == saved[0]


def test_a_used_folder_is_not_mixed_with_a_new_run(tmp_path):
    _, _, run = make_loop(TrainingConfig(output_dir=str(tmp_path), max_steps=1))
    list(run(numbered))
    with pytest.raises(ValueError, match="`output_dir` must be new"):
        make_loop(TrainingConfig(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="`resume` needs a checkpoint"):
        make_loop(TrainingConfig(output_dir=str(tmp_path / "other"), resume=True))


def test_iterate_batches_begins_anew():
    stream = iterate_batches([{"a": 1}, {"a": 2}], 0)
    assert [next(stream)["a"] for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="`batches` must yield batches"):
        next(iterate_batches([], 0))


def test_save_image_grid_fills_rows_first(tmp_path):
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    save_image_grid(images, tmp_path / "new" / "grid.png", columns=2)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.size == (4, 4)
        assert [grid.getpixel(at)[0] for at in ((0, 0), (2, 0), (0, 2), (2, 2))] == [0, 128, 255, 255]
