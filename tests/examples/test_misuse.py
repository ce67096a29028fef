"""Errors of misuse of the training scripts: one line that names the option, before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# Run in a separate process, which has imported nothing: the outcome and the CPU seconds of each command line.
RUNNER = """
import contextlib, io, json, runpy, sys, time
outcomes = []
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    start, printed = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(f"examples/{script}.py", run_name="__main__")
        except SystemExit as end:
            printed.write(str(end))
    outcomes.append((printed.getvalue(), time.process_time() - start))
heavy = sorted({"torch", "diffusers", "transformers", "accelerate", "peft", "PIL", "numpy"} & sys.modules.keys())
print(json.dumps({"outcomes": outcomes, "heavy": heavy}))
"""
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("train_*.py"))
POST_TRAINING = ("train_sana_dpo", "train_sana_nft")


def run(cases):
    """What each command line prints and how many CPU seconds it takes; and the heavy modules that were imported."""
    command = [sys.executable, "-c", RUNNER, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    return report["outcomes"], report["heavy"]


@pytest.fixture
def place(tmp_path):
    """A folder of data, and one that holds a run."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_text("")
    (tmp_path / "run" / "checkpoints" / "step_0000001").mkdir(parents=True)
    return tmp_path


def test_misuse_is_reported_before_anything_heavy_is_imported(place):
    data, there = ["--data", str(place / "data")], ["--pretrained", str(place)]
    prompts = ["--prompts", str(place / "data" / "chats.jsonl")]
    new, used = ["--output-dir", str(place / "new")], ["--output-dir", str(place / "run")]
    cases = {
        **{(script,): "`data` must be a folder" for script in SCRIPTS if script not in POST_TRAINING},
        ("train_sana_nft",): "`prompts` must be a file of prompts",
        ("train_sana_dpo",): "exactly one of `pairs` and `prompts` must be given, got none",
        ("train_sana_dpo", "--pairs", "none.jsonl"): "`pairs` must be a file, but there is no file 'none.jsonl'",
        ("train_sana_dpo", *prompts, *there, "--group-size", "1"): "`group_size` must be at least 2",
        ("train_sana_dpo", *prompts, *there, "--dpo-beta", "0"): "`dpo_beta` must be above 0",
        ("train_sana_nft", *prompts): "`pretrained` must be a SanaPipeline folder",
        ("train_sana_nft", *prompts, *there, "--reward", "beauty"): "`reward` must be of ['clip',",
        ("train_sana_nft", *prompts, *there, "--kept-per-group", "3"): "`kept_per_group` must be even",
        ("train_sana_nft", *prompts, *there, "--group-size", "1"): "`group_size` must be at least 2",
        **{(script, "--lerning-rate", "1"): "unrecognized arguments: --lerning-rate" for script in SCRIPTS},
        **{(script, "--max-steps", "0"): "`max_steps` must be at least 1" for script in SCRIPTS},
        **{(script, "--max-steps", "many"): "argument --max-steps: invalid int value: 'many'" for script in SCRIPTS},
        **{(script, "--help"): "--output-dir" for script in SCRIPTS},
        ("train_sana", *data): "`pretrained` must be a SanaPipeline folder or repository, got ''",
        ("train_sana", "--data", "/no/such/folder", *there): "`data` is '/no/such/folder', but there is no such",
        ("train_sana", *data, "--pretrained", "./nothing"): "`pretrained` is './nothing', but there is no such",
        ("train_sana", *data, *there, "--transformer-config", "none.json"): "`transformer_config` must be a file",
        ("train_sana", *data, *there, "--optimizer", "sgd"): "`optimizer` must be one of",
        ("train_sana", *data, *there, "--batch_size", "0"): "`batch_size` must be at least 1",
        ("train_sana", *data, *there, *used): "holds a run. Use `resume` or another",
        ("train_sana", *data, *there, *new, "--resume"): "`resume` needs a checkpoint",
        ("train_sana_controlnet", *data, *there, "--wiring", "own"): "`wiring` must be one of",
        ("train_sana_image_prompt", *data, *there): "`image_encoder` must be a vision encoder's folder",
        ("train_sana_image_prompt", *data, *there, "--features", "all"): "`features` must be one of",
        ("train_sana_lora", *data, *there, "--quantize", "int3"): "`quantize` must be one of",
        ("train_sana_lora", *data, *there, "--rank", "0"): "`rank` must be at least 1",
        ("train_sana_video", *data, *there, "--frames", "0"): "`frames` must be numbers of at least 1",
        ("train_sana_video", *data, *there, "--lora", "--train-text-encoder"): "`train_text_encoder` must be left out",
        ("train_dc_ae_dit", *data): "`vae` must be an autoencoder's folder or repository",
        ("train_dc_ae", *data): "exactly one of `model_config` and `pretrained` must be given, got none",
        (
            "train_dc_ae",
            *data,
            *there,
            "--model-config",
            str(place / "config.json"),
        ): "`model_config` and `pretrained`",
        ("train_dc_ae", *data, *there, "--phase", "4"): "`phase` must be one of [1, 2, 3]",
        ("train_vila_u_tower", *data, "--decoder-only"): "`contrastive_weight` must be 0 with `decoder_only`",
        ("train_vila_u", "--data", str(place)): "`data` must be a folder with chats.jsonl",
        ("train_vila_u", *data): "`pretrained` must be a folder or repository of a VILA-U",
    }
    outcomes, heavy = run([list(case) for case in cases])
    assert heavy == []
    for (case, expected), (printed, seconds) in zip(cases.items(), outcomes, strict=True):
        assert expected in printed, case
        assert "Traceback" not in printed, case
        assert seconds < 1, case


def test_help_has_hyphens_and_no_option_for_one_role_only():
    [(printed, _), *_], _ = run([["train_sana", "--help"]])
    assert "--train-text-encoder" in printed
    assert "command line only" not in printed
    options = [word for word in printed.split() if word.startswith("--")]
    assert not [option for option in options if "_" in option]
    # An empty default is not shown; others are.
    assert "(default: )" not in printed
    assert "(default: 64)" in printed


def test_old_spelling_of_options_is_accepted(place):
    """Underscores, also behind `--no-`, reach the same option as hyphens."""
    given = ["--data", str(place / "data"), "--pretrained", str(place), "--optimizer", "sgd"]
    spellings = ("--no-use_instruction", "--no-use-instruction", "--batch_size=2", "--output_dir=a_b")
    outcomes, _ = run([["train_sana", *given, spelling] for spelling in spellings])
    assert all("`optimizer` must be one of" in printed for printed, _ in outcomes)
