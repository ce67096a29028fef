"""Guidance, and batches, on two processes against one."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_sana
from diffusers_sana.pipelines.acceleration.cfg_parallel import cfg_parallel
from tests import tiny
from tests.models.sana_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32
from tests.pipelines import controlnet_cases
from tests.two_processes import join, run_in_two


# Prompts, and the negative prompt: the empty one has a single token, whose attention is a constant.
GUIDED = {
    "one": ("a cat", None),
    "several": (["a cat", "a small dog", "a fox"], "blurry"),
    "unlike": (["a cat", "a small dog"], ["", "bad art"]),
}
WIRINGS = ("diffusers", "nvlabs")


def generate(pipe, prompt, negative_prompt, **options):
    return pipe(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).images.contiguous()


def generate_all(run_parallel):
    """Every case; `run_parallel(*models)` is a context."""
    results = {}
    pipe = tiny.pipeline(diffusers_sana)
    with run_parallel(pipe.transformer):
        for name, texts in GUIDED.items():
            results[name] = generate(pipe, *texts)
        results["unguided"] = generate(pipe, ["a cat", "a dog", "a fox"], None, guidance_scale=1.0)
    for wiring in WIRINGS:
        pipe = controlnet_cases.pipeline(parts={"controlnet": controlnet_cases.controlnet(wiring=wiring)})
        with run_parallel(pipe.transformer, pipe.controlnet):
            results[f"controlnet_{wiring}"] = controlnet_cases.generate(pipe)
    model = tiny_model()
    with torch.no_grad(), run_parallel(model):  # three rows for two processes, as positional arguments
        inputs = tiny_inputs(model, batch_size=3)
        names = ("hidden_states", "encoder_hidden_states", "timestep")
        arguments = [inputs.pop(name) for name in names]
        results["model"] = model(*arguments, **inputs).sample.contiguous()
    return results


def main(folder):
    rank = join()
    save_file(generate_all(cfg_parallel), folder / f"{rank}.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_in_two(__file__, folder)
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def test_both_processes_have_the_same_bits(results):
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_two_processes_equal_one(results):
    expected = generate_all(lambda *models: nullcontext())
    for name, image in expected.items():
        assert_close_fp32(results[0][name], image)


@torch.no_grad()
@pytest.mark.parametrize("mask", [[1, 1, 4, 6], [1, 3, 3, 3], [2, 7, 5, 1], [1, 1, 1, 1]], ids=str)
def test_a_share_of_the_text_serves_a_share_of_the_batch(mask):
    model = tiny_model()
    inputs = tiny_inputs(model, batch_size=4)
    text = inputs.pop("encoder_hidden_states")
    inputs.pop("encoder_attention_mask")
    context = model.encode_text(text, (torch.arange(7) < torch.tensor(mask)[:, None]).long())
    whole = model(**inputs, encoder_hidden_states=None, text_context=context).sample
    num_single = next((row for row, length in enumerate(mask) if length != 1), 4)
    for start, stop in ((0, 2), (1, 4), (3, 4)):
        share = {name: value[start:stop] for name, value in inputs.items()}
        text = context.rows(start, stop)
        part = model(**share, encoder_hidden_states=None, text_context=text).sample
        assert_close_fp32(part, whole[start:stop])
        # A share without single tokens has no constant at all: an empty one would cost a copy in each layer.
        constants = {None if state.constant is None else len(state.constant) for state in text.states}
        assert constants == {min(stop, num_single) - start if start < num_single else None}


def test_nothing_is_left_behind():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with pytest.raises(KeyError, match="x"), cfg_parallel(model):
        raise KeyError("x")
    model(**inputs)  # without any process group


if __name__ == "__main__":
    main(Path(sys.argv[1]))
