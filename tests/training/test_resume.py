"""What a run survives: NaN, torn files, full disks, second processes, other settings, and what it refuses to read."""

import json
import os
import pickle
import random
import signal
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import nn
from torch.utils.data import Dataset

from diffusers_sana.arguments import run_script
from diffusers_sana.training import loop as loop_module
from diffusers_sana.training.config import RunError, TrainingConfig
from diffusers_sana.training.data.batches import make_loader
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.recipes.options import (
    DCAEDataOptions,
    DCAEModelOptions,
    DCAETrainingConfig,
    SanaDataOptions,
    SanaModelOptions,
    SanaTrainingConfig,
    VilaUDataOptions,
    VilaUModelOptions,
    VilaUTrainingConfig,
)
from diffusers_sana.training.run_folder import checkpoints
from diffusers_sana.training.state_files import read_state, write_state
from tests.training.test_loop import numbered, read_log


def start(folder, save=None, spoil=lambda number, loss: loss, make_optimizer=None, scaler=None, **settings):
    """A loop around two numbers and their norm, and a function that runs it and returns the numbers of its batches."""
    config = TrainingConfig(output_dir=str(folder), **{"log_every": 1, "max_steps": 4} | settings)
    accelerator = Accelerator(gradient_accumulation_steps=config.gradient_accumulation_steps)
    accelerator.scaler = scaler
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    optimizer = (make_optimizer or (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)))(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)

    def save_weights(path):
        path.mkdir(exist_ok=True)
        torch.save(accelerator.unwrap_model(model).state_dict(), path / "weights.pt")

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save or save_weights, sample=lambda path: None)

    def run(batches=numbered):
        seen = []
        for batch in loop.run(batches):
            seen.append(batch["number"])
            with accelerator.accumulate(model):
                loss = spoil(
                    batch["number"], model(torch.randn(4, 2)).square().mean() + model[0].weight.square().sum()
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients and scaler is None:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            loop.report(images=4, loss=loss)
        return seen

    return loop, model, run


def checkpoint_of_a_run(folder, **settings):
    """The only checkpoint of a run from `start`."""
    _, _, run = start(folder, **settings)
    run()
    [checkpoint] = checkpoints(folder)
    return checkpoint


def nan_at(*numbers):
    return lambda number, loss: loss * float("nan") if number in numbers else loss


def weights(folder):
    return torch.load(folder / "model" / "weights.pt")


def strictly(line):
    """JSON without the NaN and Infinity that Python's reader also takes."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_loss_of_nan_changes_nothing(tmp_path):
    loop, model, run = start(tmp_path, spoil=nan_at(1, 2), ema_decay=0.5, max_steps=3)
    run()
    expected, _, run = start(tmp_path / "short", ema_decay=0.5, max_steps=1)
    run()
    assert torch.equal(model[0].weight, expected._modules[0][0].weight)
    assert all(torch.equal(a, b) for a, b in zip(loop._ema.shadow_params, expected._ema.shadow_params, strict=True))
    assert {moments["step"].item() for moments in loop.optimizers[0].state_dict()["state"].values()} == {1}
    rows = [strictly(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True, True]
    assert [row.get("skipped_steps") for row in rows] == [None, 1, 1]


def test_a_window_with_nan_has_the_mean_of_the_rest(tmp_path):
    _, _, run = start(tmp_path, spoil=lambda number, loss: loss * 0 + 5 if number else loss * torch.inf, log_every=4)
    run()
    [row] = read_log(tmp_path)
    assert (row["loss"], row["skipped_steps"]) == (5, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_of_gradients_finds_its_scale_without_help(tmp_path, fused):
    """A skipped step of fp16 also lowers the scale, so that the next one is made."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    loop, model, run = start(
        tmp_path,
        scaler=scaler,
        spoil=lambda number, loss: loss * 1024,  # infinite once it is scaled
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=fused),
        max_steps=16,
        ema_decay=0.5,
    )
    before = model[0].weight.clone()
    run()
    skipped = sum(row.get("skipped_steps", 0) for row in read_log(tmp_path))
    assert 0 < skipped < 16
    assert scaler.get_scale() == 2.0 ** (126 - skipped)
    assert model[0].weight.isfinite().all()
    assert not torch.equal(before, model[0].weight)
    assert loop._ema.optimization_step == 16 - skipped
    resumed = torch.amp.GradScaler("cpu")
    start(tmp_path, scaler=resumed, resume=True, ema_decay=0.5)
    assert resumed.state_dict() == scaler.state_dict()


def test_too_many_losses_of_nan_end_the_run(tmp_path):
    _, _, run = start(tmp_path, max_steps=2)
    run()
    sound = weights(tmp_path)
    _, _, run = start(tmp_path, spoil=nan_at(*range(2, 99)), max_steps=99, max_skipped_steps=3, resume=True)
    with pytest.raises(RuntimeError, match=r"3 steps in a row, up to step 5, .*step_0000002, is sound"):
        run()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000002"]
    assert all(torch.equal(value, sound[name]) for name, value in weights(tmp_path).items())
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]


def test_buffers_of_nan_are_not_saved(tmp_path):
    """A batch norm's averages change in the forward pass, where no optimizer can skip."""
    _, _, run = start(tmp_path, max_steps=2)
    run()
    sound = weights(tmp_path)
    _, model, run = start(tmp_path, max_steps=3, resume=True)
    model[1].running_mean.fill_(torch.inf)
    with pytest.raises(RuntimeError, match=r"1\.running_mean is NaN or infinite at step 3, .*step_0000002, is sound"):
        run()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000002"]
    assert all(torch.equal(value, sound[name]) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("kept", [1, 3])
def test_so_many_checkpoints_are_kept(tmp_path, kept):
    _, _, run = start(tmp_path, keep_checkpoints=kept, save_minutes=0, max_steps=11)
    run()
    steps = [f"step_{step:07d}" for step in range(1, 12)]
    assert [path.name for path in checkpoints(tmp_path)] == steps[-kept:]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("step_10000000", "step_9999999", "step_0000001.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_9999999", "step_10000000"]


@pytest.mark.parametrize("rest", ['{"step": 3, "minu', "\0\0\0\0", ""])
def test_a_torn_line_of_the_log_is_dropped(tmp_path, rest):
    _, _, run = start(tmp_path, max_steps=2)
    run()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(rest)
    _, _, run = start(tmp_path, resume=True)
    run()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_log_is_named(tmp_path):
    _, _, run = start(tmp_path, max_steps=1)
    run()
    (tmp_path / "log.jsonl").write_text('torn\n{"step": 1}\n')
    _, _, run = start(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"log\.jsonl', line 1: not valid JSON"):
        run()


def test_the_last_steps_are_logged(tmp_path):
    _, _, run = start(tmp_path, max_steps=5, log_every=3)
    run()
    assert [row["step"] for row in read_log(tmp_path)] == [3, 5]
    _, _, run = start(tmp_path / "short", max_steps=2, log_every=100)
    run()
    assert [row["step"] for row in read_log(tmp_path / "short")] == [2]
    assert (tmp_path / "short" / "loss.png").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_is_obeyed_at_once(tmp_path, interruptible):
    loop, _, _ = start(tmp_path, max_steps=9)
    before = signal.getsignal(signal.SIGINT)
    steps = loop.run(numbered)
    next(steps)
    os.kill(os.getpid(), signal.SIGINT)
    assert loop._stop_requested
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    steps.close()
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path) == []


# Settings


def test_averages_begin_with_the_weights_where_the_run_had_none(tmp_path):
    _, model, run = start(tmp_path, max_steps=2)
    run()
    loop, model, run = start(tmp_path, resume=True, ema_decay=0.9)
    assert torch.equal(loop._ema.shadow_params[0], model[0].weight)
    run()
    assert not torch.equal(weights(tmp_path)["0.weight"], model[0].weight)


def test_another_decay_holds_from_the_resume_on(tmp_path):
    _, _, run = start(tmp_path, max_steps=2, ema_decay=0.5)
    run()
    loop, _, run = start(tmp_path, resume=True, ema_decay=0.99)
    assert (loop._ema.decay, loop._ema.optimization_step) == (0.99, 2)
    run()
    loop, model, run = start(tmp_path, resume=True, max_steps=5)
    run()
    assert torch.equal(weights(tmp_path)["0.weight"], model[0].weight)


def test_changed_settings_are_told_and_hold(tmp_path, caplog):
    def adamw(rate, betas, decay):
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)

    _, _, run = start(tmp_path, max_steps=2, learning_rate=0.1, make_optimizer=adamw(0.1, (0.9, 0.99), 0.1))
    run()
    loop, _, run = start(
        tmp_path, resume=True, learning_rate=0.2, make_optimizer=adamw(0.2, (0.8, 0.95), 0.0), max_steps=3
    )
    assert "with other settings: `max_steps`: 2 there, 3 now; `learning_rate`: 0.1 there, 0.2 now" in caplog.text
    run()
    [group] = loop.optimizers[0].param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.8, 0.95), 0.0)
    assert {moments["step"].item() for moments in loop.optimizers[0].state_dict()["state"].values()} == {3}


def test_settings_that_a_run_stands_on_are_refused_by_name(tmp_path):
    _, _, run = start(tmp_path, max_steps=1)
    run()
    with pytest.raises(ValueError, match=r"`seed`: 0 there, 7 now\. Use the old values, or begin a new run"):
        start(tmp_path, resume=True, seed=7)


def test_every_option_of_the_scripts_says_whether_it_may_change():
    """What a script may not change is what its model, its start or the order of its data is made of."""
    groups = {
        "dc_ae": (DCAETrainingConfig, DCAEDataOptions, DCAEModelOptions),
        "sana": (SanaTrainingConfig, SanaDataOptions, SanaModelOptions),
        "vila_u": (VilaUTrainingConfig, VilaUDataOptions, VilaUModelOptions),
    }
    fixed = {
        recipe: {item.name for group in of_recipe for item in fields(group) if not item.metadata["changeable"]}
        for recipe, of_recipe in groups.items()
    }
    assert fixed["dc_ae"] >= {"seed", "batch_size", "resolution", "phase", "pretrained"}
    assert fixed["sana"] >= {"seed", "batch_size", "optimizer", "train_text_encoder"}
    for names in fixed.values():
        assert not names & {"max_steps", "max_minutes", "num_workers", "save_minutes", "learning_rate", "ema_decay"}


class Numbers(Dataset):
    """So many items of one size, each with a random number beside its own."""

    def __init__(self, count):
        self.sizes_of_items = [(1, 1)] * count

    def __getitem__(self, index):
        return {"number": index, "random": torch.rand(())}


def test_other_data_are_refused(tmp_path):
    _, _, run = start(tmp_path, max_steps=2)
    run(make_loader(Numbers(6), 2, 0, 0))
    _, _, run = start(tmp_path, resume=True)
    with pytest.raises(ValueError, match="the data are not those that the run began with: `items`: 6 there, 7 now"):
        run(make_loader(Numbers(7), 2, 0, 0))
    renamed = Numbers(6)
    renamed.names = list("abcdef")
    with pytest.raises(ValueError, match="the data are not those that the run began with: `names`"):
        run(make_loader(renamed, 2, 0, 0))
    assert len(run(make_loader(Numbers(6), 2, 0, 0))) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_have_random_numbers_of_their_own(num_workers):
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    loader = make_loader(Numbers(5), 2, 0, num_workers)
    whole = list(islice(iter(loader(0)), 7))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(6)
    rest = list(islice(iter(make_loader(Numbers(5), 2, 0, 0)(3)), 4))
    assert [batch["number"] for batch in rest] == [batch["number"] for batch in whole[3:]]
    assert all(torch.equal(a["random"], b["random"]) for a, b in zip(rest, whole[3:], strict=True))
    values = [value.item() for batch in whole for value in batch["random"]]
    assert len(set(values)) == len(values) > 10


# Files


class Bomb:
    """Executed by whoever reads it as a pickle."""

    def __init__(self, fuse):
        self.fuse = fuse

    def __reduce__(self):
        return open, (str(self.fuse), "w")


PICKLES = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "sampler.bin")
PICKLES += ("ema_0.pt", "scaler.pt", "pytorch_model.bin", "pytorch_model_fsdp.bin")
OWN = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "random_0.safetensors", "state.json")


@pytest.mark.parametrize("name", [*PICKLES, *OWN])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, name):
    folder = checkpoint_of_a_run(tmp_path, max_steps=2, ema_decay=0.5)
    assert {path.name for path in folder.iterdir()} == set(OWN)
    for protocol in ("pickle", "torch"):
        fuse = tmp_path / f"executed-{protocol}"
        if protocol == "pickle":
            (folder / name).write_bytes(pickle.dumps(Bomb(fuse)))
        else:
            torch.save(Bomb(fuse), folder / name)
        if name in OWN:
            with pytest.raises(ValueError, match=name):
                start(tmp_path, max_steps=2, ema_decay=0.5, resume=True)[2]()
        else:
            start(tmp_path, max_steps=2, ema_decay=0.5, resume=True)[2]()
        assert not fuse.exists()


def test_checkpoints_of_older_versions_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "step_0000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"older version, as pickles.*Begin a new run"):
        start(tmp_path, resume=True)


def test_a_missing_or_cut_file_is_an_error_that_names_it(tmp_path):
    folder = checkpoint_of_a_run(tmp_path, max_steps=2)
    (folder / "random_0.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"random_0\.safetensors' cannot be read"):
        start(tmp_path, resume=True)
    (folder / "elsewhere").rename(folder / "random_0.safetensors")
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"optimizer\.safetensors' cannot be read"):
        start(tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = checkpoint_of_a_run(tmp_path, max_steps=1)
    state = read_state(folder / "model.safetensors")
    write_state(state | {"0.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a checkpoint of this model: 1 tensors .* '0\.weight' first"):
        start(tmp_path, resume=True)


def test_states_survive_a_file(tmp_path):
    shared = torch.arange(4.0)
    whole = torch.arange(12.0).view(3, 4)
    state = {
        0: {"step": torch.tensor(3.0), "codes": torch.tensor([1, 255], dtype=torch.uint8), "empty": torch.zeros(0)},
        "views": [whole[:, 1:3], whole[0], whole.T, torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)],
        "shared": (shared, shared),
        "plain": [None, True, -1, 2**80, 0.1, float("inf"), "text", (), {}],
    }
    write_state(state, tmp_path / "state.safetensors")
    found = read_state(tmp_path / "state.safetensors")
    assert found["plain"] == state["plain"]
    assert found["shared"][0] is found["shared"][1]
    assert list(found) == list(state)
    for name in ("views", "shared"):
        assert type(found[name]) is type(state[name])
        assert all(torch.equal(a, b) for a, b in zip(found[name], state[name], strict=True))
    assert all(torch.equal(found[0][name], value) for name, value in state[0].items())
    assert found[0]["codes"].dtype == torch.uint8
    with pytest.raises(TypeError, match="cannot hold a set, found under 'a/1'"):
        write_state({"a": [0, set()]}, tmp_path / "set.safetensors")


def test_tied_weights_are_in_the_checkpoint_once(tmp_path):
    _, model, run = start(tmp_path, max_steps=2)
    model.add_module("2", nn.Linear(2, 2, bias=False))
    model[2].weight = model[0].weight
    run()
    [folder] = checkpoints(tmp_path)
    found = read_state(folder / "model.safetensors")
    assert found["2.weight"] is found["0.weight"]


def test_a_second_process_is_refused(tmp_path):
    _, _, run = start(tmp_path, max_steps=1)
    run()
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.suffix)
    _, _, run = start(tmp_path, resume=True)
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="Another process trains into"):
        run()
    assert before == sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.suffix)
    run()


def test_a_run_that_another_has_overtaken_is_refused(tmp_path):
    _, _, run = start(tmp_path, max_steps=1)
    run()
    _, _, late = start(tmp_path, resume=True)
    _, _, run = start(tmp_path, resume=True, max_steps=2)
    run()
    with pytest.raises(RunError, match=r"Another process has written .*step_0000002"):
        late()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    _, _, run = start(tmp_path, max_steps=2)
    run()
    sound = weights(tmp_path)
    real = loop_module.write_state

    def write(state, path):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(loop_module, "write_state", write)
    _, _, run = start(tmp_path, resume=True)
    with pytest.raises(OSError, match=r"step_0000004 could not be written: .*No space left.*step_0000002, is sound"):
        run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000002"]
    assert not (tmp_path / "model.tmp").exists()
    assert all(torch.equal(value, sound[name]) for name, value in weights(tmp_path).items())
    monkeypatch.undo()
    loop, _, run = start(tmp_path, resume=True)
    assert loop.step == 2
    run()


def test_a_model_that_a_kill_left_under_its_old_name_is_put_back(tmp_path):
    _, _, run = start(tmp_path, max_steps=1)
    run()
    (tmp_path / "model").rename(tmp_path / "model.old")
    loop, _, _ = start(tmp_path, resume=True)
    next(loop.run(numbered))
    assert (tmp_path / "model" / "weights.pt").exists()


@pytest.mark.parametrize("kind", [ValueError, OSError, RunError])
def test_a_script_ends_with_one_line(monkeypatch, kind):
    def main():
        raise kind("what to do")

    monkeypatch.setattr("sys.argv", ["examples/train_sana.py"])
    with pytest.raises(SystemExit, match=r"^train_sana\.py: what to do$"):
        run_script(main)
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        run_script(lambda: 1 / 0)


def test_the_folder_is_looked_at_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`resume` needs a checkpoint"):
        make_accelerator(TrainingConfig(output_dir=str(tmp_path), resume=True))
    _, _, run = start(tmp_path, max_steps=1)
    run()
    with pytest.raises(ValueError, match="`output_dir` must be new"):
        make_accelerator(TrainingConfig(output_dir=str(tmp_path)))


def test_sampling_and_saving_leave_random_numbers_alone(tmp_path):
    def save(path):
        path.mkdir(exist_ok=True)
        torch.rand(3)

    results = []
    for minutes in (0, 1e9):
        loop, model, run = start(tmp_path / str(minutes), save=save, save_minutes=minutes, sample_minutes=minutes)
        loop.sample = lambda path: torch.rand(3)
        run()
        results.append(model[0].weight)
    assert torch.equal(*results)
