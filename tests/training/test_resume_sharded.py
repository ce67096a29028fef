"""The loop in two processes under FSDP: checkpoints of whole tensors, and what all processes must decide alike."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from diffusers_sana.training.config import TrainingConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.run_folder import checkpoints
from diffusers_sana.training.state_files import read_state
from tests.two_processes import join, run_in_two


SETTINGS = {"log_every": 1, "ema_decay": 0.5}


def numbered(start):
    """What a process sees is its own number after that of the batch."""
    rank = int(os.environ.get("RANK", "0"))
    while True:
        yield {"number": start + rank}
        start += int(os.environ.get("WORLD_SIZE", "1"))


def train(folder, nan_at=(), **settings):
    """Trains a small network; returns the loop, the model and the numbers of the batches that this process saw."""
    config = TrainingConfig(output_dir=str(folder), **SETTINGS | settings)
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows do not divide by 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)

    def save(path):
        accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            path.mkdir()

    loop, seen = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=lambda path: None), []
    for batch in loop.run(numbered):
        seen.append(batch["number"])
        loss = model(torch.randn(4, 3) + batch["number"]).square().mean()
        accelerator.backward(loss * float("nan") if batch["number"] in nan_at else loss)
        optimizer.step()
        optimizer.zero_grad()
        # Each process has a term that the other lacks.
        loop.report(images=4, loss=loss, **{f"only_{accelerator.process_index}": loss.detach() * 0 + 7})
    return loop, model, seen


def test_two_processes(tmp_path):
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    fsdp |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "1", "ACCELERATE_USE_CPU": "true"}
    before = dict(os.environ)
    os.environ |= fsdp
    try:
        # If each process took the order of terms from its own set, the orders would differ.
        printed = run_in_two(__file__, tmp_path, fresh=True)
    finally:
        os.environ.clear()
        os.environ |= before
    assert [json.loads(line.splitlines()[-1]) for line in printed] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    whole, parts = (checkpoints(tmp_path / name)[-1] for name in ("whole", "parts"))
    names = {"model.safetensors", "optimizer.safetensors", "ema.safetensors"}
    assert {path.name for path in whole.iterdir()} == names | {
        "random_0.safetensors",
        "random_1.safetensors",
        "state.json",
    }
    for name in names | {"random_0.safetensors", "random_1.safetensors"}:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["only_0"], row["only_1"]) for row in rows] == [(step, 7, 7) for step in (1, 2, 3, 4)]
    # NaN in one process: the other skips the step, too.
    rows = [json.loads(line) for line in (tmp_path / "nan" / "log.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps") for row in rows] == [None, 1, None]
    state = read_state(checkpoints(tmp_path / "nan")[-1] / "optimizer.safetensors")["state"]
    assert {moments["step"].item() for moments in state.values()} == {2}
    # One process goes on where two were: with the batch after theirs.
    stored = read_state(whole / "model.safetensors")
    loop, model, seen = train(tmp_path / "whole", resume=True, max_steps=6)
    assert seen == [8, 9]
    assert stored["0.weight"].shape == model[0].weight.shape == (5, 3)
    assert loop._ema.optimization_step == 6


if __name__ == "__main__":
    join()
    out = Path(sys.argv[1])
    _, _, seen = train(out / "whole", max_steps=4)
    train(out / "parts", max_steps=2)
    torch.manual_seed(99)
    _, _, rest = train(out / "parts", max_steps=4, resume=True)
    assert rest == seen[2:]
    train(out / "nan", max_steps=3, nan_at=(2,))
    sys.stdout.write(json.dumps(seen) + "\n")
