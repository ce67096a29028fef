"""Options of the recipes against the settings that runs of earlier versions recorded."""

import json
from pathlib import Path

import pytest

from diffusers_sana.training.config import check_resumable, parse_options, record
from diffusers_sana.training.recipes.options import RECIPES


# The `settings` in state.json of a run of each script with default options, when one class held all options.
EARLIER = json.loads((Path(__file__).parents[2] / "fixtures" / "settings_of_earlier_runs.json").read_text())
# Recipe -> its name in that file.
NAMES = {"controlnet": "sana_controlnet", "lora": "sana_lora", "sprint": "sana_sprint"}


@pytest.fixture
def required(tmp_path):
    """What has no default, as options and as settings."""
    (tmp_path / "chats.jsonl").write_text("")
    (tmp_path / "prompts.txt").write_text("a cat")
    data = {"data": str(tmp_path), "prompts": str(tmp_path / "prompts.txt")}
    return data | dict.fromkeys(("pretrained", "vae", "image_encoder"), "owner/name")


def groups_of(recipe, required):
    """The options of a recipe with what it requires, and the settings of an earlier run with the same."""
    before = EARLIER[NAMES.get(recipe, recipe)]
    names = before.keys() & required.keys()
    arguments = [part for name in sorted(names) for part in (f"--{name}", required[name])]
    return parse_options(RECIPES[recipe], arguments), before | {name: required[name] for name in names}


@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_of_earlier_versions_resume(recipe, required):
    """Every setting is still there, by its name and with its default."""
    groups, before = groups_of(recipe, required)
    now = record(groups)
    assert {name: now[name] for name in before} == before
    assert check_resumable(groups, before) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_groups_share_no_name(recipe, required):
    groups, _ = groups_of(recipe, required)
    assert sum(len(record([group])) for group in groups) == len(record(groups))


def test_settings_of_all_groups_are_compared(required):
    groups, before = groups_of("sana", required)
    with pytest.raises(ValueError, match=r"`batch_size`: 32 there, 64 now; `pretrained`: \"other\" there"):
        check_resumable(groups, before | {"batch_size": 32, "pretrained": "other"})
    assert check_resumable(groups, before | {"num_workers": 1, "log_every": 5}) == [
        "`log_every`: 5 there, 10 now",
        "`num_workers`: 1 there, 4 now",
    ]
