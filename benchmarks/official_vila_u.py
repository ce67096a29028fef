"""How the official code of VILA-U makes images (mit-han-lab/vila-u, commit 096623c), over our weights.

Written from a description of what it computes and in which order, as something to measure against. Beside the loop it
has in common with ours:

- the depth transformer has no cache: for each code the whole cell so far is run again, all D codes are looked up and
  summed for it, and the logits are searched for NaN on the host;
- attention in the depth transformer is two batched products with a softmax between them and a mask made each time;
- what the language model is to read is projected twice: the first goes through the text head, a token is sampled from
  it and compared with the end token on the host;
- keys and values of the language model are concatenated in every layer;
- the pixels of both guided halves are decoded, and one of them is thrown away.

Left out, in its favour, is what only a GPU has (unpadding for flash-attention in every layer, upsampling through
fp32), and the top-p of the token that nobody reads. In fp32 and without sampling its codes are ours.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from benchmarks.vila_u import NEGATIVE_TOKENS, PROMPT_TOKENS


SCALE, TOP_K, TOP_P, END = 3.0, 900, 0.96, 2


@torch.no_grad()
def official_images(model: Any, inputs: dict[str, Tensor], do_sample: bool) -> tuple[Tensor, Tensor]:
    """Codes `[N, T, D]` and pixels `[N, 3, H, W]` of one image for each prompt of `prompts`."""
    tower, project, batch = model.model.vision_tower, model.model.project, len(inputs["input_ids"])
    ids, mask = stacked(**inputs)
    embeddings, cache = model.get_input_embeddings()(ids), DynamicCache(config=model.config.text_config)
    written = []
    for _ in range(model.config.vision_config.num_image_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -embeddings.shape[1] :]
        padded = mask if bool((mask == 0).any()) else None
        hidden_states = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=padded, position_ids=positions, past_key_values=cache
        ).last_hidden_state[:, -1]
        codes = write_cell(model, hidden_states, do_sample)
        written.append(codes[:batch])
        entries = tower.embed_code(codes).sum(1)
        draw_token(model, project(entries))
        embeddings = project(entries)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    codes = torch.stack(written, 1)
    return codes, tower.decode_codes(codes.repeat(2, 1, 1))[:batch]


def stacked(input_ids: Tensor, negative_input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional rows above unconditional ones, padded on the left with zeros, and their mask: `[2N, P]` each."""
    batch, pads = len(input_ids), PROMPT_TOKENS - NEGATIVE_TOKENS
    negative = torch.nn.functional.pad(negative_input_ids.expand(batch, -1), (pads, 0))
    ids, mask = torch.cat([input_ids, negative]), torch.ones(2 * batch, PROMPT_TOKENS, dtype=torch.long)
    mask[batch:, :pads] = 0
    return ids, mask


def write_cell(model: Any, hidden_states: Tensor, do_sample: bool) -> Tensor:
    """The codes `[2N, D]` of a cell, the same in both halves, from hidden states `[2N, H]`."""
    depth, embed_code = model.depth_transformer, model.model.vision_tower.embed_code
    codes = torch.zeros(len(hidden_states), depth.config.num_codebooks, dtype=torch.long)
    for slot in range(depth.config.num_codebooks):
        sums = embed_code(codes).cumsum(1)
        x = torch.cat([depth.backbone_proj(hidden_states)[:, None], depth.code_proj(sums[:, :slot])], 1)
        x = x + depth.position_embedding.weight[: slot + 1]
        for layer in depth.layers:
            x = x + attention(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        logits = depth.head(depth.norm(x[:, slot]))
        if bool(logits.isnan().any()):
            raise ValueError("the logits are not numbers")
        conditional, unconditional = logits.chunk(2)
        guided = unconditional + SCALE * (conditional - unconditional)
        codes[:, slot] = (sample(guided.float()) if do_sample else guided.argmax(-1)).repeat(2)
    return codes


def attention(layer: Any, x: Tensor) -> Tensor:
    """Causal attention over the slots `[N, slots, E]`, with everything written out."""
    rows, slots, _ = x.shape
    query, key, value = (
        project(x).view(rows, slots, -1, layer.head_dim).transpose(1, 2).reshape(-1, slots, layer.head_dim)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    hidden = torch.ones(slots, slots, dtype=torch.bool).triu(1)
    scores = torch.bmm(query, key.transpose(1, 2)).mul(layer.scaling).masked_fill(hidden, -torch.inf)
    mixed = torch.bmm(scores.softmax(-1), value).view(rows, -1, slots, layer.head_dim)
    return layer.out_proj(mixed.transpose(1, 2).reshape(rows, slots, -1))


def sample(logits: Tensor) -> Tensor:
    """Codes `[N]` from logits `[N, K]`: top-k, then top-p with the one that crosses it, then a sample."""
    values, codes = logits.topk(min(TOP_K, logits.shape[-1]))
    probabilities = values.softmax(-1)
    probabilities = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities >= TOP_P, 0.0)
    sampled = torch.multinomial(probabilities / probabilities.sum(-1, keepdim=True), 1)
    return codes.gather(-1, sampled)[:, 0]


def draw_token(model: Any, embeddings: Tensor) -> bool:
    """Samples the tokens that nobody reads; whether all of them are ends, which the host looks at."""
    tokens = torch.multinomial(model.lm_head(embeddings).float().softmax(-1), 1)
    return bool((tokens == END).all())
