"""NaN and infinity end in one error that names the argument or the component, in every pipeline and output type."""

import math

import pytest
import torch

from tests.pipelines.test_matrix import PIPELINES, generate, make


CONTROLLED = [name for name in PIPELINES if "ControlNet" in name]
SPRINT = [name for name in PIPELINES if "Sprint" in name]
NUMBERS = {
    "guidance_scale": PIPELINES,
    "eta": PIPELINES,
    "strength": [name for name in PIPELINES if "Img2Img" in name or "Inpaint" in name],
    "pag_scale": ["SanaPAGPipeline"],
    "pag_adaptive_scale": ["SanaPAGPipeline"],
    "controlnet_conditioning_scale": CONTROLLED,
    "control_guidance_start": CONTROLLED,
    "control_guidance_end": CONTROLLED,
    "max_timesteps": SPRINT,
    "intermediate_timesteps": SPRINT,
}
NOT_SPRINT = [name for name in PIPELINES if "Sprint" not in name]


class Computed(Exception):
    """The pipeline went to work in place of refusing."""


@pytest.fixture
def refuses(monkeypatch):
    """Calls a pipeline that must refuse before it computes anything."""

    def call(name, error, message, **arguments):
        def compute(*args, **kwargs):
            raise Computed

        pipe = make(name, "fp32")
        for part in (pipe.text_encoder, pipe.transformer):
            part.forward = compute
        pipe.vae.decode = pipe.vae.encode = compute
        with pytest.raises(error, match=message):
            generate(pipe, name, **arguments)

    return call


@pytest.mark.parametrize(("argument", "name"), [(each, name) for each in NUMBERS for name in NUMBERS[each]])
def test_numbers(refuses, argument, name):
    for value in (math.nan, math.inf, -math.inf):
        refuses(name, ValueError, f"`{argument}` must be (finite|above 0)", **{argument: value})
    refuses(name, TypeError, f"`{argument}` must be a number", **{argument: "1"})


@pytest.mark.parametrize("name", PIPELINES)
def test_lora_scale(refuses, name):
    for value in (math.nan, math.inf):
        refuses(name, ValueError, "`scale` of `attention_kwargs` must be finite", attention_kwargs={"scale": value})


@pytest.mark.parametrize("name", NOT_SPRINT)
@pytest.mark.parametrize("argument", ["timesteps", "sigmas"])
def test_schedules(refuses, name, argument):
    for values in ([1.0, math.nan], [math.inf, 0.5], torch.tensor([math.nan])):
        refuses(name, ValueError, f"`{argument}` must be a list of finite numbers", **{argument: values})
    refuses(name, TypeError, f"`{argument}` must be a list of numbers", **{argument: ["one"]})


@pytest.mark.parametrize("name", SPRINT)
def test_schedules_of_sprint(refuses, name):
    for values in ([1.5, math.nan, 0], [math.inf, 1.0, 0]):
        refuses(name, ValueError, "`timesteps` must be a list of finite numbers", timesteps=values)


@pytest.mark.parametrize("name", [name for name in PIPELINES if "ControlNet" in name])
def test_control_image(name):
    with pytest.raises(ValueError, match="`control_image` must be finite"):
        generate(make(name, "fp32"), name, control_image=torch.full((1, 3, 32, 32), math.nan))


@pytest.mark.parametrize("name", PIPELINES)
def test_transformer(name):
    pipe = make(name, "fp32")
    pipe.transformer.proj_out.bias.data[0] = math.nan
    for output_type in ("latent", "pt", "pil"):
        with pytest.raises(
            ValueError, match=r"`transformer` gave NaN or infinite latents in torch.float32. Its weight"
        ):
            generate(pipe, name, output_type=output_type)


@pytest.mark.parametrize("name", PIPELINES)
def test_autoencoder(name):
    pipe = make(name, "fp32")
    pipe.vae.decoder.conv_out.bias.data[0] = math.inf
    with pytest.raises(ValueError, match=r"`vae` gave NaN or infinite images in torch.float32"):
        generate(pipe, name)
    pipe.vae.encoder.conv_out.bias.data[0] = math.nan
    if "image" in PIPELINES[name] or "control_image" in PIPELINES[name]:
        with pytest.raises(ValueError, match=r"`vae` gave NaN or infinite latents in torch.float32"):
            generate(pipe, name)


@pytest.mark.parametrize("name", PIPELINES)
def test_callback(name):
    pipe = make(name, "fp32")
    for end, message in (
        (math.nan, "a callback may have returned"),
        (0, "a row of `latents` for each of 2 images, but returned 1"),
    ):

        def callback(pipe, step, timestep, tensors, end=end):
            return {"latents": tensors["latents"] * end if end else tensors["latents"][:1]}

        with pytest.raises(ValueError, match=message):
            generate(pipe, name, callback_on_step_end=callback)
