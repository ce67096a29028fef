"""Blocks of Modular Diffusers make what the pipelines make, bit for bit, and each of them can be replaced."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

import diffusers_sana
from diffusers_sana.modular import blocks as sets
from diffusers_sana.modular import steps
from diffusers_sana.modular.blocks import BLOCKS, SanaAutoBlocks, SanaBlocks, modular_pipeline
from tests import tiny
from tests.pipelines.controlnet_cases import controlnet
from tests.pipelines.sprint_cases import SPRINT


IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(32) < 16).float().expand(1, 1, 32, 32)
EDGES = (IMAGE > 0.5).float()
CONTROL = {"control_image": EDGES * 2 - 1, "controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.5}

# Pipeline -> arguments of its call beside those of all.
CALLS = {
    "SanaPipeline": {"negative_prompt": "ugly", "height": 64, "width": 32},
    "SanaImg2ImgPipeline": {"image": torch.cat([IMAGE, 1 - IMAGE]), "strength": 0.7, "prompt": "a cat"},
    "SanaInpaintPipeline": {"image": IMAGE, "mask_image": MASK, "padding_mask_crop": 2},
    "SanaControlNetPipeline": CONTROL,
    "SanaControlNetImg2ImgPipeline": {"image": IMAGE, "strength": 0.7, **CONTROL},
    "SanaControlNetInpaintPipeline": {"image": IMAGE, "mask_image": MASK, **CONTROL},
    "SanaSprintPipeline": {"num_inference_steps": 2},
    "SanaSprintImg2ImgPipeline": {"num_inference_steps": 4, "image": IMAGE, "strength": 0.6},
    "SanaSprintControlNetPipeline": {"num_inference_steps": 2, **CONTROL},
}


def make(name):
    is_sprint = "Sprint" in name
    parts = tiny.components(diffusers_sana, **(SPRINT if is_sprint else {}))
    if is_sprint:
        parts["scheduler"] = diffusers.SCMScheduler()
    if "ControlNet" in name:
        parts["controlnet"] = controlnet()
    pipe = getattr(diffusers_sana, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make("SanaPipeline")


def modular(pipe, blocks=None):
    made = modular_pipeline(pipe, blocks)
    made.set_progress_bar_config(disable=True)
    return made


def options(name, **changes):
    given = {
        "prompt": ["a cat", "a red fox"],
        "num_inference_steps": 3,
        "use_resolution_binning": False,
        "complex_human_instruction": "Describe it:",
        "max_sequence_length": 40,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(3),
    }
    return given | CALLS.get(name, {}) | changes


def generate(pipe, name="SanaPipeline", **changes):
    if isinstance(pipe, diffusers.ModularPipeline):
        return pipe(**options(name, **changes), output="images")
    return pipe(**options(name, **changes)).images


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_pipeline(name):
    """Twice, because a call leaves nothing behind; and the set for all tasks chooses the same blocks."""
    pipe = make(name)
    scheduler = copy.deepcopy(pipe.scheduler.__dict__)
    changes = {"num_images_per_prompt": 2} if "Img2Img" in name else {}
    expected = generate(pipe, name, **changes)
    latents = generate(pipe, name, output_type="latent", **changes)
    made = modular(pipe)
    for _ in range(2):
        assert torch.equal(generate(made, name, **changes), expected)
    assert torch.equal(generate(made, name, output_type="latent", **changes), latents)
    if "Sprint" not in name:
        assert torch.equal(generate(modular(pipe, SanaAutoBlocks()), name, **changes), expected)
    assert pipe.scheduler.__dict__.keys() == scheduler.keys()
    assert made.scheduler is pipe.scheduler
    assert pipe.scheduler.num_inference_steps == scheduler["num_inference_steps"]


def test_every_pipeline_of_a_set_exists():
    assert set(CALLS) == set(BLOCKS)
    found = {name for name, each in vars(sets).items() if name.startswith("Sana") and name.endswith("Blocks")}
    assert found == {each.__name__ for each in BLOCKS.values()} | {"SanaAutoBlocks"}


@pytest.mark.parametrize("name", BLOCKS)
def test_takes_the_arguments_of_the_pipeline(name):
    parameters = inspect.signature(getattr(diffusers_sana, name).__call__).parameters
    inputs = {each.name: each for each in BLOCKS[name]().inputs}
    known = parameters.keys() - steps.NOT_OF_BLOCKS
    assert known <= inputs.keys()
    assert all(inputs[key].default == parameters[key].default for key in known)
    others = inputs.keys() - known  # what blocks of other sets would give
    assert others <= {*steps.SanaDenoiseStep.takes, "repainting", "begin"}
    assert not any(inputs[key].required for key in others)


def test_guidance(pipe):
    made = modular(pipe)
    for changes in (
        {"guidance_scale": 1.0},
        {"guider": diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=3.0)},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"eta": 0.0, "attention_kwargs": {"scale": 1.0}, "share_prompt_mask": True},
    ):
        assert torch.equal(generate(made, **changes), generate(pipe, **changes))


def test_callbacks(pipe):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append(type(pipe))
        return {"latents": tensors["latents"] * 0.9}

    expected = generate(pipe, callback_on_step_end=callback)
    assert torch.equal(generate(modular(pipe), callback_on_step_end=callback), expected)
    assert seen == [diffusers_sana.SanaPipeline] * 6


def test_descriptions():
    found = [each for each in vars(steps).values() if inspect.isclass(each) and issubclass(each, steps.SanaStep)]
    assert len(found) > 15
    assert len({each().description for each in found}) == len(found)
    for each in BLOCKS.values():
        assert all(block.description for block in each().sub_blocks.values())


def test_each_step_by_itself(pipe):
    """Encoding, denoising and decoding in three pipelines, each with the components that it uses."""
    expected = generate(pipe)
    rest = SanaBlocks()
    text = rest.sub_blocks.pop("text_encoder")
    decode = rest.sub_blocks.pop("decode")
    encoder = modular(pipe, text)
    assert set(encoder.component_names) == {"tokenizer", "text_encoder"}
    given = options("SanaPipeline")
    texts = encoder(**{key: given[key] for key in ("prompt", "negative_prompt", "complex_human_instruction")})
    embeds = texts.get_by_kwargs("denoiser_input_fields")
    assert set(embeds) == {
        *("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    }
    denoiser = modular(pipe, rest)
    denoiser.update_components(tokenizer=None, text_encoder=None)
    latents = denoiser(**given | embeds | {"prompt": None, "negative_prompt": None}, output="latents")
    decoder = modular(pipe, decode)
    assert decoder.component_names == ["vae"]
    assert torch.equal(decoder(latents=latents, output_type="pt", output="images"), expected)


class Brighter(diffusers.ModularPipelineBlocks):
    """A block of a user, between denoising and decoding."""

    model_name = "sana"
    description = "Scales the latents."
    inputs = (InputParam("latents", required=True), InputParam("gain", default=1.0))
    intermediate_outputs = (OutputParam("latents"),)

    def __call__(self, components, state):
        given = self.get_block_state(state)
        given.latents = given.latents * given.gain
        self.set_block_state(state, given)
        return components, state


def test_a_block_put_between_and_one_replaced(pipe):
    blocks = SanaBlocks()
    blocks.sub_blocks.insert("brighter", Brighter(), 5)
    made = modular(pipe, blocks)
    assert torch.equal(generate(made), generate(pipe))
    latents = generate(pipe, output_type="latent")
    assert torch.equal(generate(made, gain=1.5, output_type="latent"), latents * 1.5)

    class OwnNoise(steps.SanaPrepareLatentsStep):
        """Begins with other noise."""

        def run(self, components, given):
            super().run(components, given)
            given.latents = given.latents.flip(-1)

    blocks = SanaBlocks()
    blocks.sub_blocks["prepare_latents"] = OwnNoise()
    noise = torch.randn(2, tiny.LATENT_CHANNELS, 32, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(generate(modular(pipe, blocks)), generate(pipe, latents=noise.flip(-1)))


def test_in_blocks_of_diffusers(pipe):
    """As a part of a sequence and of a choice, beside blocks of others; under a components manager."""

    class Auto(diffusers.AutoPipelineBlocks):
        block_classes = [sets.SanaImg2ImgBlocks, SanaBlocks]
        block_names = ["image2image", "text2image"]
        block_trigger_inputs = ["image", None]

    nested = diffusers.SequentialPipelineBlocks.from_blocks_dict({"sana": Auto(), "brighter": Brighter()})
    manager = diffusers.ComponentsManager()
    made = nested.init_pipeline(components_manager=manager)
    made.update_components(**{key: part for key, part in pipe.components.items() if key in made.component_names})
    assert torch.equal(generate(made), generate(pipe))
    img2img = diffusers_sana.SanaImg2ImgPipeline.from_pipe(pipe)
    name = "SanaImg2ImgPipeline"
    assert torch.equal(generate(made, name), generate(img2img, name))
    assert "sana" in repr(nested)
    assert "prompt" in nested.doc


def test_says_what_is_wrong(pipe):
    made = modular(pipe)
    with pytest.raises(ValueError, match="`output_type` must be one of"):
        generate(made, output_type="jpg")
    with pytest.raises(ValueError, match="`height` must be a multiple of 2, got 33"):
        generate(made, height=33)
    with pytest.raises(ValueError, match="Exactly one of `prompt` and `prompt_embeds`"):
        generate(made, prompt=None)
    with pytest.raises(ValueError, match=r"`pipe` must be one of .*got SanaPAGPipeline"):
        modular_pipeline(diffusers_sana.SanaPAGPipeline.from_pipe(pipe))
