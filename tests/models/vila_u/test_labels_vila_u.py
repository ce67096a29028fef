"""Labels that the processor makes of chats: what the assistant says, its images included, and nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.vila_u.tiny import CELLS, DEPTH, EOS, IMAGE, IMAGE_END, IMAGE_START, VIDEO_END, VIDEO_START
from tests.models.vila_u.tiny import tiny_model as make_model
from tests.models.vila_u.tiny_processor import tiny_processor


PROCESSOR = tiny_processor()
SPACE, A, CAT, NEW_LINE = (PROCESSOR.tokenizer.convert_tokens_to_ids(piece) for piece in ("▁", "▁a", "cat", "<0x0A>"))
IMAGE_PART = {"type": "image", "image": Image.new("RGB", (9, 5))}
VIDEO = {"type": "video", "video": [Image.new("RGB", (9, 5))] * 2}
CELLS_OF_ONE = [IMAGE] * CELLS


def text(content):
    return {"type": "text", "text": content}


def turns(*contents):
    """Of user and assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


# A chat, and what the assistant says in it, answer by answer.
GENERATION = turns("a cat", [IMAGE_PART]), [[SPACE, IMAGE_START, *CELLS_OF_ONE, IMAGE_END, EOS]]
UNDERSTANDING = turns([IMAGE_PART, text("cat?")], "a cat"), [[A, SPACE, CAT, EOS]]
CHAT = turns("a", "cat", "ASSISTANT: a</s>", "a"), [[SPACE, CAT, EOS], [A, EOS]]
MEDIA = (
    turns([IMAGE_PART, VIDEO, text("cat")], [text("\ncat "), VIDEO, text("\n"), IMAGE_PART]),
    [
        [
            *(SPACE, NEW_LINE, CAT, SPACE),
            *(VIDEO_START, *CELLS_OF_ONE * 2, VIDEO_END, NEW_LINE),
            *(IMAGE_START, *CELLS_OF_ONE, IMAGE_END, EOS),
        ]
    ],
)
BARE = turns([IMAGE_PART], "a <image>\ncat"), [[A, SPACE, *CELLS_OF_ONE, SPACE, NEW_LINE, CAT, EOS]]


def inputs_of(chats, *options, **processor_kwargs):
    fields = {"tokenize": True, "return_dict": True, "processor_kwargs": processor_kwargs}
    return PROCESSOR.apply_chat_template(chats, **fields, **dict.fromkeys(options or ["output_labels"], True))


def ids_of(chat, **options):
    return PROCESSOR.apply_chat_template(chat, tokenize=True, return_dict=True, **options)["input_ids"][0].tolist()


def by_hand(chat, answers):
    """Ids and labels: an answer stands between the prompt before it and the rest."""
    row, labels = ids_of(chat), []
    for number, answer in enumerate(answers):
        start = len(ids_of(chat[: 2 * number + 1], add_generation_prompt=True))
        assert row[start : start + len(answer)] == answer
        labels += [-100] * (start - len(labels)) + answer
    assert len(labels) == len(row)
    return row, labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_by_hand(side):
    samples = [GENERATION, UNDERSTANDING, CHAT, MEDIA]
    batch = inputs_of([chat for chat, _ in samples], padding_side=side)
    assert batch["labels"].dtype == torch.long
    assert "assistant_masks" not in batch
    for index, sample in enumerate(samples):
        seen = batch["attention_mask"][index].bool()
        row, labels = by_hand(*sample)
        assert batch["input_ids"][index][seen].tolist() == row
        assert batch["labels"][index][seen].tolist() == labels
        assert (batch["labels"][index][~seen] == -100).all()


def test_wrapped_images():
    """Marks that are added move what stands behind them."""
    chat, [answer] = MEDIA
    labels = inputs_of(chat, wrap_image_tokens=True)["labels"][0]
    assert labels[labels != -100].tolist() == answer
    assert labels[-len(answer) :].tolist() == answer


def test_an_image_without_its_marks():
    """The text behind it starts with a space that is no character of the chat, and still is to be learned."""
    chat, [answer] = BARE
    batch = PROCESSOR.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        output_labels=True,
        processor_kwargs={"images": [IMAGE_PART["image"]] * 2},
    )
    assert batch["labels"][0, -len(answer) :].tolist() == answer
    assert (batch["labels"][0, : -len(answer)] == -100).all()


def test_mask_as_in_other_processors():
    chat, _ = CHAT
    both = inputs_of(chat, "output_labels", "return_assistant_tokens_mask")
    alone = inputs_of(chat, "return_assistant_tokens_mask")
    assert "labels" not in alone
    assert both["assistant_masks"] == alone["assistant_masks"] == (both["labels"] != -100).long().tolist()
    assert not {"offset_mapping", "text_replacement_offsets"} & set(both)


def test_lists_and_arrays():
    chats = [GENERATION[0], CHAT[0]]
    rows = inputs_of(chats, padding=False, return_tensors=None)["labels"]
    assert rows == [by_hand(*GENERATION)[1], by_hand(*CHAT)[1]]
    arrays = inputs_of(chats, return_tensors="np")["labels"]
    assert isinstance(arrays, np.ndarray)
    assert arrays.tolist() == inputs_of(chats)["labels"].tolist()


def test_a_batch_trains():
    """Both losses, over the targets that were counted by hand; no other option is needed."""
    model = make_model().train()
    outputs = model(**inputs_of([GENERATION[0], UNDERSTANDING[0]]), return_logits=True)
    assert outputs.text_loss > 0
    assert outputs.visual_loss > 0
    assert outputs.depth_logits.shape[:2] == (CELLS, DEPTH)
    outputs.loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.startswith("depth_transformer."))
    chat = model(**inputs_of([UNDERSTANDING[0], CHAT[0]]))
    assert chat.text_loss > 0
    assert chat.visual_loss == 0


def test_refused():
    chat, _ = CHAT
    with pytest.raises(ValueError, match="needs `tokenize=True, return_dict=True`"):
        PROCESSOR.apply_chat_template(chat, output_labels=True)
    with pytest.raises(ValueError, match="no `generation_mode`"):
        inputs_of(chat, generation_mode="image")
    with pytest.raises(ValueError, match="chat 1 has none"):
        inputs_of([chat, chat[:1]])
    with pytest.raises(ValueError, match=r"must mark answers with \{% generation %\}"):
        PROCESSOR.apply_chat_template(
            chat, "{{ messages[1].content }}", output_labels=True, tokenize=True, return_dict=True
        )
