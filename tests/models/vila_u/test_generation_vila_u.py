"""Images and videos from `generate`: against an uncached loop, batches, caches, guidance, seeds, compilation."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.models.vila_u.tiny import (
    BOS,
    CELLS,
    CODES,
    DEPTH,
    GREEDY,
    IMAGE_START,
    IMAGE_TOKENS,
    NEGATIVE,
    PROMPTS,
    VIDEO_START,
    ids,
    prompt,
    random_codes,
    shared_model,
    tiny_depth_config,
    tiny_model,
    tiny_text_config,
)


@torch.no_grad()
def literal(model, row: list[int], negative: list[int], scale: float | list, cells: int, choose) -> torch.Tensor:
    """One sample without any cache, padding or batch; `choose` gets logits `[K]`, the cell and the depth.

    The scale is one, or one for each cell.
    """
    tower, states = model.model.vision_tower, {}
    embeds = {name: model.get_input_embeddings()(torch.tensor([r])) for name, r in (("yes", row), ("no", negative))}
    written = []
    for cell in range(cells):
        for name in embeds:
            states[name] = model.model(inputs_embeds=embeds[name]).last_hidden_state[:, -1]
        codes, of_cell = [], scale[cell] if isinstance(scale, list) else scale
        for depth in range(DEPTH):
            known = codes + [0] * (DEPTH - len(codes))  # what comes later is not looked at
            entries = tower.embed_code(torch.tensor([known]))
            logits = {
                name: model.depth_transformer.head(model.depth_transformer(state, entries).last_hidden_state[0, depth])
                for name, state in states.items()
            }
            codes.append(int(choose(logits["no"] + of_cell * (logits["yes"] - logits["no"]), cell, depth)))
        written.append(codes)
        read = model.model.project(tower.embed_code(torch.tensor(codes)).sum(0))[None, None]
        embeds = {name: torch.cat([embed, read], 1) for name, embed in embeds.items()}
    return torch.tensor(written)


def greedy(logits, cell, depth) -> torch.Tensor:
    return logits.argmax()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_is_the_uncached_loop(scale):
    """A padded batch of two prompts, with guidance in the same batch: token for token as one by one."""
    model = shared_model()
    codes = model.generate(**prompt(*PROMPTS), **GREEDY, guidance_scale=scale)
    assert codes.shape == (2, CELLS, DEPTH)
    assert codes.unique().numel() > 10
    for row, of_row in zip(PROMPTS, codes, strict=True):
        assert torch.equal(of_row, literal(model, row, NEGATIVE, scale, CELLS, greedy))


def test_sampling_is_the_uncached_loop():
    """The noise of a seed, the filters and the guidance, one code at a time."""
    model = shared_model()
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.8}
    codes = model.generate(**prompt(*PROMPTS), generation_mode="image", generator=seeds, **options)
    generator = torch.Generator().manual_seed(2)
    noise = torch.cat([torch.empty(4, DEPTH, CODES).exponential_(generator=generator) for _ in range(4)])

    def choose(logits, cell, depth):
        order = logits.argsort(descending=True)[:20]
        probabilities = (logits[order] / 1.5).softmax(0)
        kept = 1 + int((probabilities.cumsum(0) < 0.8).sum())
        return order[(probabilities / noise[cell, depth, order])[:kept].argmax()]

    assert torch.equal(codes[1], literal(model, PROMPTS[1], NEGATIVE, 3.0, CELLS, choose))


def test_caches_agree():
    model = shared_model()
    gold = model.generate(**prompt(*PROMPTS), **GREEDY)
    for options in (
        {"cache_implementation": "dynamic"},
        {"past_key_values": DynamicCache(config=model.config.text_config)},
    ):
        assert torch.equal(model.generate(**prompt(*PROMPTS), **GREEDY, **options), gold), options
    with pytest.raises(ValueError, match="`past_key_values` must be empty, got"):
        model.generate(**prompt(*PROMPTS), **GREEDY, **options)  # it is full now
    longer = StaticCache(config=model.config.text_config, max_cache_len=50)
    assert torch.equal(model.generate(**prompt(*PROMPTS), **GREEDY, past_key_values=longer), gold)


def test_compiled_to_one_graph_for_all_rounds():
    """Without breaks, and not again for another round, nor for another call of the same sizes."""
    model = tiny_model(
        text_config=tiny_text_config(num_hidden_layers=1), depth_config=tiny_depth_config(num_hidden_layers=1)
    )
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = {"compile_config": CompileConfig(backend=backend, fullgraph=True, mode=None)}
    for seed in (1, 2):
        inputs = prompt(*PROMPTS) | {"generation_mode": "image"}
        gold = model.generate(**inputs, generator=torch.Generator().manual_seed(seed))
        codes = model.generate(**inputs, generator=torch.Generator().manual_seed(seed), **compiled)
        assert torch.equal(codes, gold)
        assert len(graphs) == 1


def test_attention_implementations_agree():
    model = shared_model()
    gold = model.generate(**prompt(*PROMPTS), **GREEDY)
    try:
        model.set_attn_implementation("eager")
        assert torch.equal(model.generate(**prompt(*PROMPTS), **GREEDY), gold)
    finally:
        model.set_attn_implementation("sdpa")


def test_scales_of_their_own():
    """Each prompt has its scale, and 1 is the conditional model, which needs no negative prompt."""
    model = shared_model()
    both = model.generate(**prompt(*PROMPTS), **GREEDY, guidance_scale=[1.0, 5.0])
    assert torch.equal(both[:1], model.generate(**prompt(PROMPTS[0], negative=None), **GREEDY, guidance_scale=1))
    assert torch.equal(both[1:], model.generate(**prompt(PROMPTS[1]), **GREEDY, guidance_scale=torch.tensor(5.0)))
    assert not torch.equal(both[1:], model.generate(**prompt(PROMPTS[1]), **GREEDY, guidance_scale=1))


def test_without_guidance_the_second_half_does_not_run():
    model, rows = shared_model(), []
    hook = model.depth_transformer.norm.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model.generate(**prompt(*PROMPTS), **GREEDY, guidance_scale=1.0)
    unguided, rows[:] = list(rows), []
    model.generate(**prompt(*PROMPTS), **GREEDY)
    hook.remove()
    assert unguided == [2] * CELLS * DEPTH
    assert rows == [4] * CELLS * DEPTH


def test_guided_in_an_interval_only():
    """Of every image; outside, the model is the conditional one, and where no cell is inside it runs alone."""
    model = shared_model()
    scales = [3.0 if 4 <= cell < 8 else 1.0 for cell in range(CELLS)]
    codes = model.generate(**prompt(*PROMPTS), **GREEDY, guidance_interval=(0.25, 0.5))
    for row, of_row in zip(PROMPTS, codes, strict=True):
        assert torch.equal(of_row, literal(model, row, NEGATIVE, scales, CELLS, greedy))
    frames = model.generate(
        **prompt(PROMPTS[0]), **GREEDY | {"generation_mode": "video"}, guidance_interval=[0.25, 0.5]
    )
    assert torch.equal(frames[0].flatten(0, 1), literal(model, PROMPTS[0], NEGATIVE, 2 * scales, 2 * CELLS, greedy))
    everywhere = model.generate(**prompt(*PROMPTS), **GREEDY, guidance_interval=(0, 1))
    assert torch.equal(everywhere, model.generate(**prompt(*PROMPTS), **GREEDY))
    assert not torch.equal(everywhere, codes)
    nowhere = model.generate(**prompt(*PROMPTS, negative=None), **GREEDY, guidance_interval=(0.01, 0.02))
    assert torch.equal(nowhere, model.generate(**prompt(*PROMPTS, negative=None), **GREEDY, guidance_scale=1.0))


def test_negative_prompts_for_each_row():
    model = shared_model()
    others = [[BOS, 3, 4, IMAGE_START], [BOS, IMAGE_START]]
    negative, mask = ids(*others)
    codes = model.generate(
        **prompt(*PROMPTS, negative=None), negative_input_ids=negative, negative_attention_mask=mask, **GREEDY
    )
    for row, other, of_row in zip(PROMPTS, others, codes, strict=True):
        assert torch.equal(of_row, literal(model, row, other, 3.0, CELLS, greedy))


def test_seeds():
    """A seed gives its bits again, in any batch; without one, the global seed does."""
    model = shared_model()

    def sample(rows, *seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.generate(**prompt(*rows), generation_mode="image", generator=generators, **options)

    both = sample(PROMPTS, 1, 2)
    assert torch.equal(both[1:], sample(PROMPTS[1:], 2))
    assert not torch.equal(both[1:], sample(PROMPTS[1:], 3))
    several = sample(PROMPTS, 4, 1, 2, 5, num_return_sequences=2)
    assert several.shape == (4, CELLS, DEPTH)
    assert torch.equal(several[1:3], both)
    torch.manual_seed(0)
    first = model.generate(**prompt(*PROMPTS), generation_mode="image")
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(**prompt(*PROMPTS), generation_mode="image"))
    one = model.generate(
        **prompt(*PROMPTS), generation_mode="image", generator=torch.Generator().manual_seed(7), num_return_sequences=2
    )
    assert one.unique(dim=0).shape[0] == 4


def test_video():
    """Frames in one sequence; decoded each by itself."""
    model = shared_model()
    row, negative = [BOS, 5, 6, VIDEO_START], [BOS, VIDEO_START]
    inputs = prompt(row, negative=negative)
    codes = model.generate(**inputs, generation_mode="video", do_sample=False)
    assert codes.shape == (1, model.config.num_video_frames, CELLS, DEPTH)
    assert torch.equal(codes[0].flatten(0, 1), literal(model, row, negative, 3.0, 2 * CELLS, greedy))
    assert model.generate(**inputs, generation_mode="video", do_sample=False, num_frames=1).equal(codes[:, :1])
    pixels = model.decode_image_tokens(codes, chunk_size=1)
    assert pixels.shape == (1, 2, 3, 32, 32)
    torch.testing.assert_close(pixels[0], model.model.vision_tower.decode_codes(codes[0]))


def test_images_in_the_prompt():
    """A video from its first frame: as many images as prompts say, also several samples, also in the negative."""
    model = shared_model()
    frame = random_codes(2, seed=1)
    rows = [[BOS, row, VIDEO_START, *IMAGE_TOKENS] for row in (5, 6)]
    negative = torch.tensor([[BOS, VIDEO_START, *IMAGE_TOKENS]] * 2)
    options = {"generation_mode": "video", "num_frames": 1, "do_sample": False}
    codes = model.generate(
        **prompt(*rows, negative=None),
        negative_input_ids=negative,
        image_codes=frame,
        num_return_sequences=2,
        **options,
    )
    assert codes.shape == (4, 1, CELLS, DEPTH)
    assert torch.equal(codes[::2], codes[1::2])
    for index in range(2):
        alone = model.generate(
            **prompt(rows[index], negative=None),
            negative_input_ids=negative[:1],
            image_codes=frame[index : index + 1],
            **options,
        )
        assert torch.equal(alone, codes[2 * index : 2 * index + 1])
    pixels = torch.rand(1, 3, 32, 32)
    seen = model.model.vision_tower.encode_to_codes(pixels)
    inputs = prompt(rows[0], negative=None) | {"guidance_scale": 1.0}
    by_pixels = model.generate(**inputs, pixel_values=pixels, **options)
    assert torch.equal(by_pixels, model.generate(**inputs, image_codes=seen, **options))


class HostReads(TorchDispatchMode):
    """Counts what would make an accelerator wait, while `on`."""

    def __init__(self):
        super().__init__()
        self.on, self.reads, self.operations = False, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += self.on
        if self.on and any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "aten.equal")):
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("do_sample", [False, True])
def test_no_host_read_in_the_loop_and_a_callback_for_each_cell(do_sample):
    model, seen, mode = shared_model(), [], HostReads()

    def callback(cell, codes):
        mode.on = False
        seen.append((cell, codes.clone()))
        mode.on = cell < CELLS - 1

    with mode:
        codes = model.generate(
            **prompt(*PROMPTS), generation_mode="image", do_sample=do_sample, callback_on_cell=callback
        )
    assert [cell for cell, _ in seen] == list(range(CELLS))
    assert torch.equal(torch.stack([of_cell for _, of_cell in seen], 1), codes)
    assert mode.operations > 1000
    assert mode.reads == []
