"""The prefix cache: a text encoder computes the instruction before every prompt, and its latest texts, only once.

In a causal model with padding on the right, keys and values of a token do not depend on later tokens. So those of the
prefix that all prompts share are computed once, and only the rest of a prompt runs after them. The features of the
last few single texts are kept as well; the empty negative prompt is one of them.

Entries belong to one state of the model (`_state`) and are dropped with it. A model that runs other code than the
modules of its class is never cached: see `_state`.

Legend: B prompts, L tokens, P tokens of the prefix, C width of the language model.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2Model, PreTrainedModel

from diffusers_sana.locks import exclusive


MAX_PREFIXES = 2  # some 20 MB each for Gemma-2-2B
MAX_TEXTS = 8  # at most 11 MB together for Gemma-2-2B in bfloat16 at 300 tokens
_SAMPLES = 32  # elements looked at in each parameter


class Prefix(NamedTuple):
    """The last hidden state `[1, 1, C]` of the first token, and the keys and values of all."""

    first: Tensor
    cache: DynamicCache


@dataclass
class _Memory:
    """What was computed in one state of a model; tokens -> (their rows of the embedding, what was computed)."""

    state: tuple[list, dict[Any, Tensor]]
    prefixes: dict[tuple[int, ...], tuple[Tensor, Prefix]] = field(default_factory=dict)
    texts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


_MEMORIES: WeakKeyDictionary[PreTrainedModel, _Memory] = WeakKeyDictionary()


def hidden_states(
    text_encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor, prefix: Sequence[int], device: torch.device
) -> Tensor:
    """Last hidden states `[B, 1 + L - P, C]` of the first token and of those after the prefix.

    Args:
        text_encoder: model without a head.
        input_ids, mask: `[B, L]` on the CPU, padded on the right.
        prefix: P tokens, 1 or more, with which every row should begin; where one does not, all tokens run.
        device: where the model runs.
    """
    with exclusive(text_encoder):
        memory = _memory_of(text_encoder, device)
        if memory is None or len(input_ids) > 1:
            return _compute(text_encoder, input_ids, mask, prefix, device, memory)
        # The result depends on the tokens, and on how many of them are padding.
        text = len(prefix), int(mask.sum()), *input_ids[0].tolist()
        embedded = _embed(text_encoder, input_ids, device)
        states = _recall(memory.texts, text, embedded)
        if states is None:
            states = _compute(text_encoder, input_ids, mask, prefix, device, memory)
            _remember(memory.texts, text, embedded, states, MAX_TEXTS)
        return states


def _compute(
    text_encoder: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor,
    prefix: Sequence[int],
    device: torch.device,
    memory: _Memory | None,
) -> Tensor:
    """`hidden_states`, by running all tokens, or those after the prefix, which runs if it is not cached."""

    ids, length = input_ids.to(device), len(prefix)
    if memory is None or not _shares_prefix(text_encoder, input_ids, mask, prefix):
        states = text_encoder(ids, attention_mask=mask.to(device), use_cache=False)[0]
        return states[:, [0, *range(length, input_ids.shape[1])]]

    head = input_ids[:1, :length]
    embedded = _embed(text_encoder, head, device)
    remembered = _recall(memory.prefixes, tuple(prefix), embedded)
    if remembered is None:
        # The prefix runs separately in the first call too, so that all calls give the same bits.
        first, cache = run_prefix(text_encoder, ids[:1, :length], mask[:1, :length].to(device))
        remembered = Prefix(first.clone(), cache)  # without the states of the other tokens
        _remember(memory.prefixes, tuple(prefix), embedded, remembered, MAX_PREFIXES)
    return run_after(text_encoder, remembered, ids[:, length:], mask.to(device))


def run_prefix(text_encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Prefix:
    """Runs the tokens `[1, P]` that all texts share; gradients flow through the result."""
    cache = DynamicCache(config=text_encoder.config)
    states = text_encoder(input_ids, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    return Prefix(states[:, :1], cache)


def run_after(text_encoder: PreTrainedModel, prefix: Prefix, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states `[B, 1 + S, C]` of the first token and of S tokens after the prefix.

    Args:
        text_encoder: causal model without a head.
        prefix: from `run_prefix`; stays as it is.
        input_ids: `[B, S]`, padded on the right.
        mask: `[B, P + S]`.
    """
    first = prefix.first.expand(len(input_ids), -1, -1)
    if input_ids.shape[1] == 0:
        return first
    # Layers of this call alone, with one copy of the keys and values per prompt.
    cache = DynamicCache(config=text_encoder.config)
    cache.layers = [copy.copy(layer) for layer in prefix.cache.layers]
    cache.batch_repeat_interleave(len(input_ids))
    states = text_encoder(input_ids, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    return torch.cat([first, states], dim=1)


def _shares_prefix(text_encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor, prefix: Sequence[int]) -> bool:
    """Whether the prefix can run separately: every row begins with it, and no token attends to later ones."""
    length, config = len(prefix), text_encoder.config
    causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    # Other kinds of rotary embedding may depend on the length of the whole text.
    fixed_positions = getattr(text_encoder.rotary_emb, "rope_type", None) == "default"
    return (
        1 < length <= input_ids.shape[1]
        and bool((input_ids[:, :length] == torch.tensor(prefix)).all() and mask[:, :length].all())
        and causal
        and fixed_positions
        and config._attn_implementation in ("eager", "sdpa")
    )


def _embed(text_encoder: PreTrainedModel, input_ids: Tensor, device: torch.device) -> Tensor:
    return text_encoder.get_input_embeddings()(input_ids.to(device))


def _recall(entries: dict, key: tuple[int, ...] | None, embedded: Tensor) -> Any:
    """The entry under `key` if its tokens still have the same embeddings; else None."""
    was_embedded, value = entries.pop(key, (None, None))
    if value is None or not torch.equal(was_embedded, embedded):
        return None
    entries[key] = was_embedded, value  # the last used is the last to go
    return value


def _remember(entries: dict, key: tuple[int, ...], embedded: Tensor, value: Any, limit: int) -> None:
    entries[key] = embedded, value
    while len(entries) > limit:
        entries.pop(next(iter(entries)))


def _memory_of(text_encoder: PreTrainedModel, device: torch.device) -> _Memory | None:
    """The memory of the model in its present state, empty if the state is new; None if nothing may be kept."""
    state = _state(text_encoder, device)
    if state is None:
        _MEMORIES.pop(text_encoder, None)
        return None
    memory = _MEMORIES.get(text_encoder)
    if memory is None or not _equal(memory.state, state):
        memory = _MEMORIES[text_encoder] = _Memory(state)
    return memory


def _equal(one: tuple[list, dict[Any, Tensor]], other: tuple[list, dict[Any, Tensor]]) -> bool:
    (facts, samples), (other_facts, other_samples) = one, other
    return (
        facts == other_facts
        and samples.keys() == other_samples.keys()
        and all(torch.equal(sample, other_samples[name]) for name, sample in samples.items())
    )


def _state(text_encoder: PreTrainedModel, device: torch.device) -> tuple[list, dict[Any, Tensor]] | None:
    """What the output of the model depends on besides its tokens, found in 1 or 2 ms; None if that is unknown.

    It is unknown where modules train or are patched, as offloading of all kinds does, or compiled, where they have
    adapters, where weights are elsewhere, and where a gradient is wanted.

    Address and version of a weight tell of nearly all edits. Those through `.data`, as merging of adapters,
    averages of weights and some optimizers make them, leave no trace but the values: so some values are compared too,
    and `_recall` compares the embeddings of the tokens.
    """
    if type(text_encoder) is not Gemma2Model:
        return None
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    facts: list[Any] = [autocast, dict(vars(text_encoder.config))]
    modules, weights = [text_encoder], []
    for module in modules:  # which grows while it is read; `modules()` is slower
        here = vars(module)
        if here["training"] or _is_patched(module, here):
            return None
        modules += [child for child in here["_modules"].values() if child is not None]
        weights += here["_parameters"].values()
        weights += here["_buffers"].values()
        facts += [id(module), *here["_forward_hooks"], *here["_forward_pre_hooks"]]
    weights = [weight for weight in weights if weight is not None]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return None

    samples: dict[Any, list[Tensor]] = {}
    for weight in _plain_tensors(weights):
        if weight.is_meta or not weight.numel():
            return None
        facts += weight.data_ptr(), weight.is_inference() or weight._version
        # Evenly over the memory that the tensor spans, whatever its strides.
        span = weight.numel()
        if not weight.is_contiguous():
            span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        sample = weight.as_strided((min(_SAMPLES, span),), (max(1, (span - 1) // (_SAMPLES - 1)),))
        samples.setdefault((weight.device, weight.dtype), []).append(sample)
    # As bytes, because NaN is not equal to itself.
    return facts, {name: torch.cat(parts).view(torch.uint8) for name, parts in samples.items()}


def _is_patched(module: torch.nn.Module, here: dict[str, Any]) -> bool:
    """Whether calling the module with the attributes `here` runs something else than the `forward` of its class."""
    if type(module).__module__.startswith("peft.") or here.get("_compiled_call_impl") is not None:
        return True
    # Removing the hooks of accelerate leaves the method of the class there.
    return "forward" in here and getattr(here["forward"], "__func__", None) is not type(module).forward


def _plain_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors, and in place of quantized ones those that they are made of."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _plain_tensors(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor
