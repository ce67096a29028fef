"""The example that trains VILA-U on chats, at tiny size, and what it reads chats with."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from diffusers_sana import VilaUForConditionalGeneration
from diffusers_sana.training.data.chats import ChatCollator, ChatFolder, encode_images, without_prompt
from diffusers_sana.training.recipes.options import VilaUTrainingConfig
from diffusers_sana.training.recipes.vila_u import MaskedImageTokens, train
from examples.train_vila_u import main
from tests.models.vila_u.tiny import CELLS, CODES, DEPTH, IMAGE, tiny_model
from tests.models.vila_u.tiny_processor import tiny_processor
from tests.training.tiny import read_log


def generating(prompt, image):
    shown = [{"type": "image", "image": image}]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": shown}]


def answering(image, said):
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "what"}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def random_codes(seed):
    return torch.randint(CODES, (CELLS, DEPTH), generator=torch.Generator().manual_seed(seed))


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 3, "log_every": 1, "learning_rate": 1e-3, "warmup_steps": 2}
    return VilaUTrainingConfig(**settings | changes)


def trainable():
    """A tiny model of weights as a training begins with."""
    torch.manual_seed(0)
    return VilaUForConditionalGeneration(tiny_model().config)


def test_it_learns_to_generate_and_to_answer(tmp_path):
    processor = tiny_processor()
    first, second = random_codes(1), random_codes(2)
    chats = [generating("a", first), generating("b", second), answering(first, "cat"), answering(second, "USER")]
    config = make_config(tmp_path, max_steps=60, learning_rate=3e-3, lr_schedule="constant")
    train(config, [ChatCollator(processor)(chats)], trainable(), processor)
    rows = read_log(tmp_path)
    assert rows[-1]["codes"] < 0.05
    assert rows[-1]["text"] < 0.05
    model = VilaUForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    saved = AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = saved(text=["a", "b"], generation_mode="image")
    generated = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=1)
    assert torch.equal(generated, torch.stack([first, second]))
    asked = saved.apply_chat_template(
        [chat[:1] for chat in chats[2:]], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    written = model.generate(**asked, max_new_tokens=8, do_sample=False)[:, asked["input_ids"].shape[1] :]
    assert saved.batch_decode(written, skip_special_tokens=True) == ["cat", "USER"]


def test_the_tower_stays_as_it_is_and_images_are_shown(tmp_path):
    model, processor = trainable(), tiny_processor()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = ChatCollator(processor)([generating("a", random_codes(1)), answering(random_codes(2), "cat")])
    train(make_config(tmp_path, sample_prompts=("a", "cat"), ema_decay=0.5), [batch], model, processor)
    after = VilaUForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("model.vision_tower.")}
    assert [path.stem for path in (tmp_path / "samples").glob("*.png")] == ["step_0000003"]


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    processor = tiny_processor()
    chats = [generating("a", random_codes(1)), answering(random_codes(2), "cat")]

    def batches(start):
        collate = ChatCollator(processor, caption_dropout=0.5)
        return (collate(chats) for _ in range(10))

    states = []
    for folder, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            settings = {"max_steps": steps, "resume": steps > parts[0], "lr_schedule": "constant"}
            train(make_config(tmp_path / folder, **settings), batches, trainable(), processor)
        states.append(VilaUForConditionalGeneration.from_pretrained(tmp_path / folder / "model").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_caption_dropout_empties_prompts_of_images_only():
    generate, ask = generating("a", random_codes(1)), answering(random_codes(2), "cat")
    assert without_prompt(generate)[0]["content"] == ""
    assert without_prompt(ask) is ask
    collate, processor = ChatCollator(tiny_processor(), caption_dropout=1.0), tiny_processor()
    row = collate([generate])["input_ids"][0].tolist()
    negative = processor(text="a", generation_mode="image")["negative_input_ids"][0].tolist()
    assert row[: len(negative)] == negative  # what generation guides away from
    assert row[len(negative) :].count(IMAGE) == CELLS


def chat_folder(folder):
    """Two images in four chats."""
    folder.mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 32), color).save(folder / name)
    chats = [generating("a", "a.png"), generating("b", "b.png"), answering("a.png", "cat"), answering("b.png", "USER")]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


def test_chats_with_separators_and_blank_lines(tmp_path):
    folder = chat_folder(tmp_path / "data")
    chat = generating("one\u2028two", "a.png")
    (folder / "chats.jsonl").write_text("\ufeff\n" + json.dumps(chat, ensure_ascii=False) + "\n\n", "utf-8")
    assert ChatFolder(folder).chats == [chat]


def test_images_of_a_folder_are_encoded_once(tmp_path):
    chats, model, processor = ChatFolder(chat_folder(tmp_path / "data")), tiny_model(), tiny_processor()
    tower, file = model.model.vision_tower, tmp_path / "codes.safetensors"
    codes = encode_images(chats.images, tower, processor.image_processor, file, batch_size=1)
    assert codes.keys() == {"a.png", "b.png"}
    collate = ChatCollator(processor)
    from_pixels = collate([chats[index] for index in range(4)])
    before = file.stat().st_ino
    chats.codes = encode_images(chats.images, tower, processor.image_processor, file)
    assert file.stat().st_ino == before  # nothing was encoded
    from_codes = collate([chats[index] for index in range(4)])
    assert torch.equal(from_codes["image_codes"], tower.encode_to_codes(from_pixels["pixel_values"]))
    assert torch.equal(from_codes["input_ids"], from_pixels["input_ids"])
    assert torch.equal(from_codes["labels"], from_pixels["labels"])


def test_codes_are_of_their_images_tower_and_processor(tmp_path):
    chats, tower, processor = (
        ChatFolder(chat_folder(tmp_path / "data")),
        tiny_model().model.vision_tower,
        tiny_processor(),
    )
    file, encoded = tmp_path / "codes.safetensors", []
    encode = tower.encode_to_codes
    tower.encode_to_codes = lambda pixels: [encoded.append(len(pixels)), encode(pixels)][1]

    def codes(**options):
        encoded.clear()
        image_processor = type(processor.image_processor)(**processor.image_processor.to_dict() | options)
        return encode_images(chats.images, tower, image_processor, file)

    first = codes()
    assert encoded == [2]
    Image.new("RGB", (41, 32), "green").save(tmp_path / "data" / "a.png")
    second = codes()
    assert encoded == [1]
    assert not torch.equal(second["a.png"], first["a.png"])
    assert torch.equal(second["b.png"], first["b.png"])
    codes(image_aspect_ratio="crop")
    assert encoded == [2]
    next(tower.parameters()).data.view(-1)[0] += 1
    codes(image_aspect_ratio="crop")
    assert encoded == [2]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_accumulated_batches_of_unequal_targets_are_one_batch(tmp_path, order):
    """One chat has codes to learn only, the other text: each loss is a mean over the targets of the whole step."""
    collate, results = ChatCollator(tiny_processor()), []
    chats = [generating("a", random_codes(1)), answering(random_codes(2), "cat cat cat cat")]
    whole = [collate(chats)]
    parts = [collate([chats[at]]) for at in order]
    for name, batches in (("whole", whole), ("parts", parts)):
        torch.manual_seed(0)
        model_config = tiny_model().config
        model_config.depth_config.dropout = 0.0
        model = VilaUForConditionalGeneration(model_config)
        config = make_config(
            tmp_path / name, max_steps=1, log_every=1, gradient_accumulation_steps=len(batches), max_grad_norm=0.0
        )
        gradients = {}
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, key=key, gradients=gradients: gradients.__setitem__(key, p.grad.clone())
                )
        train(config, batches, model, tiny_processor())
        [row] = read_log(tmp_path / name)
        results.append((gradients, row))
    (expected, row), (found, also) = results
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    assert expected["depth_transformer.head.weight"].abs().max() > 1e-3
    assert expected["lm_head.weight"].abs().max() > 1e-3
    for term in ("text", "codes", "loss"):
        assert row[term] == pytest.approx(also[term], abs=1e-4)


@pytest.mark.parametrize("cached", ["--cache_codes", "--no-cache_codes"])
def test_command_line(tmp_path, cached):
    model, processor = trainable(), tiny_processor()
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    arguments = ["--data", str(chat_folder(tmp_path / "data")), "--pretrained", str(tmp_path / "start"), cached]
    settings = ["--output_dir", str(tmp_path / "out"), "--batch_size", "4", "--num_workers", "0"]
    main([*arguments, *settings, "--max_steps", "2", "--gradient_checkpointing"])
    VilaUForConditionalGeneration.from_pretrained(tmp_path / "out" / "model")
    assert (tmp_path / "out" / "codes.safetensors").exists() == (cached == "--cache_codes")


def test_bad_input(tmp_path):
    folder = chat_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="`pretrained` must be a folder or repository of a VILA-U"):
        main(["--data", str(folder)])
    for read in (ChatFolder, lambda place: main(["--data", str(place)])):
        with pytest.raises(ValueError, match=r"folder with chats\.jsonl"):
            read(tmp_path)
    (folder / "b.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the images, 'b.png' first"):
        ChatFolder(folder)
    good = (folder / "chats.jsonl").read_text()
    for line, message in {
        '[{"role": "user"': "not valid JSON",
        '{"role": "user", "content": "x"}': "a line must be a list of messages",
        '[{"role": "user", "content": [{"type": "image", "image": 5}]}]': "a line must be a list of messages",
        json.dumps(generating("a", "../b.png")): "lies outside of the data folder",
    }.items():
        (folder / "chats.jsonl").write_text(f"\n{line}\n{good}")
        with pytest.raises(ValueError, match=rf"chats\.jsonl', line 2: .*{message}"):
            ChatFolder(folder)
    processor = tiny_processor()
    with pytest.raises(ValueError, match=r"must all be images or all codes, got 1 codes among 2\."):
        ChatCollator(processor)([generating("a", random_codes(1)), generating("b", Image.new("RGB", (32, 32)))])
    with pytest.raises(ValueError, match=r"must be \[16, D\], got \[15, 3\]"):
        ChatCollator(processor)([generating("a", random_codes(1)[1:])])


def test_hidden_cells_are_not_seen_but_still_learned():
    model, processor = trainable().eval(), tiny_processor()
    batch = ChatCollator(processor)([generating("a", random_codes(1)), generating("b", random_codes(2))])
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    plain = model(**batch)
    assert torch.equal(MaskedImageTokens(model, 0.0)(**batch).loss, plain.loss)
    torch.manual_seed(0)
    hidden = MaskedImageTokens(model, 1.0)(**batch)
    is_cell = batch["input_ids"] == IMAGE
    is_hidden = (seen[2] == 0).all(-1) & is_cell
    assert 0 < is_hidden.sum() < is_cell.sum()
    assert torch.equal(seen[2][~is_hidden], seen[0][~is_hidden])
    assert hidden.depth_logits.shape == plain.depth_logits.shape
