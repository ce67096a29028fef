"""The depth transformer: its two ways through the slots, causality, dropout, compilation."""

import pytest
import torch

from diffusers_sana.models.vila_u.depth_vila_u import VilaUDepthCache, VilaUDepthTransformer
from tests.models.vila_u.tiny import CODES, DEPTH, WIDTH, tiny_depth_config


CELLS = 5


def make(seed: int = 0, **overrides) -> VilaUDepthTransformer:
    torch.manual_seed(seed)
    model = VilaUDepthTransformer._from_config(tiny_depth_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights hardly mix the slots
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_inputs(depth: int = DEPTH, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CELLS, WIDTH, generator=generator), torch.randn(CELLS, depth, 32, generator=generator)


def all_slots(model, hidden, embeddings) -> torch.Tensor:
    return model.head(model(hidden, embeddings).last_hidden_state)


def slot_by_slot(model, hidden, embeddings) -> torch.Tensor:
    cache = VilaUDepthCache(model.config)
    logits = [model.step(hidden, 0, cache)]
    for slot in range(1, model.config.num_codebooks):
        logits.append(model.step(embeddings[:, :slot].sum(1), slot, cache))
    return torch.stack(logits, 1)


def literal(model, hidden, embeddings) -> torch.Tensor:
    """The formulas of the paper, one slot of one cell at a time, on plain weights."""
    heads = model.config.num_attention_heads
    rows = []
    for state, entries in zip(hidden, embeddings, strict=True):
        inputs = [model.backbone_proj(state)]
        inputs += [model.code_proj(sum(entries[:slot])) for slot in range(1, model.config.num_codebooks)]
        x = torch.stack(inputs) + model.position_embedding.weight
        for layer in model.layers:
            attention, y = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (p(y).unflatten(-1, (heads, -1)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            mixed = torch.zeros_like(q)
            for slot in range(len(x)):
                for head in range(heads):
                    scores = k[: slot + 1, head] @ q[slot, head] / q.shape[-1] ** 0.5
                    mixed[slot, head] = scores.softmax(0) @ v[: slot + 1, head]
            x = x + attention.out_proj(mixed.flatten(1))
            x = x + layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(layer.layer_norm2(x))))
        rows.append(model.head(model.norm(x)))
    return torch.stack(rows)


@pytest.mark.parametrize("depth", [1, DEPTH, 6])
@torch.no_grad()
def test_slots_at_once_slot_by_slot_and_by_the_formulas(depth):
    model = make(num_codebooks=depth)
    inputs = make_inputs(depth)
    gold = literal(model, *inputs)
    assert gold.shape == (CELLS, depth, CODES)
    torch.testing.assert_close(all_slots(model, *inputs), gold, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slot_by_slot(model, *inputs), gold, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_serves_cell_after_cell():
    model = make()
    cache = VilaUDepthCache(model.config)
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    for hidden, embeddings in (first, second):
        logits = [model.step(hidden, 0, cache)]
        logits += [model.step(embeddings[:, :slot].sum(1), slot, cache) for slot in range(1, DEPTH)]
    assert torch.equal(torch.stack(logits, 1), slot_by_slot(model, *second))
    with pytest.raises(ValueError, match="in order from 0"):
        model.step(second[1][:, 0], 1, VilaUDepthCache(model.config))


@torch.no_grad()
def test_a_slot_does_not_see_its_code_nor_later_ones():
    model = make()
    hidden, embeddings = make_inputs()
    before = all_slots(model, hidden, embeddings)
    for code in range(DEPTH):
        changed = embeddings.clone()
        changed[:, code] += 1
        moved = (all_slots(model, hidden, changed) - before).abs().amax((0, 2)) > 0
        assert moved.tolist() == [slot > code for slot in range(DEPTH)]
    assert torch.equal(all_slots(model, hidden, embeddings[:, :-1]), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations(implementation):
    model = make()
    gold = literal(model, *make_inputs())
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(all_slots(model, *make_inputs()), gold, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slot_by_slot(model, *make_inputs()), gold, atol=1e-5, rtol=1e-5)
    outputs = model(*make_inputs(), output_attentions=implementation == "eager", output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    if implementation == "eager":
        assert outputs.attentions[0].shape == (CELLS, 4, DEPTH, DEPTH)
        assert (outputs.attentions[0].triu(1) == 0).all()


@torch.no_grad()
def test_dropout_in_training_only():
    model = make()
    inputs = make_inputs()
    assert torch.equal(all_slots(model, *inputs), all_slots(model, *inputs))
    model.train()
    assert not torch.equal(all_slots(model, *inputs), all_slots(model, *inputs))
    still = make(dropout=0.0).train()
    assert torch.equal(all_slots(still, *inputs), all_slots(still.eval(), *inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make(dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hidden, embeddings = make_inputs()
        all_slots(model, hidden.requires_grad_(), embeddings).square().mean().backward()
        gradients.append([hidden.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@torch.no_grad()
def test_half_precision():
    """Sums of entries are taken in float32 on both ways, so bfloat16 differs by its matrix products alone."""
    model = make().bfloat16()
    inputs = [tensor.bfloat16() for tensor in make_inputs()]
    gold = literal(model.float(), *(tensor.float() for tensor in inputs))
    model = model.bfloat16()
    for way in (all_slots, slot_by_slot):
        error = (way(model, *inputs).float() - gold).abs().max() / gold.abs().max()
        assert error < 0.03


@torch.no_grad()
def test_compiles_to_one_graph():
    model = make(num_hidden_layers=1)
    inputs = make_inputs()
    compiled = torch.compile(slot_by_slot, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(model, *inputs), slot_by_slot(model, *inputs))
