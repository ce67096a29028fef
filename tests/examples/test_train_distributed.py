"""The training examples in two processes on a CPU (gloo), against one process that sees both halves of each batch."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from diffusers_sana import VilaUForConditionalGeneration
from diffusers_sana.training.data.chats import ChatCollator
from diffusers_sana.training.recipes import dc_ae, vila_u
from diffusers_sana.training.recipes.options import DCAETrainingConfig, VilaUTrainingConfig
from tests.models.vila_u.tiny import random_codes, tiny_config
from tests.models.vila_u.tiny_processor import tiny_processor
from tests.training.tiny import smooth_images, tiny_autoencoder
from tests.two_processes import run_in_two


def new_autoencoder():
    torch.manual_seed(0)
    return tiny_autoencoder()


def new_vila_u():
    torch.manual_seed(0)
    config = tiny_config()
    config.depth_config.dropout = 0.0  # random in each process
    return VilaUForConditionalGeneration(config)


def train_autoencoder(folder, process_index, num_processes):
    """Two steps on eight images each, of which this process sees its part."""

    def batches(start):
        for step in range(start, 2):
            yield {"pixel_values": smooth_images(8, 32, seed=step).chunk(num_processes)[process_index]}

    config = DCAETrainingConfig(output_dir=str(folder), max_steps=2, log_every=1, phase=3, discriminator_channels=8)
    dc_ae.train(config, batches, new_autoencoder())


def train_model(folder, process_index, num_processes):
    """Two steps on four chats each, of which the first process sees those that show images, the second the answers."""
    processor = tiny_processor()
    collate = ChatCollator(processor)

    def batches(start):
        for step in range(start, 2):
            codes = random_codes(4, seed=step)
            shown = [[{"type": "image", "image": image}] for image in codes]
            chats = [
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": shown[i]}]
                if i < 2
                else [{"role": "user", "content": shown[i]}, {"role": "assistant", "content": "cat"}]
                for i in range(4)
            ]
            share = len(chats) // num_processes
            yield collate(chats[process_index * share :][:share])

    config = VilaUTrainingConfig(output_dir=str(folder), max_steps=2, log_every=1, lr_schedule="constant")
    vila_u.train(config, batches, new_vila_u(), processor)


# What trains, how it starts, its file of weights, and one of them that must change.
CASES = {
    "train_dc_ae": (
        train_autoencoder,
        new_autoencoder,
        "model/diffusion_pytorch_model.safetensors",
        "decoder.conv_out.conv.weight",
    ),
    "train_vila_u": (train_model, new_vila_u, "model/model.safetensors", "depth_transformer.head.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path, case):
    train, new_model, weights, changed = CASES[case]
    train(tmp_path / "one", 0, 1)
    run_in_two(__file__, case, tmp_path / "two")
    one, two = (load_file(tmp_path / name / weights) for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-6), name
    assert not torch.equal(one[changed], new_model().state_dict()[changed])
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 2  # only the main process writes
    for row, other in zip(*logs, strict=True):
        assert abs(json.loads(row)["loss"] - json.loads(other)["loss"]) < 1e-5


if __name__ == "__main__":
    state = PartialState(cpu=True)
    CASES[sys.argv[1]][0](Path(sys.argv[2]), state.process_index, state.num_processes)
