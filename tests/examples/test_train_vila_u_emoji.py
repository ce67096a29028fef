"""The example that makes the bundled VILA-U, from end to end on made-up art, and its parts."""

import json

import pytest
import torch

from diffusers_sana import VilaUForConditionalGeneration
from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, IMAGE_START, encode_piece, user_turn
from diffusers_sana.training.data.chats import ChatCollator
from examples.train_emoji.data import COMMON_OBJECTS, EmojiScenes, Scene, is_held_out
from examples.train_emoji.evaluate import held_out_scenes
from examples.train_vila_u_emoji import evaluate, run
from examples.train_vila_u_emoji.data import QUESTIONS, TAUGHT, EmojiChats, answer, single_scenes
from examples.train_vila_u_emoji.models import make_model, make_tower
from examples.train_vila_u_emoji.tokenizer import make_tokenizer
from tests.examples.conftest import NAMES


@pytest.fixture(scope="module")
def tokenizer(art):
    return make_tokenizer(art, list(QUESTIONS))


def test_tokenizer_knows_what_it_will_read_as_words(tokenizer):
    ids = encode_piece(tokenizer, user_turn("a red ball on a blue background, 3d style") + f" {IMAGE_START}")
    words = tokenizer.convert_ids_to_tokens(ids)
    at = words.index("▁USER") + 2
    expected = [
        "▁a",
        "▁red",
        "▁ball",
        "▁on",
        "▁a",
        "▁blue",
        "▁background",
        ",",
        "▁3d",
        "▁style",
        "▁ASSISTANT",
        ":",
        "▁",
    ]
    assert words[at:] == [*expected, IMAGE_START]
    assert tokenizer.decode(tokenizer("zürich ☃").input_ids) == "zürich ☃"


def test_sizes(tokenizer):
    """What is bundled stays under 30 MB of bf16, and no placeholder has a row."""
    with torch.device("meta"):
        tower = make_tower(tokenizer)
        model = make_model(tower, tokenizer)
    assert 2 * sum(p.numel() for p in model.parameters()) < 30e6
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE) == model.config.text_config.vocab_size


def test_it_is_taught_common_objects_and_no_held_out_triple(art):
    assert set(TAUGHT) <= set(COMMON_OBJECTS)
    scenes = single_scenes(art.labels)
    assert {scene.labels[0] for scene in scenes} == set(NAMES)
    assert not any(is_held_out(scene.labels[0], scene.style, scene.color) for scene in scenes)


def test_answers():
    scene = Scene(("fox",), "flat", "blue")
    said = [answer(question, scene) for question in QUESTIONS]
    assert said == ["a fox", "a fox", "blue", "flat", "a fox on a blue background, flat style"]


def test_batches_generate_and_answer(art):
    processor = run.make_processor(art)
    tower = make_tower(processor.tokenizer)
    chats = EmojiChats(EmojiScenes(art, 64, seed=1), tower, size=8, renewed=2)
    batch = next(chats.batches(ChatCollator(processor), 16))
    assert batch["image_codes"].shape == (16, 64, 4)
    learned = batch["labels"] != -100
    generated = (learned & (batch["input_ids"] == processor.image_token_id)).any(1)
    assert 0 < generated.sum() < 16
    assert learned.any(1).all()


def test_run(pack, tmp_path, monkeypatch):
    """All stages, a step or more each; then one stage again, which is only loaded."""
    preset = (4, 8, 2)
    monkeypatch.setattr(run, "PRESETS", {"cpu": preset, "cuda": preset})
    monkeypatch.setattr(run, "COMPILE", False)
    for module in (run, evaluate):
        monkeypatch.setattr(module, "TAUGHT", tuple(NAMES))
        monkeypatch.setattr(module, "held_out_scenes", lambda labels, **_: held_out_scenes(labels, 2, pairs=0))
    arguments = ["--data", str(pack), "--out", str(tmp_path), "--minutes", "0.05"]
    run.main(arguments)
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["tower_on_held_out_triples"]["psnr_db"] > 3
    assert report["answers_on_held_out_triples"]["object"]["chance"] == 1 / len(NAMES)
    assert {path.stem for path in (tmp_path / "evaluation").glob("*.png")} == {"drawn", "answered", "codes"}
    run.main([*arguments, "--stage", "decoder"])
    again = ["--data", str(pack), "--out", str(tmp_path / "again"), "--minutes", "0.02"]
    run.main([*again, "--start", str(tmp_path / "model")])  # the language model alone, trained on
    first, second = (VilaUForConditionalGeneration.from_pretrained(tmp_path / at / "model") for at in (".", "again"))
    for name, weight in second.model.vision_tower.state_dict().items():
        assert torch.equal(weight, first.model.vision_tower.state_dict()[name])
