"""`VilaUPipeline.chat`: the answers are those of the model, one by one and in batches; what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana import VilaUPipeline
from tests.models.vila_u.tiny import shared_model
from tests.models.vila_u.tiny_processor import tiny_processor


RED = Image.new("RGB", (9, 5), (200, 20, 20))
GREY = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.fixture(scope="module")
def pipe():
    return VilaUPipeline(shared_model(), tiny_processor())


def expected(pipe, *parts):
    """The answer to one message, by way of the chat template."""
    chat = [{"role": "user", "content": list(parts)}]
    inputs = pipe.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = pipe.model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    return pipe.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_one(pipe):
    image, question = {"type": "image", "image": GREY}, {"type": "text", "text": "cat?"}
    video = {"type": "video", "video": [RED, GREY, RED]}
    answers = {
        pipe.chat(GREY, "cat?", max_new_tokens=6): expected(pipe, image, question),
        pipe.chat(None, "cat?", max_new_tokens=6): expected(pipe, question),
        pipe.chat(question="cat?", video=[RED, GREY, RED], max_new_tokens=6): expected(pipe, video, question),
    }
    assert len(answers) == 3
    assert all(answer == wanted for answer, wanted in answers.items())


def test_batch(pipe):
    """Rows with none, one and several images are answered as if alone."""
    images = [GREY, None, [RED, GREY]]
    answers = pipe.chat(images, "cat?", max_new_tokens=6)
    pair = [{"type": "image", "image": item} for item in (RED, GREY)]
    assert answers[:2] == [pipe.chat(item, "cat?", max_new_tokens=6) for item in images[:2]]
    assert answers[2] == expected(pipe, *pair, {"type": "text", "text": "cat?"})
    questions = ["cat?", "a"]
    assert pipe.chat(GREY, questions, max_new_tokens=6) == [
        pipe.chat(GREY, question, max_new_tokens=6) for question in questions
    ]
    videos = [[RED, GREY], [GREY, RED, RED]]
    assert pipe.chat(None, "a", videos, max_new_tokens=6) == [
        pipe.chat(None, "a", video, max_new_tokens=6) for video in videos
    ]


def test_path_and_sampling(pipe, tmp_path):
    GREY.save(tmp_path / "grey.png")
    kwargs = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0}
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(pipe.chat(str(tmp_path / "grey.png"), "cat?", **kwargs))
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "`question` must be a string or a list of strings, got None"),
        ({"question": []}, ValueError, "not empty, but are {'question': 0}"),
        ({"image": [None] * 2, "question": ["a"] * 3}, ValueError, "equally long and not empty, but are {'image': 2,"),
        ({"image": 3, "question": "a"}, ValueError, "`images` must hold images"),
        ({"image": "no-such-file.png", "question": "a"}, ValueError, "no-such-file.png"),
        ({"question": "a <image>"}, ValueError, "`images` must be as many as the placeholders"),
        ({"question": "a", "num_return_sequences": 2}, ValueError, "`num_return_sequences` must be 1"),
    ],
)
def test_errors(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe.chat(**arguments)
