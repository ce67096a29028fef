"""The example that trains VILA-U's vision tower, at tiny size."""

import pytest
import torch

from diffusers_sana import VilaUVisionModel
from diffusers_sana.training.recipes.options import VilaUTowerTrainingConfig
from diffusers_sana.training.recipes.vila_u_tower import codes_used, tokenize, train
from examples.train_vila_u_tower import main
from tests.models.vila_u.tiny import CODES, VOCABULARY, tiny_vision_config
from tests.models.vila_u.tiny_processor import tiny_tokenizer
from tests.training.tiny import image_batches, read_log, smooth_images, write_image_folder


def tiny_tower(**overrides):
    torch.manual_seed(0)
    parts = {"use_semantic_head": True, "use_text_tower": True, "text_vocab_size": VOCABULARY + 1}
    return VilaUVisionModel(tiny_vision_config(**parts | overrides))


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 3, "log_every": 1, "learning_rate": 1e-3, "ema_decay": 0.9}
    return VilaUTowerTrainingConfig(**settings | changes)


def test_it_learns_fixed_images_and_their_captions(tmp_path):
    batch = {"pixel_values": smooth_images(4, 32), "text": ["a", "cat", "USER", "b b"]}
    config = make_config(tmp_path, max_steps=80, learning_rate=3e-3, ema_decay=0.0, train_text_tower=True)
    model = tiny_tower()
    train(config, [batch], model, tiny_tokenizer())
    rows = read_log(tmp_path)
    for term, factor in {"l1": 0.6, "perceptual": 0.9, "contrastive": 0.5}.items():
        assert rows[-1][term] < factor * rows[0][term], term
    assert list((tmp_path / "samples").glob("*.png"))
    trained = VilaUVisionModel.from_pretrained(tmp_path / "model").eval()
    texts = torch.nn.functional.normalize(
        trained.get_text_features(tokenize(tiny_tokenizer(), batch["text"], trained.config)), dim=-1
    )
    images = torch.nn.functional.normalize(trained.get_image_features(batch["pixel_values"]), dim=-1)
    assert (images @ texts.mT).argmax(1).tolist() == [0, 1, 2, 3]


def test_what_trains_and_what_does_not(tmp_path):
    model = tiny_tower()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(make_config(tmp_path), image_batches, model, tiny_tokenizer())
    trained = VilaUVisionModel.from_pretrained(tmp_path / "model").state_dict()
    assert trained.keys() == before.keys()  # the state of the moving averages is not published
    unchanged = {name for name in before if torch.equal(before[name], trained[name])}
    frozen = {name for name in before if name.startswith("text_model.")}
    assert frozen <= unchanged
    assert not any(name.startswith(("layers.", "decoder.", "quantizer.", "semantic_head.")) for name in unchanged)


def test_the_decoder_alone_leaves_the_codes_as_they_are(tmp_path):
    model = tiny_tower()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(make_config(tmp_path, decoder_only=True, contrastive_weight=0), image_batches, model)
    trained = VilaUVisionModel.from_pretrained(tmp_path / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert changed == {name for name in before if name.startswith(("decoder.", "post_quant_conv."))}
    with pytest.raises(ValueError, match="`contrastive_weight` must be 0 with `decoder_only`"):
        train(make_config(tmp_path, decoder_only=True), image_batches, tiny_tower(), tiny_tokenizer())


def test_without_contrastive_loss_no_text_is_needed(tmp_path):
    model = VilaUVisionModel(tiny_vision_config())
    batch = {"pixel_values": smooth_images(4, 32)}
    train(make_config(tmp_path, contrastive_weight=0, perceptual_every=2), [batch], model)
    rows = read_log(tmp_path)
    assert "contrastive" not in rows[0]
    assert [("perceptual" in row) for row in rows] == [True, False, True]


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_config(whole, max_steps=4), image_batches, tiny_tower(), tiny_tokenizer())
    train(make_config(parts, max_steps=2), image_batches, tiny_tower(), tiny_tokenizer())
    train(make_config(parts, max_steps=4, resume=True), image_batches, tiny_tower(), tiny_tokenizer())
    expected, found = (VilaUVisionModel.from_pretrained(folder / "model").state_dict() for folder in (whole, parts))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_codes_used():
    assert codes_used(torch.arange(CODES), CODES).item() == pytest.approx(1)
    assert codes_used(torch.zeros(9, dtype=torch.long), CODES).item() == pytest.approx(1 / CODES)


def test_command_line(tmp_path):
    data, model, tokenizer = (str(tmp_path / name) for name in ("data", "config.json", "tokenizer"))
    write_image_folder(tmp_path / "data", [(32, 32), (40, 32), (32, 48), (64, 64)])
    tiny_tower().config.to_json_file(model)
    tiny_tokenizer().save_pretrained(tokenizer)
    arguments = ["--data", data, "--tokenizer", tokenizer, "--batch_size", "2", "--num_workers", "0"]
    first = ["--output_dir", str(tmp_path / "first"), "--max_steps", "2"]
    main([*arguments, "--model_config", model, *first])
    main(
        [*arguments, "--pretrained", f"{tmp_path}/first/model", "--output_dir", f"{tmp_path}/second", "--max_steps=1"]
    )
    assert VilaUVisionModel.from_pretrained(tmp_path / "second" / "model").config.use_text_tower


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_semantic_head": False}, "use_semantic_head=True"),
        ({"use_text_tower": False}, "use_text_tower=True"),
    ],
)
def test_missing_parts_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(tmp_path), image_batches, tiny_tower(**overrides), tiny_tokenizer())
    with pytest.raises(ValueError, match="`tokenizer`"):
        train(make_config(tmp_path), image_batches, tiny_tower())


def test_one_source_of_the_model(tmp_path):
    with pytest.raises(ValueError, match="exactly one of `siglip`, `pretrained` and `model_config`"):
        main(["--data", str(tmp_path)])
