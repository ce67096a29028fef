"""Every training script, stopped and resumed by its command line, against the same run without interruption."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana.training.data.captions import Caption, caption_line
from tests.examples.test_train_dc_ae_dit import write_classes
from tests.examples.test_train_vila_u import chat_folder, trainable
from tests.examples.test_train_vila_u_tower import tiny_tower
from tests.models.vila_u.tiny_processor import tiny_processor, tiny_tokenizer
from tests.training.data.test_videos import write_animation
from tests.training.tiny import tiny_autoencoder, tiny_pipeline, write_image_folder


ROOT = Path(__file__).parents[2]
CAPTIONED = {"resolution": 32, "max_sequence_length": 32}
# Of each script what it needs besides a folder of data and, but for the first ones, a folder to start from.
SETTINGS = {
    "dc_ae": {"resolution": 16, "latent_prefix_step": 2, "scaling_batches": 1, "perceptual_crop": 8},
    "dc_ae phase 3": {"resolution": 32, "phase": 3, "discriminator_channels": 8, "perceptual_weight": 0},
    "vila_u_tower": {"train_text_tower": True},
    "vila_u": {"caption_dropout": 0.5, "cell_dropout": 0.5},
    "dc_ae_dit": {"resolution": 16, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8},
    "sana": {**CAPTIONED, "sample_steps": 1, "caption_dropout": 0.5},
    "sana_video": {**CAPTIONED, "sample_steps": 1, "frames": 3, "fps": 0, "caption_dropout": 0.5, "causal": True},
    "sana_lora": {**CAPTIONED, "sample_steps": 1, "lora_dropout": 0.5, "instance_prompt": "a red cat"},
    "sana_controlnet": {**CAPTIONED, "sample_steps": 1, "num_layers": 1, "caption_dropout": 0.5},
    "sana_sprint": CAPTIONED,
    "sana_nft": {
        **{"max_sequence_length": 32, "resolution": 16, "group_size": 4, "kept_per_group": 2, "rollout_steps": 2},
        **{"sample_steps": 1, "rollout_quantize": "int4", "quantize_rank": 2, "rank": 2, "chunk_size": 5},
        **{"lora_dropout": 0.5, "old_decay_rate": 0.2, "reward": "tests.training.tiny:redness"},
    },
    "sana_dpo": {
        **{"max_sequence_length": 32, "resolution": 32, "group_size": 3, "rollout_steps": 1, "rank": 2},
        **{"sample_steps": 1, "lora_dropout": 0.5, "sft_weight": 0.1, "reward": "tests.training.tiny:redness"},
    },
}


def command_line(folder, case):
    """Data and models for a script at tiny size, and the arguments that name them."""
    data, start = folder / "data", folder / "start"
    settings = {"data": data, "batch_size": 2, "ema_decay": 0.5, "gradient_accumulation_steps": 2, "warmup_steps": 0}
    settings |= {"learning_rate": 1e-3, "lr_schedule": "constant", "log_every": 2, **SETTINGS[case]}
    torch.manual_seed(0)
    if case == "vila_u":
        chat_folder(data)
        trainable().save_pretrained(start)
        tiny_processor().save_pretrained(start)
        settings["pretrained"] = start
    elif case == "dc_ae_dit":
        write_classes(data)
        tiny_autoencoder().save_pretrained(start)
        settings["vae"] = start
    elif case in ("sana_nft", "sana_dpo"):
        del settings["data"]
        tiny_pipeline().save_pretrained(start)
        (folder / "prompts.txt").write_text("a red cat\ntwo dogs\na green house\n")
        settings |= {"pretrained": start, "prompts": folder / "prompts.txt"}
    else:
        write_image_folder(data, [(40, 40), (40, 40), (40, 90), (40, 40), (40, 40)])
        if case == "sana_video":
            write_animation(data / "4.png", 5, size=(40, 40))
        if case.startswith("dc_ae"):
            tiny_autoencoder().save_pretrained(start)
            settings["pretrained"] = start
        elif case == "vila_u_tower":
            start.mkdir()
            tiny_tower().config.to_json_file(start / "config.json")
            tiny_tokenizer().save_pretrained(start)
            settings |= {"model_config": start / "config.json", "tokenizer": start}
        else:
            tiny_pipeline().save_pretrained(start)
            settings["pretrained"] = start
        if case == "sana":
            captions = [Caption(model, text, 30.0) for model, text in (("a", "a red cat"), ("b", "two dogs"))]
            (data / "captions.jsonl").write_text("".join(caption_line(f"{i}.png", captions) for i in range(5)))
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


def last_checkpoint(folder):
    """The files of the newest checkpoint, those of the model beside it, and where the run is."""
    checkpoint = sorted((folder / "checkpoints").glob("step_*"))[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    files = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    for path in (folder / "model").rglob("*.safetensors"):  # whose metadata may be in any order
        files |= {f"{path.parent.name}/{name}": value.numpy().tobytes() for name, value in load_file(path).items()}
    return files, {name: state[name] for name in ("step", "batches_used", "num_processes", "data")}


def assert_same(whole, parts):
    (expected, at), (found, also_at) = last_checkpoint(whole), last_checkpoint(parts)
    assert at == also_at
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    assert {f"{name}.safetensors" for name in ("model", "optimizer", "ema", "random_0")} < expected.keys()


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize("case", SETTINGS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, case):
    """Stopped inside an epoch; with sample grids, other workers and other random numbers in the process between."""
    main = importlib.import_module(f"examples.train_{case.split()[0]}").main
    arguments = command_line(tmp_path, case)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*arguments, "--num_workers=0", "--max_steps=4", f"--output_dir={whole}", "--sample_minutes=1e9"])
    in_parts = [*arguments, f"--output_dir={parts}", "--sample_minutes=0"]
    main([*in_parts, "--num_workers=1", "--max_steps=2"])
    torch.manual_seed(99)
    main([*in_parts, "--num_workers=0", "--max_steps=4", "--resume"])
    assert_same(whole, parts)
    assert losses(whole) == losses(parts)


def test_a_killed_process_is_taken_up_again(tmp_path):
    """SIGTERM to the script as a scheduler sends it; then as many steps more as an uninterrupted run has."""
    arguments = [*command_line(tmp_path, "dc_ae"), "--log_every=1", "--num_workers=1"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "examples.train_dc_ae", *arguments, f"--output_dir={parts}"]
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(command, env=environment, stderr=stderr, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (parts / "log.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "stderr").read_text()
    finally:
        process.kill()
    stopped_at = losses(parts)[-1][0]
    main = importlib.import_module("examples.train_dc_ae").main
    steps = f"--max_steps={stopped_at + 2}"
    main([*arguments, f"--output_dir={parts}", steps, "--resume"])
    main([*arguments, f"--output_dir={whole}", steps])
    assert_same(whole, parts)
    assert losses(whole) == losses(parts)
