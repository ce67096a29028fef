"""The losses against an implementation position by position; empty terms, chunks, packing, counts."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from diffusers_sana.models.vila_u import loss_vila_u
from diffusers_sana.models.vila_u.loss_vila_u import chunked_cross_entropy
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUModel
from tests.models.vila_u.tiny import (
    BOS,
    CELLS,
    CODES,
    DEPTH,
    EOS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKENS,
    VOCABULARY,
    ids,
    random_codes,
    shared_model,
    tiny_config,
    tiny_depth_config,
    tiny_model,
)


GENERATION = [BOS, 5, 6, IMAGE_START, *IMAGE_TOKENS, IMAGE_END, EOS]  # text to image: the image is the target
UNDERSTANDING = [BOS, *IMAGE_TOKENS, 7, 8, 9, EOS]  # image to text
CHAT = [BOS, 11, 12, 13, EOS]
INTERLEAVED = [BOS, *IMAGE_TOKENS, 14, IMAGE_START, *IMAGE_TOKENS, IMAGE_END, 15]


def labels_of(row: list[int], ignored: range) -> list[int]:
    return [-100 if index in ignored else token for index, token in enumerate(row)]


SAMPLES = {  # row and labels
    "generation": (GENERATION, labels_of(GENERATION, range(3))),
    "understanding": (UNDERSTANDING, labels_of(UNDERSTANDING, range(CELLS + 2))),
    "chat": (CHAT, labels_of(CHAT, range(2))),
    "interleaved": (INTERLEAVED, labels_of(INTERLEAVED, range(CELLS + 1))),
}
NUM_IMAGES = {"generation": 1, "understanding": 1, "chat": 0, "interleaved": 2}


def codes_for(names) -> torch.Tensor:
    count = sum(NUM_IMAGES[name] for name in names)
    return random_codes(count, seed=3)


def batch(*names: str, left: bool = False) -> dict[str, torch.Tensor]:
    input_ids, mask = ids(*(SAMPLES[name][0] for name in names), left=left)
    labels, _ = ids(*(SAMPLES[name][1] for name in names), left=left)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    if sum(NUM_IMAGES[name] for name in names):
        inputs["image_codes"] = codes_for(names)
    return inputs


@torch.no_grad()
def literal(model, names) -> tuple[list[float], list[float]]:
    """Every text and code cross-entropy, each sample alone, each position alone, on plain parts of the model."""
    text, visual = [], []
    pictures = iter(codes_for(names))
    for name in names:
        row, labels = SAMPLES[name]
        own = torch.stack([next(pictures) for _ in range(NUM_IMAGES[name])]) if NUM_IMAGES[name] else None
        states = model.model(input_ids=torch.tensor([row]), image_codes=own).last_hidden_state[0]
        cells = iter([] if own is None else own.flatten(0, 1))
        for position, (token, label) in enumerate(zip(row, labels, strict=True)):
            cell = next(cells) if token == IMAGE else None
            if label == -100:
                continue
            before = states[position - 1]
            if cell is None:
                text.append(cross_entropy(model.lm_head(before), torch.tensor(label)).item())
                continue
            entries = model.model.vision_tower.embed_code(cell)[None]
            slots = model.depth_transformer(before[None], entries).last_hidden_state[0]
            for slot, code in zip(slots, cell, strict=True):
                visual.append(cross_entropy(model.depth_transformer.head(slot), code).item())
    return text, visual


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


MIXES = [
    ("generation",),
    ("understanding",),
    ("chat",),
    ("generation", "understanding", "chat", "interleaved"),
    ("interleaved", "interleaved", "chat"),
]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("names", MIXES)
def test_position_by_position(names, left):
    model = shared_model()
    with torch.no_grad():
        outputs = model(**batch(*names, left=left))
    text, visual = literal(model, names)
    assert outputs.text_loss.item() == pytest.approx(mean(text), rel=1e-4)
    assert outputs.visual_loss.item() == pytest.approx(mean(visual), rel=1e-4)
    assert outputs.loss.item() == pytest.approx(mean(text) + mean(visual), rel=1e-4)
    assert len(visual) == CELLS * DEPTH * sum(name in ("generation", "interleaved") for name in names)
    assert outputs.depth_logits.shape == (len(visual) // DEPTH, DEPTH, CODES)
    if visual:
        again = cross_entropy(outputs.depth_logits.flatten(0, 1), target_codes(names).flatten())
        assert again.item() == pytest.approx(mean(visual), rel=1e-4)


def target_codes(names) -> torch.Tensor:
    pictures, chosen = iter(codes_for(names)), []
    for name in names:
        own = [next(pictures) for _ in range(NUM_IMAGES[name])]
        if name in ("generation", "interleaved"):
            chosen.append(own[-1])
    return torch.cat(chosen)


@torch.no_grad()
def test_packed():
    """One row, positions that start again: the same as the rows, and no sample is predicted from the one before."""
    model = shared_model()
    names = ("generation", "chat", "interleaved")
    rows = [SAMPLES[name][0] for name in names]
    labels = [label for name in names for label in SAMPLES[name][1]]
    labels[len(rows[0])] = BOS  # a collator that forgets to ignore it
    packed = model(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        labels=torch.tensor([labels]),
        image_codes=codes_for(names),
    )
    text, visual = literal(model, names)
    assert packed.text_loss.item() == pytest.approx(mean(text), rel=1e-4)
    assert packed.visual_loss.item() == pytest.approx(mean(visual), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("names", MIXES)
def test_labels_that_were_shifted_before(names):
    """`shift_labels`, as trainers that split sequences over processes give them: they count, `labels` do not."""
    model, inputs = shared_model(), batch(*names)
    gold, labels = model(**inputs), inputs.pop("labels")
    begins = inputs["attention_mask"].cumsum(1) == 1  # the first token of a row is predicted from nothing
    shifted = torch.nn.functional.pad(labels.masked_fill(begins, -100)[:, 1:], (0, 1), value=-100)
    for others in ({}, {"labels": torch.zeros_like(labels)}):
        outputs = model(**inputs, shift_labels=shifted, **others)
        for name in ("loss", "text_loss", "visual_loss", "depth_logits"):
            assert outputs[name].equal(gold[name])


@torch.no_grad()
def test_parts_of_a_sequence_have_the_losses_of_the_whole():
    """Each part knows what comes first in the next one, if it is text."""
    model, row = shared_model(), CHAT
    states = model(input_ids=torch.tensor([row]), output_hidden_states=True)
    gold = cross_entropy(states.logits[0, :-1], torch.tensor(row[1:]), reduction="none")
    part, shifted = torch.tensor([row[:3]]), torch.tensor([row[1:4]])
    assert model(input_ids=part, shift_labels=shifted).text_loss.item() == pytest.approx(gold[:3].mean().item())
    with pytest.raises(ValueError, match="`shift_labels` must not end with an image token"):
        model(input_ids=part, shift_labels=torch.tensor([[-100, -100, IMAGE]]))


def test_an_image_without_labels_is_no_target():
    inputs = batch("generation")
    inputs["labels"][inputs["input_ids"] == IMAGE] = -100
    outputs = shared_model()(**inputs)
    assert outputs.visual_loss == 0
    assert outputs.depth_logits.shape == (0, DEPTH, CODES)
    assert outputs.text_loss > 0


def test_empty_terms_have_zero_gradients_in_every_trained_weight():
    model = tiny_model().train()
    inputs = batch("chat")
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif name.startswith(("depth_transformer", "model.projector")):
            assert parameter.grad is not None, name
            assert not parameter.grad.any()
        else:
            assert parameter.grad.isfinite().all()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    model.zero_grad()
    outputs = model(**inputs)
    assert outputs.loss == 0
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_tower_is_frozen():
    model = tiny_model().train()
    assert not model.model.vision_tower.training
    assert not VilaUModel(tiny_config()).vision_tower.training
    inputs = batch("generation")
    del inputs["image_codes"]
    inputs["pixel_values"] = torch.rand(1, 3, 32, 32)
    model(**inputs).loss.backward()
    towers = [parameter for name, parameter in model.named_parameters() if "vision_tower" in name]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in towers)
    others = [parameter for name, parameter in model.named_parameters() if "vision_tower" not in name]
    assert all(parameter.grad.any() for parameter in others if parameter is not model.lm_head.weight)


def test_chunks_and_what_is_kept(monkeypatch):
    """Losses and gradients do not depend on the size of the chunks, and no logits of all positions exist."""
    gradients, losses = [], []
    for size in (7, 10_000):
        monkeypatch.setattr(loss_vila_u, "CHUNK_SIZE", size)
        model = tiny_model(depth_config=tiny_depth_config(dropout=0.0)).train()
        rows = []
        model.depth_transformer.head.register_forward_hook(
            lambda _, inputs, __, rows=rows: rows.append(len(inputs[0]))
        )
        outputs = model(**batch("generation", "interleaved"))
        assert outputs.logits is None
        assert outputs.depth_logits is None
        assert max(rows) == min(size, 2 * CELLS * DEPTH)
        outputs.loss.backward()
        losses.append(outputs.loss)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*losses)
    for few, many in zip(*gradients, strict=True):
        torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-4)
    assert model(**batch("chat"), return_logits=True).logits.shape == (1, len(CHAT), VOCABULARY)


def test_counts_of_a_larger_batch():
    """Micro-batches scored with the counts of the batch add up to the batch."""
    model = shared_model()
    names = ("generation", "understanding", "interleaved")
    text, visual = literal(model, names)
    counts = {"num_text_targets": len(text), "num_code_targets": torch.tensor(len(visual))}
    parts, used = [], 0
    everything = batch(*names)
    with torch.no_grad():
        whole = model(**everything)
        for index, name in enumerate(names):
            inputs = {key: everything[key][index : index + 1] for key in ("input_ids", "attention_mask", "labels")}
            inputs["image_codes"] = everything["image_codes"][used : used + NUM_IMAGES[name]]
            used += NUM_IMAGES[name]
            parts.append(model(**inputs, **counts))
    assert sum(part.text_loss for part in parts).item() == pytest.approx(whole.text_loss.item(), rel=1e-4)
    assert sum(part.visual_loss for part in parts).item() == pytest.approx(whole.visual_loss.item(), rel=1e-4)


def test_weight_of_the_visual_term():
    model = tiny_model(visual_loss_weight=0.25)
    with torch.no_grad():
        outputs = model(**batch("generation"))
    torch.testing.assert_close(outputs.loss, outputs.text_loss + 0.25 * outputs.visual_loss)


def test_chunked_cross_entropy_ignores():
    states, head = torch.randn(10, 4), torch.nn.Linear(4, 6)
    targets = torch.tensor([0, 1, -100, 3, -100, 5, 0, 1, 2, -100])
    gold = cross_entropy(head(states), targets, reduction="sum")
    for size in (1, 3, 10):
        torch.testing.assert_close(chunked_cross_entropy(states, targets, head, size), gold)
