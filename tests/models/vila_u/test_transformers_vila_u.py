"""What people do with any model of transformers: compile, resize, write after embeddings, checkpoint, tag."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForMultimodalLM, DynamicCache

from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from tests.models.vila_u.tiny import (
    BOS,
    CELLS,
    DEPTH,
    GREEDY,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKENS,
    PROMPTS,
    VOCABULARY,
    batch,
    prompt,
    shared_model,
    tiny_config,
    tiny_model,
    tiny_text_config,
)


ROWS = [BOS, *IMAGE_TOKENS, 8], [BOS, 9, IMAGE_START, *IMAGE_TOKENS, IMAGE_END, 10]


@torch.no_grad()
def test_compiles_to_one_graph():
    model, graphs = tiny_model(text_config=tiny_text_config(num_hidden_layers=1)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert compiled(**batch(*ROWS), use_cache=False).logits.equal(model(**batch(*ROWS), use_cache=False).logits)
    assert len(graphs) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_resized_and_saved(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    model.save_pretrained(tmp_path)
    read = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert (read.lm_head.weight is read.get_input_embeddings().weight) == tied
    with torch.no_grad():
        logits = read(**batch(*ROWS)).logits
        assert logits.shape[-1] == read.config.text_config.vocab_size == VOCABULARY + 8
        assert logits.equal(model(**batch(*ROWS)).logits)
    assert read.generate(**prompt(*PROMPTS), **GREEDY).equal(model.generate(**prompt(*PROMPTS), **GREEDY))


def test_text_after_embeddings():
    model, inputs = shared_model(), batch(*ROWS)
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    reference = model.generate(**inputs, **new)[:, -6:]
    features = model.get_image_features(image_codes=inputs["image_codes"])
    embeds = model.model.embed(inputs["input_ids"], features.pooler_output)
    assert model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **new).equal(reference)


@torch.no_grad()
def test_a_cache_by_default_unless_there_are_labels():
    model = shared_model()
    assert isinstance(model(**batch(*ROWS)).past_key_values, DynamicCache)
    assert model(**batch(*ROWS), use_cache=False).past_key_values is None
    assert model(**batch(*ROWS), labels=batch(*ROWS)["input_ids"]).past_key_values is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_either_kind_reaches_every_weight(reentrant):
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch(*ROWS), labels=batch(*ROWS)["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_tags_are_of_one_model():
    """What `push_to_hub` writes into the card; tags that it is given belong to that model alone."""
    first, second = (VilaUForConditionalGeneration(tiny_config()) for _ in range(2))
    first.add_model_tags("cats")
    assert first.model_tags == ["vila-u", "diffusers_sana", "cats"]
    assert second.model_tags == ["vila-u", "diffusers_sana"]


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_outputs_by_position(training):
    """As in every model of transformers: the loss first, where there are labels, then logits."""
    model, inputs = shared_model(), batch(*ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs)
    assert list(outputs) == ["logits", "past_key_values", "image_hidden_states"]
    assert outputs[0] is outputs.logits
    logits, cache, _ = model(**inputs, return_dict=False)
    assert logits.equal(outputs.logits)
    assert isinstance(cache, DynamicCache)
    try:
        model.train(training)
        learned = model(**inputs, labels=labels)
        first = model(**inputs, labels=labels, return_dict=False)[0]
    finally:
        model.eval()
    assert list(learned)[:3] == ["loss", "text_loss", "visual_loss"]
    assert learned[0] is learned.loss
    assert first.ndim == 0
    if not training:
        assert list(learned)[3:] == ["logits", "depth_logits", "image_hidden_states"]


@torch.no_grad()
def test_states_of_the_image_encoder():
    model = tiny_model()
    model.set_attn_implementation("eager")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = model.get_image_features(pixels)
    assert (plain.hidden_states, plain.attentions) == (None, None)
    features = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    blocks = len(model.model.vision_tower.layers)
    assert [tuple(state.shape) for state in features.hidden_states] == [(2, CELLS, 32)] * (blocks + 1)
    assert [tuple(weights.shape) for weights in features.attentions] == [(2, 4, CELLS, CELLS)] * blocks
    encoded = model.model.vision_tower.encode(pixels).flatten(1, 2)
    assert features.hidden_states[-1].equal(encoded)
    for name in ("last_hidden_state", "pooler_output", "codes"):
        assert features[name].equal(plain[name])
    assert model.get_image_features(image_codes=plain.codes).pooler_output.equal(plain.pooler_output)
    with pytest.raises(ValueError, match="need `pixel_values`"):
        model.get_image_features(image_codes=plain.codes, output_hidden_states=True)
    model.config.vision_config.output_hidden_states = True
    assert len(model.get_image_features(pixels).hidden_states) == blocks + 1


def test_arguments_that_nobody_obeys_are_refused():
    model, pixels = shared_model(), torch.zeros(1, 3, 32, 32)
    tower, states = model.model.vision_tower, torch.zeros(1, 64)
    for call in (
        lambda: model.get_image_features(pixels, output_hidden_state=True),
        lambda: tower(pixels, num_items_in_batch=2),
        lambda: tower.encode(pixels, return_dict=True),
        lambda: model.depth_transformer(states, torch.zeros(1, DEPTH, 32), use_cache=True),
        lambda: model.generate(torch.tensor([[BOS, 5]]), max_new_token=2),
    ):
        with pytest.raises((TypeError, ValueError), match=r"unexpected keyword argument|are not used by the model"):
            call()


def test_a_tied_head_is_split_as_its_table_is():
    """Tensor parallelism splits the table of a tied model by rows, so the head needs its own entry."""
    assert tiny_model(tie_word_embeddings=True).tp_plan["lm_head"] == "colwise_gather_output"
