"""Prompts of VILA-U: text and ids as the official code makes them, placeholders, guidance rows, what is refused."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana.models.vila_u import media_vila_u
from diffusers_sana.models.vila_u.prompts_vila_u import SYSTEM_PROMPT, encode_piece
from tests.models.vila_u.tiny import CELLS, CODES, DEPTH, IMAGE
from tests.models.vila_u.tiny_processor import tiny_processor


PROCESSOR = tiny_processor()
RUN = "·"  # stands below for the placeholders of one image


def plain_image(level=128, size=(40, 24)):
    return Image.new("RGB", size, (level, level, level))


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text_part(text):
    return {"type": "text", "text": text}


def image_part(image=None):
    return {"type": "image", "image": image or plain_image()}


def tokens(row, mask=None):
    """Pieces of a row behind the system prompt, with one mark for each image."""
    row = row[mask.bool()] if mask is not None else row
    pieces = PROCESSOR.tokenizer.convert_ids_to_tokens(row.tolist())
    head = PROCESSOR.tokenizer.convert_ids_to_tokens([1, *encode_piece(PROCESSOR.tokenizer, SYSTEM_PROMPT)])
    assert pieces[: len(head)] == head
    text = " ".join(pieces[len(head) :])
    return text.replace(" ".join(["<image>"] * CELLS), RUN).split()


def inputs_of(chat, **options):
    return PROCESSOR.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
    )


class TestText:
    def test_system_prompt(self):
        digest = hashlib.sha256(SYSTEM_PROMPT.encode()).hexdigest()
        assert digest == "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"

    @pytest.mark.parametrize(
        ("chat", "text"),
        [
            (user(text_part("  a cat \n")), "USER: a cat ASSISTANT:"),
            (user(image_part(), text_part("What is it?")), "USER: <image>\nWhat is it? ASSISTANT:"),
            (user(image_part(), image_part(), text_part("Both?")), "USER: <image>\n<image>\nBoth? ASSISTANT:"),
            (user(text_part("Look:"), image_part()), "USER: Look:<image> ASSISTANT:"),
            ([{"role": "user", "content": " "}], "USER:ASSISTANT:"),
            (
                [
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "Two."},
                    {"role": "user", "content": "Three?"},
                ],
                "USER: One? ASSISTANT: Two.</s>USER: Three? ASSISTANT:",
            ),
        ],
    )
    def test_template(self, chat, text):
        assert PROCESSOR.apply_chat_template(chat, add_generation_prompt=True) == f"{SYSTEM_PROMPT} {text}"

    def test_answers_with_images(self):
        """As in training: an image that the assistant shows stands between its marks."""
        chat = [*user(text_part("a cat")), {"role": "assistant", "content": [image_part()]}]
        wanted = f"{SYSTEM_PROMPT} USER: a cat ASSISTANT: <im_start><image><im_end></s>"
        assert PROCESSOR.apply_chat_template(chat) == wanted
        ids = PROCESSOR.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
        assert tokens(ids)[-5:] == ["▁", "<im_start>", RUN, "<im_end>", "</s>"]

    def test_other_system_message(self):
        chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
        assert PROCESSOR.apply_chat_template(chat, add_generation_prompt=True) == "Be short. USER: Hi ASSISTANT:"

    @pytest.mark.parametrize("chat", [[{"role": "tool", "content": "x"}], user({"type": "audio", "audio": "x"})])
    def test_unknown_role_and_part(self, chat):
        with pytest.raises(Exception, match="must be"):
            PROCESSOR.apply_chat_template(chat)


class TestIds:
    """The rule of the slow tokenizer, on a tokenizer with the same kinds of pieces."""

    @pytest.mark.parametrize(
        ("text", "pieces"),
        [
            ("a cat", ["▁a", "▁", "cat"]),
            (" a cat", ["▁▁", "a", "▁", "cat"]),  # the prefix, and the space of the text
            ("\ncat", ["▁", "<0x0A>", "cat"]),
            ("<im_end>\ncat", ["<im_end>", "<0x0A>", "cat"]),  # the lone prefix is dropped, none follows
            (" <im_end>", ["▁▁", "<im_end>"]),
            ("cat <im_start>", ["▁", "cat", "▁", "<im_start>"]),
            ("</s>USER", ["</s>", "USER"]),
            ("", []),
        ],
    )
    def test_piece(self, text, pieces):
        tokenizer = PROCESSOR.tokenizer
        assert tokenizer.convert_ids_to_tokens(encode_piece(tokenizer, text)) == pieces

    def test_golden_ids(self):
        """The text behind an image starts with the id of "▁", which one pass over the whole text would lose."""
        ids = inputs_of(user(image_part(), text_part("cat?")))["input_ids"][0]
        assert ids[0] == 1
        assert tokens(ids)[:6] == ["▁USER", ":", "▁", RUN, "▁", "<0x0A>"]
        behind = ids[(ids == IMAGE).nonzero()[-1, 0] + 1 :].tolist()
        assert behind == [4, 3, 86, 71, 4, 84, 49, 39, 49, 50, 31, 44, 50, 69]
        whole = PROCESSOR.tokenizer("<image>\ncat?", add_special_tokens=False)["input_ids"]
        assert whole == [IMAGE, 3, 86, 71]

    def test_wrapped_images(self):
        chat = user(image_part(), {"type": "video", "video": [plain_image()] * 2}, text_part("cat"))
        wrapped = tokens(inputs_of(chat, wrap_image_tokens=True)["input_ids"][0])
        video = [RUN, "▁", "<0x0A>", RUN, "▁", "<0x0A>", "cat"]  # frames are bare
        assert wrapped[2 : 7 + len(video)] == ["▁", "<im_start>", RUN, "<im_end>", "<0x0A>", *video]
        bare = tokens(inputs_of(chat)["input_ids"][0])
        assert bare[2 : 7 + len(video)] == ["▁", RUN, "▁", "<0x0A>", *video, "▁"]
        assert tiny_processor(wrap_image_tokens=True).wrap_image_tokens

    def test_batch_is_padded_on_the_left(self):
        chats = [user(text_part("cat")), user(image_part(), text_part("a cat"))]
        batch = inputs_of(chats)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        for index, chat in enumerate(chats):
            alone = inputs_of(chat)["input_ids"][0]
            mask = batch["attention_mask"][index]
            assert torch.equal(batch["input_ids"][index][mask.bool()], alone)
            assert mask.sum() == len(alone)
            assert mask[-len(alone) :].all()
        assert batch["input_ids"][0, 0] == 0
        right = PROCESSOR(text=["a", "a cat"], padding_side="right")
        assert right["attention_mask"][0].tolist()[0] == 1
        assert right["attention_mask"][0].tolist()[-1] == 0
        PROCESSOR.tokenizer.padding_side = "right"  # a tokenizer's own side says nothing
        assert PROCESSOR(text=["a", "a cat"])["attention_mask"][0, 0] == 0

    def test_plain_lists(self):
        rows = PROCESSOR(text=["a", "a cat"], return_tensors=None, padding=False)["input_ids"]
        assert rows == [[1, 79], [1, 79, 4, 86]]


class TestGeneration:
    @pytest.mark.parametrize(("mode", "start"), [("image", "<im_start>"), ("video", "<vi_start>")])
    def test_rows(self, mode, start):
        batch = PROCESSOR(text=["cat", "a cat"], generation_mode=mode)
        for index, said in enumerate((["▁", "cat"], ["▁a", "▁", "cat"])):
            row = tokens(batch["input_ids"][index], batch["attention_mask"][index])
            assert row[:2] + row[-5:] == ["▁USER", ":", "N", "T", ":", "▁", start]
            assert row[2 : 2 + len(said)] == said
            negative = tokens(batch["negative_input_ids"][index], batch["negative_attention_mask"][index])
            assert negative == ["▁USER", ":", "AS", "S", "I", "S", "T", "A", "N", "T", ":", "▁", start]
        assert "pixel_values" not in batch

    def test_chat_is_the_same_as_text(self):
        plain = PROCESSOR(text="cat", generation_mode="image")
        for options in ({"generation_mode": "image"}, {"processor_kwargs": {"generation_mode": "image"}}):
            chat = PROCESSOR.apply_chat_template(user(text_part(" cat ")), tokenize=True, return_dict=True, **options)
            assert chat.keys() == plain.keys()
            assert all(torch.equal(chat[key], plain[key]) for key in plain)

    def test_negative_prompt(self):
        batch = PROCESSOR(text=["cat", "a cat"], generation_mode="image", negative_prompt=["", "cat"])
        rows = [
            tokens(row, mask)
            for row, mask in zip(batch["negative_input_ids"], batch["negative_attention_mask"], strict=True)
        ]
        assert rows[0][2] == "AS"
        assert rows[1] == tokens(PROCESSOR(text="cat", generation_mode="image")["input_ids"][0])
        same = PROCESSOR(text=["cat", "a cat"], generation_mode="image", negative_prompt="cat")["negative_input_ids"]
        assert torch.equal(same[0], same[1])

    def test_negative_keeps_the_system_message(self):
        chat = [{"role": "system", "content": "cat."}, {"role": "user", "content": "a"}]
        batch = PROCESSOR.apply_chat_template(chat, generation_mode="image", tokenize=True, return_dict=True)
        wanted = [1, *encode_piece(PROCESSOR.tokenizer, "cat. USER:ASSISTANT: <im_start>")]
        assert batch["negative_input_ids"][0].tolist() == wanted

    def test_negatives_that_do_not_fit(self):
        assert set(PROCESSOR(text="cat")) == {"input_ids", "attention_mask"}
        with pytest.raises(ValueError, match="`negative_prompt` must be None in mode 'text'"):
            PROCESSOR(text="cat", negative_prompt="dog")
        with pytest.raises(ValueError, match=r"one text per prompt \(1\), got 2"):
            PROCESSOR(text="cat", generation_mode="image", negative_prompt=["a", "b"])


class TestMedia:
    def test_order_is_that_of_the_placeholders(self):
        clip = [plain_image(level) for level in (10, 20, 30)]
        chats = [
            user(image_part(plain_image(40)), {"type": "video", "video": clip}, image_part(plain_image(50))),
            user(text_part("cat"), image_part(plain_image(60))),
        ]
        levels = (inputs_of(chats)["pixel_values"][:, 0, 0, 0] + 1) * 127.5
        assert levels.round().tolist() == [40, 10, 30, 50, 60]

    def test_ways_to_pass_images(self):
        texts = ["<image>a", "<image><image>"]
        flat = PROCESSOR(text=texts, images=[plain_image(level) for level in (1, 2, 3)])
        nested = PROCESSOR(text=texts, images=[[plain_image(1)], [plain_image(2), plain_image(3)]])
        arrays = PROCESSOR(text=texts, images=[np.array(plain_image(level)) for level in (1, 2, 3)])
        for other in (nested, arrays):
            assert all(torch.equal(flat[key], other[key]) for key in flat)
        assert (flat["input_ids"] == IMAGE).sum(1).tolist() == [CELLS, 2 * CELLS]

    def test_files_and_folders(self, tmp_path):
        for index in range(5):
            plain_image(10 * index).save(tmp_path / f"{index}.png")
        by_path = PROCESSOR(text="<image>", images=tmp_path / "3.png")["pixel_values"]
        assert torch.equal(by_path, PROCESSOR(text="<image>", images=str(tmp_path / "3.png"))["pixel_values"])
        assert torch.equal(by_path, PROCESSOR(text="<image>", images=plain_image(30))["pixel_values"])
        clip = PROCESSOR(text="<video>", videos=str(tmp_path))["pixel_values"]
        assert ((clip[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 40]

    @pytest.mark.parametrize(
        ("total", "taken"),
        [(8, list(range(8))), (100, [0, 14, 28, 42, 57, 71, 85, 99]), (3, [0, 0, 1, 1, 1, 1, 2, 2]), (1, [0] * 8)],
    )
    def test_frames(self, total, taken):
        clip = np.stack([np.full((8, 8, 3), level, np.uint8) for level in range(total)])
        levels = (
            tiny_processor(num_video_frames=8)(text="<video>", videos=clip)["pixel_values"][:, 0, 0, 0] + 1
        ) * 127.5
        assert levels.round().tolist() == taken

    def test_frames_of_a_file_are_chosen_before_decoding(self, monkeypatch):
        def decode(path, sample_indices_fn):
            assert path == "clip.mp4"
            indices = sample_indices_fn(SimpleNamespace(total_num_frames=9))
            return np.stack([np.full((8, 8, 3), level, np.uint8) for level in indices]), None

        monkeypatch.setattr(media_vila_u, "load_video", decode)
        levels = (PROCESSOR(text="<video>", videos="clip.mp4")["pixel_values"][:, 0, 0, 0] + 1) * 127.5
        assert levels.round().tolist() == [0, 8]
        with pytest.raises(ValueError, match="must have 2 frames each"):
            PROCESSOR(text="<video>", videos="clip.mp4", do_sample_frames=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"text": "<image>"}, "the text has 1, got 0"),
            ({"text": "a", "images": plain_image()}, "the text has 0, got 1"),
            ({"text": ["<image>", "a"], "images": [[], [plain_image()]]}, "prompt 0 has 1, got 0"),
            ({"text": ["<image>", "a"], "images": [[plain_image()]]}, r"one list per prompt \(2\), got 1"),
            ({"text": ["<image>"] * 2, "images": [[plain_image()], plain_image()]}, "a list of images; got list"),
            ({"text": "<image>", "images": 3}, "one of the image kinds or a list, got int"),
            ({"text": "<image>", "images": [3]}, "got int among them"),
            ({"text": "<image>", "images": [np.zeros(4)]}, r"got ndarray of shape \(4,\) among them"),
            ({"text": "<video>"}, "`videos` must be as many as the placeholders `<video>`"),
            ({"text": "<video>", "videos": np.zeros((0, 4, 4, 3), np.uint8)}, "at least one frame"),
            ({"text": "<video>", "videos": [plain_image()] * 3, "do_sample_frames": False}, "must have 2 frames each"),
            ({"text": "a", "audio": np.zeros(9)}, "`audio` must be None"),
            ({"text": [3]}, "`text` must be a string or a list of strings"),
            ({"images": plain_image()}, "`text` must be a string or a list of strings"),
            (
                {"text": "a", "truncation": True, "max_length": 1},
                "`truncation` must be off for a prompt of 2 positions where 1 are allowed",
            ),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            PROCESSOR(**options)

    def test_number_of_frames(self):
        video = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        inputs = PROCESSOR(text="<video>", videos=video, num_frames=3)
        assert torch.equal(
            inputs["pixel_values"], PROCESSOR(text="<video>", videos=video[::2], num_frames=3).pixel_values
        )
        assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == 3 * CELLS
        assert len(PROCESSOR(text="<video>", videos=video)["pixel_values"]) == PROCESSOR.num_video_frames == 2
        with pytest.raises(ValueError, match="`num_frames` must be"):
            PROCESSOR(text="<video>", videos=video, num_frames=0)

    def test_truncation_that_cuts_nothing(self):
        plain = PROCESSOR(text=["a", "a cat"])
        given = PROCESSOR(text=["a", "a cat"], truncation=True, max_length=plain["input_ids"].shape[1])
        assert torch.equal(given["input_ids"], plain["input_ids"])

    def test_unknown_mode(self):
        with pytest.raises(Exception, match="generation_mode"):
            PROCESSOR(text="a", generation_mode="audio")
        with pytest.raises(ValueError, match="`generation_mode` must be one of"):
            PROCESSOR.post_process_multimodal_output(torch.zeros(1, 3, 4, 4), generation_mode="audio")


def test_codes_in_place_of_images():
    processor = tiny_processor()
    codes = [torch.randint(CODES, (CELLS, DEPTH)) for _ in range(2)]
    batch = processor(text=["<image>\na", "<image>\nb"], images=codes)
    assert torch.equal(batch["image_codes"], torch.stack(codes))
    assert "pixel_values" not in batch
    gray = torch.zeros(32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must all be images or all codes, got 1 codes among 2"):
        processor(text="<image>\n<image>\na", images=[codes[0], gray])
    with pytest.raises(ValueError, match=r"must be \[16, D\], got \[15, 3\]"):
        processor(text="<image>\na", images=[codes[0][1:]])


class TestOptionsOfTransformers:
    """What its processors take is done or refused, never ignored."""

    TEXT = ("a <image>b", "c <image> d <image>")

    def call(self, **options):
        return PROCESSOR(images=[[plain_image()], [plain_image(), plain_image()]], text=list(self.TEXT), **options)

    @pytest.mark.parametrize("kind", ["pt", "np", None])
    def test_types_of_tokens(self, kind):
        batch = self.call(return_mm_token_type_ids=True, return_tensors=kind)
        ids, types = batch["input_ids"], batch["mm_token_type_ids"]
        assert type(types) is type(ids)
        assert np.array(types).tolist() == (np.array(ids) == PROCESSOR.image_token_id).astype(int).tolist()
        assert np.array(types).sum(1).tolist() == [CELLS, 2 * CELLS]
        assert "mm_token_type_ids" not in self.call()

    def test_places_of_images(self):
        moved = self.call(return_text_replacement_offsets=True)["text_replacement_offsets"]
        assert [
            [text[slice(*move["span"])] for move in moves] for text, moves in zip(self.TEXT, moved, strict=True)
        ] == [
            ["<image>"],
            ["<image>"] * 2,
        ]
        assert "offset_mapping" not in self.call(return_text_replacement_offsets=True)
        assert "text_replacement_offsets" not in self.call(return_offsets_mapping=True)

    def test_without_masks(self):
        made = PROCESSOR(text="a", generation_mode="image", return_attention_mask=False)
        assert set(made) == {"input_ids", "negative_input_ids"}

    def test_counts_for_servers(self):
        counts = PROCESSOR._get_num_multimodal_tokens(image_sizes=[(64, 32), (10, 10)], video_sizes=[(9, 64, 64)])
        assert counts["num_image_tokens"] == [CELLS, CELLS]
        assert counts["num_image_patches"] == [1, 1]
        assert counts["num_video_tokens"] == [2 * CELLS]
        longer = PROCESSOR._get_num_multimodal_tokens(video_sizes=[(9, 64, 64)], num_frames=3)
        assert longer["num_video_tokens"] == [3 * CELLS]
        assert self.call()["input_ids"][1].eq(PROCESSOR.image_token_id).sum() == sum(counts["num_image_tokens"])
        assert "num_video_tokens" not in PROCESSOR._get_num_multimodal_tokens(image_sizes=[])

    @pytest.mark.parametrize(
        "options",
        [
            {"return_length": True},
            {"text_pair": "b"},
            {"sanitize_control_tokens": True},
            {"text_kwargs": {"stride": 4}},
            {"fps": 4},
            {"videos_kwargs": {"do_resize": False}},
            {"audio_kwargs": {"sampling_rate": 16000}},
        ],
        ids=str,
    )
    def test_refused(self, options):
        with pytest.raises(ValueError, match="must be left out: this processor does not support it"):
            self.call(**options)

    def test_obeyed(self):
        plain = self.call()
        same = self.call(return_length=False, videos_kwargs={"return_tensors": "pt"}, do_resize=True, verbose=True)
        assert set(same) == set(plain)
        assert same["pixel_values"].equal(plain["pixel_values"])
