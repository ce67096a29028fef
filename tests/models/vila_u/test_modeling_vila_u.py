"""The models: images among text, text generation, saving, training helpers, compilation, overfitting."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration, VilaUModel
from tests.models.vila_u.tiny import (
    BOS,
    CELLS,
    DEPTH,
    EOS,
    GREEDY,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKENS,
    PROMPTS,
    VOCABULARY,
    WIDTH,
    batch,
    ids,
    prompt,
    random_codes,
    shared_model,
    tiny_config,
    tiny_depth_config,
    tiny_model,
)


TEXT = [BOS, 5, 6, 7]
ONE = [BOS, *IMAGE_TOKENS, 8]
TWO = [BOS, *IMAGE_TOKENS, 9, *IMAGE_TOKENS, 10, 11]
NEW = {"max_new_tokens": 8, "min_new_tokens": 8}


def write(model, *rows: list[int], **options) -> torch.Tensor:
    """The new tokens."""
    inputs = batch(*rows)
    return model.generate(**inputs, **{"do_sample": False, **NEW, **options})[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def uncached(model, row: list[int], steps: int = 8) -> list[int]:
    inputs = batch(row)
    inputs.pop("attention_mask")
    for _ in range(steps):
        logits = model(**inputs, use_cache=False).logits[:, -1:]
        logits[..., EOS] = -torch.inf  # as `min_new_tokens` does
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1)], 1)
    return inputs["input_ids"][0, len(row) :].tolist()


def test_text_is_written_as_without_a_cache():
    """Text alone, one and two images, in one left-padded batch; each cache; pixels or codes."""
    model = shared_model()
    gold = torch.tensor([uncached(model, TEXT), *(uncached(model, row) for row in (ONE, TWO))])
    assert write(model, TEXT).equal(gold[:1])
    assert write(model, TEXT, cache_implementation="static").equal(gold[:1])
    assert write(model, TEXT, past_key_values=DynamicCache(config=model.config.text_config)).equal(gold[:1])
    assert write(model, TWO, cache_implementation="static").equal(gold[2:])
    inputs = batch(TEXT, ONE, TWO)
    inputs["image_codes"] = torch.cat([random_codes(1), random_codes(2)])
    written = model.generate(**inputs, do_sample=False, **NEW)
    assert written[:, -8:].equal(gold)
    pixels = torch.rand(1, 3, 32, 32)
    ids_of_one = torch.tensor([ONE])
    by_pixels = model.generate(input_ids=ids_of_one, pixel_values=pixels, do_sample=False, **NEW)
    seen = model.model.vision_tower.encode_to_codes(pixels)
    assert by_pixels.equal(model.generate(input_ids=ids_of_one, image_codes=seen, do_sample=False, **NEW))


def test_sampling_and_beams():
    model = shared_model()
    torch.manual_seed(0)
    sampled = write(model, TEXT, do_sample=True, num_return_sequences=4)
    assert sampled.unique(dim=0).shape[0] > 1
    # The images follow their rows, whose numbers of images differ.
    beams = write(model, ONE, TWO, num_beams=3)
    inputs = batch(ONE, TWO)
    for index, (row, own) in enumerate(((ONE, inputs["image_codes"][:1]), (TWO, inputs["image_codes"][1:]))):
        alone = model.generate(input_ids=torch.tensor([row]), image_codes=own, num_beams=3, do_sample=False, **NEW)
        assert beams[index].tolist() == alone[0, len(row) :].tolist()


def test_processors_of_logits_meet_no_placeholder():
    """It lies outside the vocabulary, where a repetition penalty would read past the end."""
    model = shared_model()
    plain = write(model, ONE)
    assert not write(model, ONE, repetition_penalty=50.0).equal(plain)
    assert write(model, ONE, repetition_penalty=1.0).equal(plain)


def test_a_table_with_a_row_for_the_placeholder():
    """After resizing, the placeholder has a row and a logit, but is still an image when read and never written."""
    model = tiny_model()
    before, old = write(model, ONE), model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    assert model.config.text_config.vocab_size == VOCABULARY + 8
    assert model.get_input_embeddings().weight[:VOCABULARY].equal(old)
    assert model.lm_head.weight.shape == (VOCABULARY + 8, WIDTH)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 0
        model.lm_head.weight[IMAGE] = 100 * model.lm_head.weight[before[0, 0]]
    assert write(model, ONE).equal(before)
    assert write(model, ONE, do_sample=True, num_return_sequences=20).ne(IMAGE).all()


@torch.no_grad()
def test_inputs_embeds_and_caches_in_forward():
    model = shared_model()
    inputs = batch(TWO)
    gold = model(**inputs).logits
    features = model.get_image_features(image_codes=inputs["image_codes"])
    embeds = model.model.embed(inputs["input_ids"], features.pooler_output)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, gold)
    torch.testing.assert_close(model(inputs["input_ids"], mm_encoder_outputs={"image": features}).logits, gold)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, gold[:, -2:])
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert outputs.image_hidden_states.shape == (2, CELLS, WIDTH)
    for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, len(TWO))):
        start = {"input_ids": inputs["input_ids"][:, :-2], "image_codes": inputs["image_codes"]}
        first = model(**start, past_key_values=cache, use_cache=True).logits
        rest = [
            model(inputs["input_ids"][:, index : index + 1], past_key_values=cache, use_cache=True).logits
            for index in (len(TWO) - 2, len(TWO) - 1)
        ]
        torch.testing.assert_close(torch.cat([first, *rest], 1), gold, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_in_its_place():
    """The embedding of a cell is the projector of the sum of its entries."""
    model = shared_model()
    inputs = batch(TEXT + IMAGE_TOKENS + [9])
    features = model.get_image_features(image_codes=inputs["image_codes"])
    embeds = model.model.embed(inputs["input_ids"], features.pooler_output)[0]
    table, (first, _, last) = model.get_input_embeddings().weight, model.model.projector
    for cell, of_cell in enumerate(inputs["image_codes"][0]):
        total = sum(model.model.vision_tower.quantizer.embedding.weight[code] for code in of_cell)
        torch.testing.assert_close(embeds[len(TEXT) + cell], last(torch.nn.functional.gelu(first(total))))
    assert embeds[: len(TEXT)].equal(table[TEXT])
    assert embeds[-1].equal(table[9])
    assert features.codes.equal(inputs["image_codes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_codes": random_codes(2)}, "32 times for the given images, got 16"),
        ({"image_codes": None}, "0 times for the given images, got 16"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "exactly one of `pixel_values` and `image_codes`"),
        ({"inputs_embeds": torch.zeros(1, 2, WIDTH)}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"inputs_embeds": torch.zeros(1, 2, WIDTH), "input_ids": None}, "images need `input_ids`"),
        ({"mm_encoder_outputs": {"image": object()}}, "only one of `pixel_values`"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        shared_model()(**(batch(ONE) | change))


@torch.no_grad()
def test_attention_implementations_agree():
    model = tiny_model()
    inputs = batch(ONE, TWO)
    seen = inputs["attention_mask"].bool()
    sdpa = model(**inputs).logits[seen]
    model.set_attn_implementation("eager")
    assert {part.config._attn_implementation for part in (model.depth_transformer, model.model.vision_tower)} == {
        "eager"
    }
    torch.testing.assert_close(model(**inputs).logits[seen], sdpa, atol=1e-4, rtol=1e-4)


def test_saving(tmp_path):
    model = shared_model()
    inputs = batch(ONE)
    model.save_pretrained(tmp_path)
    read, report = VilaUForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.model.vision_tower.parameters())
    with torch.no_grad():
        assert read(**inputs).logits.equal(model(**inputs).logits)
        base = VilaUModel.from_pretrained(tmp_path)
        assert base(**inputs).last_hidden_state.equal(model.model(**inputs).last_hidden_state)
    half = VilaUForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    written = half.generate(**inputs, generation_mode="image", guidance_scale=1.0, generator=torch.manual_seed(0))
    assert written.shape == (1, CELLS, DEPTH)
    assert half.decode_image_tokens(written).dtype == torch.bfloat16


def test_on_the_meta_device():
    """What has to be built without memory, and which blocks stay whole when devices are assigned."""
    with torch.device("meta"):
        model = VilaUForConditionalGeneration(VilaUConfig())
    assert all(parameter.is_meta for parameter in model.parameters())
    # The numbers of parameters of the released checkpoint, without what only training needs.
    assert model.depth_transformer.num_parameters() == 527_145_984
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_636_826_243
    assert {"LlamaDecoderLayer", "VilaUDepthLayer", "VilaUVisionBlock"} <= set(model._no_split_modules)


def test_offloaded_to_disk(tmp_path):
    """Parts that generation calls by other ways than `forward` are fetched all the same."""
    shared_model().save_pretrained(tmp_path / "model")
    gold = shared_model().generate(**prompt(*PROMPTS), **GREEDY)
    places = {"model.vision_tower": "disk", "depth_transformer": "disk"}
    places |= dict.fromkeys(("model.projector", "model.language_model", "lm_head"), "cpu")
    model = VilaUForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert model.depth_transformer.head.weight.is_meta
    assert model.generate(**prompt(*PROMPTS), **GREEDY).equal(gold)
    assert model.decode_image_tokens(gold).equal(shared_model().decode_image_tokens(gold))


def test_tied_heads(tmp_path):
    model = VilaUForConditionalGeneration(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    read = VilaUForConditionalGeneration.from_pretrained(tmp_path)
    assert read.lm_head.weight is read.get_input_embeddings().weight


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(depth_config=tiny_depth_config(dropout=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.depth_transformer.layers[0].gradient_checkpointing
            assert model.model.language_model.layers[0].gradient_checkpointing
        inputs = batch(TWO)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_memorizes_images():
    """The model overfits eight images, and generates them again from their prompts, greedily and without guidance."""
    torch.manual_seed(0)
    model = VilaUForConditionalGeneration(tiny_config(depth_config=tiny_depth_config(dropout=0.0)))
    pictures = random_codes(8)
    rows = [[BOS, 20 + index, IMAGE_START, *IMAGE_TOKENS, IMAGE_END, EOS] for index in range(8)]
    input_ids = torch.tensor(rows)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=4e-3, weight_decay=0.0
    )
    model.train()
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10)
        outputs = model(input_ids=input_ids, image_codes=pictures, labels=input_ids)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if outputs.visual_loss < 0.04:
            break
    assert outputs.visual_loss < 0.05
    model.eval()
    options = {"generation_mode": "image", "guidance_scale": 1.0, "do_sample": False}
    assert model.generate(input_ids=input_ids[:, :3], **options).equal(pictures)
    with_pictures = {"input_ids": input_ids[:, : 3 + CELLS], "image_codes": pictures}
    ends = model.generate(**with_pictures, max_new_tokens=2, do_sample=False)
    assert ends[:, -2:].tolist() == [[IMAGE_END, EOS]] * 8


@pytest.mark.parametrize("with_head", [True, False])
def test_arguments_that_nobody_reads_are_named(with_head, caplog):
    """transformers hands them down to the function of the attention, which may be the user's own."""
    model = shared_model() if with_head else shared_model().model
    input_ids, mask = ids(TEXT)
    known = {"output_attentions": False, "mm_token_type_ids": torch.zeros_like(input_ids)}
    expected = model(input_ids, mask, **known)[0]
    assert not caplog.records
    given = model(input_ids, mask, **known, **{f"pixel_value_{with_head}": 1, "atention_mask": mask})[0]
    assert torch.equal(given, expected)
    (record,) = caplog.records
    assert f"`atention_mask`, `pixel_value_{with_head}`: no argument of VilaUModel" in record.getMessage()
