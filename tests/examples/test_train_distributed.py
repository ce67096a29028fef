"""The training examples in two processes on a CPU (gloo), against one process that sees both halves of each batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from examples.train_dc_ae import DCAETrainingConfig, train
from tests.training.tiny import smooth_images, tiny_autoencoder


ROOT = Path(__file__).parents[2]
WEIGHTS = "model/diffusion_pytorch_model.safetensors"


def run(folder, process_index, num_processes):
    """Two steps on eight images each, of which this process sees its share."""

    def batches(start):
        for step in range(start, 2):
            yield {"pixel_values": smooth_images(8, 32, seed=step).chunk(num_processes)[process_index]}

    torch.manual_seed(0)
    config = DCAETrainingConfig(output_dir=str(folder), max_steps=2, log_every=1, phase=3, discriminator_channels=8)
    train(config, batches, tiny_autoencoder())


def test_two_processes_equal_one(tmp_path):
    run(tmp_path / "one", 0, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        environment |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, str(tmp_path / "two")]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    torch.manual_seed(0)
    start = tiny_autoencoder().state_dict()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-6)
    assert not torch.equal(one["decoder.conv_out.conv.weight"], start["decoder.conv_out.conv.weight"])
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 2  # only the main process writes
    for row, other in zip(*logs, strict=True):
        assert abs(json.loads(row)["loss"] - json.loads(other)["loss"]) < 1e-5


if __name__ == "__main__":
    state = PartialState(cpu=True)
    run(Path(sys.argv[1]), state.process_index, state.num_processes)
