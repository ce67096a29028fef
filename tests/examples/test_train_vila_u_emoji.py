"""The example that makes the bundled VILA-U, from end to end on made-up art, and its parts."""

import json

import pytest
import torch

from diffusers_sana import VilaUForConditionalGeneration
from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, IMAGE_START, encode_piece, user_turn
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from diffusers_sana.training.data.chats import ChatCollator
from examples.train_vila_u_emoji import evaluate, run
from examples.train_vila_u_emoji.data import QUESTIONS, TAUGHT, EmojiChats, answer, single_scenes
from examples.train_vila_u_emoji.evaluate import prompt_following
from examples.train_vila_u_emoji.models import make_model, make_tower
from examples.train_vila_u_emoji.scenes import (
    COLORS,
    COMMON_OBJECTS,
    EmojiScenes,
    Scene,
    held_out_scenes,
    is_held_out,
    with_article,
)
from examples.train_vila_u_emoji.tokenizer import make_tokenizer
from tests.examples.conftest import NAMES


@pytest.fixture(scope="module")
def tokenizer(small_art):
    return make_tokenizer(small_art, list(QUESTIONS))


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


def test_it_is_taught_common_objects_and_no_held_out_triple(small_art):
    assert set(TAUGHT) <= set(COMMON_OBJECTS)
    scenes = single_scenes(small_art.labels)
    assert {scene.labels[0] for scene in scenes} == set(NAMES)
    assert not any(is_held_out(scene.labels[0], scene.style, scene.color) for scene in scenes)


def test_answers():
    scene = Scene(("fox",), "flat", "blue")
    said = [answer(question, scene) for question in QUESTIONS]
    assert said == ["a fox", "a fox", "blue", "flat", "a fox on a blue background, flat style"]


def test_batches_generate_and_answer(small_art):
    processor = run.make_processor(small_art)
    tower = make_tower(processor.tokenizer)
    chats = EmojiChats(EmojiScenes(small_art, 64, seed=1), tower, size=8, renewed=2)
    batch = next(chats.batches(ChatCollator(processor), 16))
    assert batch["image_codes"].shape == (16, 64, 4)
    learned = batch["labels"] != -100
    generated = (learned & (batch["input_ids"] == processor.image_token_id)).any(1)
    assert 0 < generated.sum() < 16
    assert learned.any(1).all()


def test_run(small_pack, tmp_path, monkeypatch):
    """All stages, a step or more each; then one stage again, which is only loaded."""
    preset = (4, 8, 2)
    monkeypatch.setattr(run, "PRESETS", {"cpu": preset, "cuda": preset})
    monkeypatch.setattr(run, "COMPILE", False)
    for module in (run, evaluate):
        monkeypatch.setattr(module, "TAUGHT", tuple(NAMES))
        monkeypatch.setattr(module, "held_out_scenes", lambda labels, **_: held_out_scenes(labels, 2, pairs=0))
    arguments = ["--data", str(small_pack), "--out", str(tmp_path), "--minutes", "0.05"]
    run.main(arguments)
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["tower_on_held_out_triples"]["psnr_db"] > 3
    assert report["answers_on_held_out_triples"]["object"]["chance"] == 1 / len(NAMES)
    assert {path.stem for path in (tmp_path / "evaluation").glob("*.png")} == {"generated", "answered", "codes"}
    run.main([*arguments, "--stage", "decoder"])
    again = ["--data", str(small_pack), "--out", str(tmp_path / "again"), "--minutes", "0.02"]
    start = tmp_path / "language" / "model"
    run.main([*again, "--start", str(start)])  # the language model alone, trained on
    first, second = map(VilaUForConditionalGeneration.from_pretrained, (start, tmp_path / "again/language/model"))
    for name, weight in second.model.vision_tower.state_dict().items():
        assert torch.equal(weight, first.model.vision_tower.state_dict()[name])
    bundled = VilaUForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert len(list(quantized_layers(bundled))) > 80
    with pytest.raises(ValueError, match="`start` must be a model in 16 bits"):
        run.main([*again, "--out", str(tmp_path / "third"), "--start", str(tmp_path / "model")])


def test_art(small_art):
    assert small_art.labels == NAMES
    assert small_art.held_out
    assert not set(small_art.held_out) & {*small_art.training, *small_art.objects}


def test_scene_shows_what_its_caption_says(small_art):
    scenes = EmojiScenes(small_art, 64)
    left, both = scenes.render(
        [Scene(("red ball",), "3d", "blue", " on the left"), Scene(("red ball", "green box"), "flat", "white")],
        jitter=0,
    )
    blue = torch.tensor(COLORS["blue"]) / 127.5 - 1
    assert (left[:, 32, 60] - blue).abs().max() < 0.05, "the right half is background"
    assert left[2, 32, 16] < 0 < left[0, 32, 16], "red is on the left"
    assert both[1, 32, 16] < 0 < both[0, 32, 16], "red is on the left"
    assert both[0, 32, 48] < both[1, 32, 48], "green is on the right"


def test_batches_are_reproducible(small_art):
    first, again = (next(EmojiScenes(small_art, 32, seed=3).autoencoder_batches(4))["pixel_values"] for _ in range(2))
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)
    assert first.abs().max() <= 1


def test_captions(small_art):
    scenes = EmojiScenes(small_art)
    scene = Scene(("red ball",), "3d", "orange", " at the top")
    assert scene.prompt == "a red ball at the top on an orange background, 3d style"
    assert {"a 3d red ball at the top on an orange background", scene.prompt} <= {
        scenes.caption(scene) for _ in range(200)
    }
    assert with_article("grapes") == "grapes"
    assert with_article("cactus") == "a cactus"
    assert with_article("apple") == "an apple"


def test_training_never_shows_what_is_held_out(small_art):
    scenes = EmojiScenes(small_art)
    sampled = [scenes.sample_scene() for _ in range(2000)]
    assert not any(is_held_out(s.labels[0], s.style, s.color) for s in sampled if len(s.labels) == 1)
    for scene in held_out_scenes(small_art.labels, singles=8, pairs=2)[:8]:
        assert is_held_out(scene.labels[0], scene.style, scene.color)


def test_evaluation_recognizes_the_truth(small_art):
    """The measure itself: true renderings score 1, renderings of something else do not."""
    scenes = held_out_scenes(small_art.labels, singles=6, pairs=0)
    renderer = EmojiScenes(small_art, 64)
    wrong = [Scene((NAMES[NAMES.index(s.labels[0]) - 4],), s.style, "black", s.position) for s in scenes]
    images = {"true": renderer.render(scenes), "wrong": renderer.render(wrong)}
    figures = prompt_following(images, scenes, renderer)
    assert figures["true"]["object_top1"] == figures["true"]["color_top1"] == 1
    assert figures["wrong"]["object_top1"] < 0.5
    assert figures["wrong"]["color_top1"] < 0.5
