"""Options of transformers' `generate` that index by token id or read the prompt again, with an image in the prompt."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from tests.models.vila_u.tiny import (
    BOS,
    CELLS,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    VOCABULARY,
    random_codes,
    shared_model,
    tiny_model,
)
from tests.models.vila_u.tiny_processor import tiny_tokenizer


ROW = [BOS, *IMAGE_TOKENS, 5, 6, 7, 9, 5, 6]
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def inputs(*rows: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(rows), "image_codes": random_codes(len(rows))}


def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def next_logits(model, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(row), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("row", [ROW, [BOS, 5, *IMAGE_TOKENS]], ids=["text behind", "image at the end"])
@pytest.mark.parametrize("ngram", [1, 2])
def test_prompt_lookup_writes_the_same(row, ngram):
    model = shared_model()
    reference = model.generate(**inputs(row), **NEW)
    looked_up = model.generate(**inputs(row), **NEW, prompt_lookup_num_tokens=3, max_matching_ngram_size=ngram)
    assert looked_up.equal(reference)


def test_prompt_lookup_saves_passes():
    """This model soon repeats itself, which the lookup finds behind the image."""
    model, passes = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    longer = NEW | {"max_new_tokens": 32}
    reference = model.generate(**inputs(ROW), **longer)
    assert len(passes) == len(reference[0]) - len(ROW)
    passes.clear()
    assert model.generate(**inputs(ROW), **longer, prompt_lookup_num_tokens=4).equal(reference)
    assert len(passes) < len(reference[0]) - len(ROW)


@pytest.mark.parametrize("as_pixels", [False, True])
def test_an_assistant_sees_the_images(as_pixels):
    model = shared_model()
    given = {"input_ids": torch.tensor([ROW]), "pixel_values": pixels()} if as_pixels else inputs(ROW)
    reference = model.generate(**given, **NEW)
    assistant, seen = copy.deepcopy(model), []
    assistant.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"], kwargs["mm_encoder_outputs"])), with_kwargs=True
    )
    assert model.generate(**given, **NEW, assistant_model=assistant).equal(reference)
    read, features = seen[0]
    assert read.tolist() == [ROW]
    assert features["image"].pooler_output.shape[:2] == (1, CELLS)
    # The same model proposes what is written: it reads the prompt once, and then token after token.
    assert all(images is None for ids, images in seen[1:])
    assert all(len(ids[0]) < len(ROW) for ids, images in seen[1:])
    assert model.generate(**given, **NEW, assistant_model=tiny_model(seed=1)).equal(reference)


def test_encoder_repetition_penalty():
    """Favors what is in the prompt, by its formula; nothing that is not in it, and not the padding, is touched."""
    model = shared_model()
    logits, penalty = next_logits(model, ROW), 1.7
    reference = logits.clone()
    for token in {BOS, 5, 6, 7, 9}:
        reference[token] = logits[token] * penalty if logits[token] > 0 else logits[token] / penalty
    one = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    outputs = model.generate(**inputs(ROW), **one, encoder_repetition_penalty=penalty)
    torch.testing.assert_close(outputs.scores[0][0], reference)


class TestHealing:
    """`token_healing`: the last token is chosen anew, knowing the image, among those that begin with its text."""

    tokenizer = tiny_tokenizer()

    def choices(self, token: str) -> list[int]:
        vocabulary, special = self.tokenizer.get_vocab(), self.tokenizer.all_special_ids
        return [index for text, index in vocabulary.items() if text.startswith(token) and index not in special]

    def write(self, model, *rows, **options):
        return model.generate(**inputs(*rows), **NEW, tokenizer=self.tokenizer, **options)

    @pytest.mark.parametrize("token", ["c", "U", "▁", "7"])
    def test_as_by_hand(self, token):
        model = shared_model()
        last, head = self.tokenizer.convert_tokens_to_ids(token), ROW[:-2]
        logits = next_logits(model, head)
        logits[last] += 1
        best = max(self.choices(token), key=lambda index: logits[index])
        healed = self.write(model, [*head, last], token_healing=True)
        assert healed.equal(self.write(model, [*head, best], token_healing=False))
        assert healed[0, : len(head) + 1].tolist() == [*head, best]

    def test_every_row_and_its_own_image(self):
        model, ids = shared_model(), self.tokenizer.convert_tokens_to_ids(["c", "U"])
        rows = [[*ROW[:-1], token] for token in ids]
        both = self.write(model, *rows, token_healing=True)
        codes = inputs(*rows)["image_codes"]
        for index, row in enumerate(rows):
            alone = {"input_ids": torch.tensor([row]), "image_codes": codes[index : index + 1]}
            healed = model.generate(**alone, **NEW, tokenizer=self.tokenizer, token_healing=True)
            assert healed.equal(both[index : index + 1])

    def test_what_is_no_text_stays(self):
        model = shared_model()
        for row in ([BOS, 5, *IMAGE_TOKENS], [BOS, *IMAGE_TOKENS, 5, EOS]):
            assert self.write(model, row, token_healing=True)[0, : len(row)].tolist() == row

    def test_from_a_configuration_and_with_pixels(self):
        model, head = shared_model(), ROW[:-2]
        row = [*head, self.tokenizer.convert_tokens_to_ids("c")]
        given = {"input_ids": torch.tensor([row]), "pixel_values": pixels(), "tokenizer": self.tokenizer}
        by_option = model.generate(**given, **NEW, token_healing=True)
        by_config = model.generate(**given, generation_config=GenerationConfig(**NEW, token_healing=True))
        assert by_option.equal(by_config)

    def test_needs_the_tokenizer(self):
        with pytest.raises(ValueError, match="`token_healing` needs `tokenizer`"):
            shared_model().generate(**inputs(ROW), **NEW, token_healing=True)


def test_what_images_cannot_have():
    model = shared_model()
    with pytest.raises(ValueError, match="`assistant_tokenizer` must be None"):
        model.generate(
            **inputs(ROW), assistant_model=model, tokenizer=tiny_tokenizer(), assistant_tokenizer=tiny_tokenizer()
        )
    with pytest.raises(ValueError, match="`negative_prompt_ids` must be text only"):
        model.generate(**inputs(ROW), guidance_scale=2.0, negative_prompt_ids=torch.tensor([[BOS, *IMAGE_TOKENS]]))
    text = model.generate(torch.tensor([[BOS, 5, 6]]), **NEW, assistant_model=copy.deepcopy(model))
    assert text.equal(model.generate(torch.tensor([[BOS, 5, 6]]), **NEW))


def test_ids_stay_in_the_vocabulary():
    """What processors and lookups get: no placeholder, and nothing that the prompt has not."""
    from diffusers_sana.models.vila_u.batching_vila_u import without_placeholder

    rows = torch.tensor([[PAD, BOS, IMAGE, IMAGE, 7], [IMAGE, 5, IMAGE, 6, 7]])
    shown = without_placeholder(rows, IMAGE, PAD)
    assert shown.tolist() == [[PAD, BOS, PAD, PAD, 7], [PAD, 5, PAD, 6, 7]]
    assert without_placeholder(torch.tensor([[BOS, IMAGE]]), IMAGE, PAD).tolist() == [[BOS, BOS]]
    assert shown.max() < VOCABULARY
