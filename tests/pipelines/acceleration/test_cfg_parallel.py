"""Guidance, batches, and the rows of images in the autoencoder, on two processes against one."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_sana
from diffusers_sana.pipelines.acceleration.cfg_parallel import cfg_parallel
from diffusers_sana.pipelines.acceleration.vae_parallel import map_rows, vae_parallel
from tests import tiny
from tests.models.autoencoder_dc_cases import image, small_model
from tests.models.sana_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines import controlnet_cases
from tests.pipelines.image_prompt_cases import trained_adapter
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
        # Negative prompts have no image, so one process may have all rows that have one.
        pipe.register_modules(ip_adapter=trained_adapter(pipe.transformer))
        embeds = torch.randn(3, 1, 12, generator=torch.Generator().manual_seed(0))
        for name in ("one", "several"):
            texts, rows = GUIDED[name], 1 if name == "one" else 3
            results[f"image_prompts_{name}"] = generate(pipe, *texts, ip_adapter_image_embeds=[embeds[:rows]])
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


@torch.no_grad()
def run_autoencoders(run_parallel):
    """Both halves, whole, in tiles and image by image, and the heights at which the last layer worked."""
    results, heights = {}, []
    for name in ("sana", "in"):
        torch.manual_seed(0)
        model = small_model(name).double()
        model.decoder.conv_out.register_forward_hook(lambda *call: heights.append(call[-1].shape[-2]))
        pixels = image(2, 144, 64).double()
        for way in ("whole", "tiled", "sliced"):
            if way == "tiled":
                model.enable_tiling(128, 112)  # stays for the last
            model.use_slicing = way == "sliced"
            with run_parallel(model):
                latent = model.encode(pixels).latent
                results[f"{name}_{way}"] = model.decode(latent).sample.contiguous()
                results[f"{name}_{way}_latent"] = latent.contiguous()
    pipe = tiny.pipeline(diffusers_sana)
    with run_parallel(pipe.vae):
        results["pipeline"] = generate(pipe, "a cat", None)
    return results, heights


def blur(rows):
    """Sees one row up and down."""
    return torch.nn.functional.conv2d(rows, torch.ones(1, 1, 3, 3, dtype=rows.dtype), padding=1)


def some_rows(height):
    return torch.arange(2 * height * 4, dtype=torch.float64).view(2, 1, height, 4)


def main(folder):
    rank = join()
    save_file(generate_all(cfg_parallel), folder / f"{rank}.safetensors")
    of_vae, heights = run_autoencoders(vae_parallel)
    assert max(heights) < 144  # of 144 rows of pixels
    for height in (1, 2, 7):
        of_vae[f"rows_{height}"] = map_rows(blur, some_rows(height), 1, 1, 1, None).contiguous()
    save_file(of_vae, folder / f"vae-{rank}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_in_two(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.fixture(scope="module")
def results_of_vae(folder):
    return [load_file(folder / f"vae-{rank}.safetensors") for rank in (0, 1)]


def test_both_processes_have_the_same_bits(results, results_of_vae):
    for ours, others in (results, results_of_vae):
        assert ours.keys() == others.keys()
        assert all(torch.equal(ours[name], others[name]) for name in ours)


def test_the_rows_of_two_processes_are_the_image_of_one(results_of_vae):
    expected, heights = run_autoencoders(lambda vae: nullcontext())
    assert max(heights) == 144
    for height in (1, 2, 7):
        expected[f"rows_{height}"] = blur(some_rows(height))
    assert expected.keys() == results_of_vae[0].keys()
    for name, tensor in expected.items():
        tolerance = 1e-6 if name == "pipeline" else 1e-12
        assert relative_error(results_of_vae[0][name], tensor) < tolerance, name


def test_an_autoencoder_in_rows_has_no_gradients_and_is_ours():
    model = small_model("sana")
    pixels = image(1, 32, 32)
    expected = model(pixels).sample
    with vae_parallel(model), pytest.raises(RuntimeError, match="`vae_parallel` has no gradients"):
        model(pixels)
    assert torch.equal(model(pixels).sample, expected)  # nothing is left behind
    with pytest.raises(TypeError, match=r"`vae` must be a `diffusers_sana\.AutoencoderDC`, got Linear"):
        vae_parallel(torch.nn.Linear(1, 1)).__enter__()


def test_two_processes_equal_one(results):
    expected = generate_all(lambda *models: nullcontext())
    for name, expected_image in expected.items():
        assert_close_fp32(results[0][name], expected_image)
    for name in ("one", "several"):
        assert relative_error(expected[f"image_prompts_{name}"], expected[name]) > 1e-3


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
