"""Text features with the instruction remembered: equal to running all tokens, and never from weights that are gone."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model
from transformers import Gemma2Config, Gemma2Model, MistralConfig, MistralModel

import diffusers_sana
from diffusers_sana.prompts import prefix_cache
from diffusers_sana.prompts.encoding import encode_captions
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION
from tests import tiny
from tests.numerics import assert_close_fp32, assert_no_worse


CPU = torch.device("cpu")
INSTRUCTION = "Draw this well: "
CAPTIONS = ["a cat", "", "two dogs on a walk, in oil", "b"]
TOKENIZER = tiny.tokenizer()
PREFIX = TOKENIZER.encode(INSTRUCTION)[:-1]
SIZES = {
    "vocab_size": 160,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def text_encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return Gemma2Model(Gemma2Config(**SIZES | {"num_hidden_layers": 3} | changes)).eval()


@pytest.fixture
def model():
    return text_encoder()


def encode(model, captions=CAPTIONS, instruction=INSTRUCTION, length=300, device=CPU):
    captions = [captions] if isinstance(captions, str) else captions
    return encode_captions(TOKENIZER, model, captions, instruction, max_sequence_length=length, device=device)


def encode_whole(model, *args, **kwargs):
    """What `encode` gives where nothing is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "_memory_of", lambda *args: None)
        return encode(model, *args, **kwargs)


def assert_right(model, *args, **kwargs):
    """Twice, because the first call fills the cache that the second reads."""
    expected, expected_mask = encode_whole(model, *args, **kwargs)
    results = [encode(model, *args, **kwargs) for _ in range(2)]
    for embeds, mask in results:
        assert torch.equal(mask, expected_mask)
        assert_close_fp32(embeds, expected)
    assert torch.equal(results[0][0], results[1][0])


@pytest.fixture
def ran(model):
    """Rows and tokens of each run of the model."""
    shapes = []
    model.norm.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:2])))
    return shapes


class TestEqualsTheWholeRun:
    @pytest.mark.parametrize("length", [300, 5, 2, 1])
    @pytest.mark.parametrize(
        "captions", [CAPTIONS, ["a cat"], [""], ["b", "b"]], ids=["mixed", "one", "empty", "twins"]
    )
    def test_lengths(self, model, captions, length):
        assert_right(model, captions, length=length)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("window", [2, 7, len(PREFIX) - 1, len(PREFIX), len(PREFIX) + 1, len(PREFIX) + 9])
    def test_sliding_window(self, window, attention):
        model = text_encoder(sliding_window=window, attn_logit_softcapping=None)
        wide = text_encoder(attn_logit_softcapping=None)
        assert sorted(set(model.config.layer_types)) == ["full_attention", "sliding_attention"]
        for each in (model, wide):
            each.config._attn_implementation = attention  # the setter of some versions refuses SDPA for Gemma-2
        wide = encode(wide)[0]
        assert (encode(model)[0] - wide).norm() > 1e-2  # the window is felt
        assert_right(model)

    @pytest.mark.parametrize("layers", [1, 2])
    def test_layers(self, layers):
        assert_right(text_encoder(num_hidden_layers=layers))

    @pytest.mark.parametrize("instruction", ["\n".join(COMPLEX_HUMAN_INSTRUCTION), "", "x", " ", "ends in a word"])
    def test_instructions(self, model, instruction):
        assert_right(model, instruction=instruction)

    def test_instruction_changes(self, model):
        for instruction in (INSTRUCTION, "", "Draw this badly: ", INSTRUCTION, "A third. ", INSTRUCTION):
            assert_right(model, instruction=instruction)

    def test_bf16_is_no_worse(self, model):
        reference, _ = encode_whole(model)
        model.to(torch.bfloat16)
        eager, _ = encode_whole(model)
        assert eager.dtype == torch.bfloat16
        assert_no_worse(encode(model)[0], eager, reference)

    def test_inference_mode(self, model):
        with torch.inference_mode():
            inside = encode(model)[0]
        assert torch.equal(encode(model)[0], inside)
        assert torch.equal(encode(model, "a")[0], encode(model, "a")[0])

    def test_row_that_does_not_begin_with_the_prefix(self, model, ran):
        ids = torch.tensor([[*PREFIX, 20, 21], [*PREFIX[:-1], 22, 20, 21]])
        mask = torch.ones_like(ids)
        states = prefix_cache.hidden_states(model, ids, mask, PREFIX, CPU)
        assert ran == [ids.shape]
        assert_close_fp32(states, model(ids, mask)[0][:, [0, *range(len(PREFIX), ids.shape[1])]])


class TestRunsLess:
    def test_prefix_runs_once(self, model, ran):
        encode(model, ["a", "b c"])
        encode(model, ["d", "e f", "g"])
        assert ran == [(1, len(PREFIX)), (2, 2), (3, 2)]  # " d", " e f", " g"

    def test_nothing_behind_the_prefix(self, model, ran):
        encode(model, ["a", "b"], length=1)
        encode(model, ["c", "d"], length=1)
        assert ran == [(1, len(PREFIX))]

    def test_single_text_runs_once(self, model, ran):
        first = encode(model, "", instruction="")
        first[0].zero_()  # what was given away is not what is remembered
        encode(model, "a cat")
        runs = len(ran)
        assert_close_fp32(encode(model, "", instruction="")[0], encode_whole(model, "", instruction="")[0])
        assert len(ran) == runs + 1  # the whole run
        encode(model, "a cat")
        assert len(ran) == runs + 1

    def test_a_text_is_not_its_namesake_behind_an_instruction(self, model):
        """Equal tokens, other features seen."""
        assert_right(model, "a cat")
        assert_right(model, INSTRUCTION + "a cat", instruction="")

    def test_batch_of_other_size_gives_the_same_features(self, model):
        for index, caption in enumerate(CAPTIONS):
            assert_close_fp32(encode(model, caption)[0], encode(model)[0][index : index + 1])

    def test_first_call_gives_the_same_bits(self):
        one, two = text_encoder(), text_encoder()
        encode(one, ["something", "else"])
        assert torch.equal(encode(one)[0], encode(two)[0])

    def test_remembers_few(self, model, ran):
        for index in range(12):
            encode(model, f"number {index}", instruction=f"Instruction {index}: ")
        memory = prefix_cache._MEMORIES[model]
        assert len(memory.prefixes) == prefix_cache.MAX_PREFIXES
        assert len(memory.texts) == prefix_cache.MAX_TEXTS
        ran.clear()
        for index in (11, 10):
            encode(model, ["x", "y"], instruction=f"Instruction {index}: ")
            encode(model, f"number {index}", instruction=f"Instruction {index}: ")
        assert [rows for rows, _ in ran] == [2, 2]

    def test_a_run_leaves_the_prefix_as_it_is(self):
        model = text_encoder(sliding_window=7)
        encode(model, "a")
        ((_, prefix),) = prefix_cache._MEMORIES[model].prefixes.values()
        before = copy.deepcopy(prefix)
        encode(model, "b")
        encode(model)
        assert torch.equal(prefix.first, before.first)
        for layer, old in zip(prefix.cache.layers, before.cache.layers, strict=True):
            assert torch.equal(layer.keys, old.keys)
            assert torch.equal(layer.values, old.values)
            assert layer.get_seq_length() == old.get_seq_length() == len(PREFIX)

    def test_memory_goes_with_the_model(self):
        model = text_encoder()
        encode(model)
        features = weakref.ref(prefix_cache._MEMORIES[model])
        del model
        gc.collect()
        assert features() is None

    def test_pipeline(self):
        pipe = tiny.pipeline(diffusers_sana)
        shapes = []
        pipe.text_encoder.norm.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
        kwargs = {"num_inference_steps": 1, "height": 32, "width": 32, "use_resolution_binning": False}
        for prompt in ("a cat", "a cat", "two dogs"):
            pipe(prompt, output_type="latent", **kwargs)
        instruction, prompt, negative, other_prompt = shapes
        assert instruction > 500
        assert (prompt, negative, other_prompt) == (4, 1, 7)


def edited(weight):
    """A copy that differs in one element, which no sample looks at."""
    return weight.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(5.0))


def replace_weight(model):
    model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(edited(model.layers[1].mlp.up_proj.weight))


def replace_data(model):
    model.layers[0].self_attn.v_proj.weight.data = edited(model.layers[0].self_attn.v_proj.weight)


def set_embedding_of_c(model):
    model.embed_tokens.weight.data[TOKENIZER.convert_tokens_to_ids(["c", "▁c"])] = torch.arange(16.0)


def merge_adapter(model):
    """As `merge_and_unload` leaves it: the same parameters, changed through `.data`."""
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"]), model)
    for layer in model.layers:
        layer.self_attn.v_proj.merge()
        layer.self_attn.v_proj = layer.self_attn.v_proj.get_base_layer()


def set_dtype_and_back(model):
    model.norm.weight.add_(1)
    model.to(torch.float64).to(torch.float32)


EDITS = {
    "in place": lambda model: model.layers[0].self_attn.v_proj.weight.add_(1),
    "one element": lambda model: model.layers[0].self_attn.v_proj.weight[3, 5].add_(5),
    "data in place": lambda model: model.layers[2].input_layernorm.weight.data.add_(1),
    "data replaced": replace_data,
    "embedding row": set_embedding_of_c,
    "parameter replaced": replace_weight,
    "loaded": lambda model: model.load_state_dict(text_encoder(1).state_dict()),
    "loaded by assignment": lambda model: model.load_state_dict(text_encoder(1).state_dict(), assign=True),
    "buffer": lambda model: model.rotary_emb.inv_freq.mul_(2),
    "adapter merged": merge_adapter,
    "dtype and back": set_dtype_and_back,
    "layer hook": lambda model: model.layers[0].register_forward_hook(lambda module, args, output: output * 2),
    "layer pre-hook": lambda model: model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "patched": lambda model: setattr(model.norm, "forward", lambda states: states),
    "layer added": lambda model: setattr(model.layers[0], "mlp", torch.nn.Identity()),
    "config": lambda model: setattr(model.config, "sliding_window", 3),
}


class TestForgets:
    @pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
    def test_edits(self, model, edit):
        captions = ["c", "a c"]
        before = encode(model, captions)[0], encode(model, "c")[0]
        edit(model)
        assert_right(model, captions)
        assert_right(model, "c")
        assert (encode(model, captions)[0] - before[0]).norm() > 1e-2
        assert (encode(model, "c")[0] - before[1]).norm() > 1e-2

    def test_embedding_of_a_token_without_samples(self):
        model = text_encoder(vocab_size=20000)
        state, before = prefix_cache._state(model, CPU), encode(model, "c")[0]
        set_embedding_of_c(model)
        assert prefix_cache._equal(prefix_cache._state(model, CPU), state)
        assert_right(model, "c")
        assert (encode(model, "c")[0] - before).norm() > 1e-2

    def test_dtype(self, model):
        encode(model.to(torch.bfloat16))
        model.to(torch.float64)
        assert encode(model)[0].dtype == torch.float64
        reference = encode_whole(model)[0]
        # Not less: the model's cosines are fp32, and where a vector of them begins changes their last bit. What bf16
        # had left would be wrong by 1e-3.
        assert (encode(model)[0] - reference).norm() < 1e-6 * reference.norm()

    def test_autocast(self, model):
        plain = encode(model, "a")[0], encode(model)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(encode(model, "a")[0], plain[0])
            assert not torch.equal(encode(model)[0], plain[1])
        assert torch.equal(encode(model)[0], plain[1])

    def test_attention_implementation(self):
        model = text_encoder(attn_logit_softcapping=None)
        encode(model)
        memory = prefix_cache._MEMORIES[model]
        # The default is "sdpa" in transformers 5.17 and "eager" in 5.23.
        model.config._attn_implementation = "eager" if model.config._attn_implementation == "sdpa" else "sdpa"
        assert_right(model)
        assert prefix_cache._MEMORIES[model] is not memory

    def test_optimizer_step(self, model):
        encode(model)
        with torch.enable_grad():
            encode(model)[0].sum().backward()
        torch.optim.SGD(model.parameters(), 1e-2).step()
        assert_right(model)

    def test_unchanged_model_is_remembered(self, model):
        encode(model)
        memory = prefix_cache._MEMORIES[model]
        encode(model, "a")
        assert prefix_cache._MEMORIES[model] is memory
        assert memory.prefixes
        assert memory.texts


class TestKeepsNothing:
    """Where weights may change unseen, or a gradient is wanted, all tokens run, and what was kept is freed."""

    @pytest.fixture
    def filled(self, model):
        encode(model)
        assert model in prefix_cache._MEMORIES
        return model

    def assert_nothing_kept(self, model):
        assert torch.equal(encode(model)[0], encode_whole(model)[0])
        assert model not in prefix_cache._MEMORIES

    def test_training(self, filled):
        filled.layers[0].train()
        self.assert_nothing_kept(filled)

    def test_gradients_flow(self, filled):
        with torch.enable_grad():
            encode(filled, "a")[0].sum().backward()
        assert all(parameter.grad is not None for parameter in filled.parameters())
        assert filled not in prefix_cache._MEMORIES

    def test_frozen_weights_need_no_gradient(self, filled):
        filled.requires_grad_(False)
        with torch.enable_grad():
            assert_right(filled)
        assert filled in prefix_cache._MEMORIES

    def test_adapters(self, filled):
        torch.manual_seed(1)
        plain = encode(filled)[0]
        filled.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
        filled.eval()
        self.assert_nothing_kept(filled)
        adapted = encode(filled)[0]
        assert (adapted - plain).norm() > 1e-2
        for layer in filled.layers:
            layer.self_attn.v_proj.scale_layer(0.5)
        self.assert_nothing_kept(filled)
        assert (encode(filled)[0] - adapted).norm() > 1e-2
        filled.disable_adapters()
        assert_close_fp32(encode(filled)[0], plain)

    def test_lora_scale_of_the_pipeline(self):
        pipe = tiny.pipeline(diffusers_sana)
        torch.manual_seed(1)
        pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj", "q_proj"]))
        pipe.text_encoder.eval()
        full, half, again = (
            pipe.encode_prompt("a cat", complex_human_instruction=INSTRUCTION, lora_scale=scale)[0]
            for scale in (1.0, 0.5, 1.0)
        )
        assert (full - half).norm() > 1e-2
        assert_close_fp32(again, full)

    def test_sequential_offload(self, filled):
        expected = encode(filled)[0]
        cpu_offload(filled, execution_device=CPU)
        self.assert_nothing_kept(filled)
        assert_close_fp32(encode(filled)[0], expected)
        remove_hook_from_module(filled, recurse=True)
        assert_right(filled)
        assert filled in prefix_cache._MEMORIES

    @pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
    def test_group_offload(self, filled, options):
        expected = encode(filled)[0]
        apply_group_offloading(filled, onload_device=CPU, offload_device=CPU, num_blocks_per_group=1, **options)
        self.assert_nothing_kept(filled)
        assert_close_fp32(encode(filled)[0], expected)

    def test_model_offload(self):
        pipe, expected = (tiny.pipeline(diffusers_sana) for _ in range(2))
        expected = expected.encode_prompt("a cat", complex_human_instruction=INSTRUCTION)[0]
        pipe.encode_prompt("a cat", complex_human_instruction=INSTRUCTION)
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            result = pipe.encode_prompt("a cat", complex_human_instruction=INSTRUCTION)[0]
            assert_close_fp32(result, expected)
        assert pipe.text_encoder not in prefix_cache._MEMORIES

    def test_compiled(self, filled):
        filled.compile(backend="eager")
        assert prefix_cache._memory_of(filled, CPU) is None
        assert filled not in prefix_cache._MEMORIES

    def test_weights_that_are_elsewhere(self, filled):
        weight = filled.norm.weight
        filled.norm.weight = torch.nn.Parameter(torch.empty_like(weight, device="meta"))
        assert prefix_cache._memory_of(filled, CPU) is None
        filled.norm.weight = torch.nn.Parameter(torch.empty(0))
        assert prefix_cache._memory_of(filled, CPU) is None

    @pytest.mark.parametrize("kind", ["other", "subclass"])
    def test_other_models(self, kind):
        if kind == "other":
            model = MistralModel(MistralConfig(**SIZES | {"num_hidden_layers": 1})).eval()
        else:
            derived = type("Derived", (Gemma2Model,), {})
            model = derived(Gemma2Config(**SIZES | {"num_hidden_layers": 1})).eval()
        self.assert_nothing_kept(model)

    @pytest.mark.parametrize(
        "change", [{"use_bidirectional_attention": True}, {"_attn_implementation": "flex_attention"}], ids=str
    )
    def test_prefix_is_not_split_off(self, model, change):
        ids = torch.tensor([[*PREFIX, 20]])
        assert prefix_cache._shares_prefix(model, ids, torch.ones_like(ids), PREFIX)
        for name, value in change.items():
            setattr(model.config, name, value)
        assert not prefix_cache._shares_prefix(model, ids, torch.ones_like(ids), PREFIX)

    def test_rotary_embedding_that_depends_on_the_length(self):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model = text_encoder(rope_parameters=rope, max_position_embeddings=20)
        assert_right(model)
