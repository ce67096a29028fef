"""What users combine: {pipelines} x {guider, ControlNets, LoRAs, image prompt} x {16, 4 bits}, in every subset.

Each of them has a setting that changes nothing, such as a strength of 0. Each subset gives another image; and in the
presence of all the others, an addition that changes nothing gives the image without it.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from itertools import combinations, product
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from peft import LoraConfig

import diffusers_sana
from tests import tiny
from tests.numerics import relative_error
from tests.pipelines.controlnet_cases import controlnet
from tests.pipelines.image_prompt_cases import trained_adapter
from tests.pipelines.test_matrix import EDGES, PIPELINES, WIDER, generate, make


IMAGE_DIM = 12
SCALE = 0.005  # of each ControlNet: random ones would drown everything else
ON, NEUTRAL = "on", "neutral"


@cache
def second_controlnet():
    """Of the other wiring, and so of another depth."""
    return controlnet(**WIDER, wiring="nvlabs", num_layers=1)


@cache
def lora_layers(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of attention and one of the feed-forward layers, which overlap in nothing but the block."""
    model = tiny.transformer(diffusers, **WIDER)
    torch.manual_seed(seed)
    names = (["to_q", "to_v"], ["attn2.to_out.0", "ff.conv_point"])[seed]
    model.add_adapter(LoraConfig(r=2, lora_alpha=100, target_modules=names, init_lora_weights=False))
    return {
        f"transformer.{name.replace('.default', '')}": value
        for name, value in model.state_dict().items()
        if "lora" in name
    }


def with_guider(pipe: Any, setting: str) -> tuple[Any, dict[str, Any]]:
    """Layers are skipped in a further run of the transformer; or the guidance that is the default."""
    slg = SkipLayerGuidance(4.5, 2.0, 0.0, 1.0, [1])
    return pipe, {"guider": slg if setting == ON else ClassifierFreeGuidance(4.5)}


def with_controlnets(pipe: Any, setting: str) -> tuple[Any, dict[str, Any]]:
    """A second ControlNet beside that of the pipeline; or one without strength."""
    second = second_controlnet().to(pipe.transformer.dtype)
    both = type(pipe).from_pipe(pipe, controlnet=[pipe.controlnet, second])
    both.set_progress_bar_config(disable=True)
    scales = [SCALE, SCALE if setting == ON else 0.0]
    return both, {"control_image": [EDGES, 1 - EDGES], "controlnet_conditioning_scale": scales}


def with_loras(pipe: Any, setting: str) -> tuple[Any, dict[str, Any]]:
    """Both LoRAs that are loaded; or both without strength."""
    pipe.enable_lora()
    pipe.set_adapters(["attention", "others"], [0.7, 0.4] if setting == ON else [0.0, 0.0])
    return pipe, {}


def with_image_prompt(pipe: Any, setting: str) -> tuple[Any, dict[str, Any]]:
    """An image prompt; or one without strength."""
    pipe.set_ip_adapter_scale(0.05 if setting == ON else 0.0)
    embeds = torch.randn(2, 1, IMAGE_DIM, generator=torch.Generator().manual_seed(7))
    return pipe, {"ip_adapter_image_embeds": [embeds]}


# What can be combined -> the function that adds it, and the argument of a pipeline that takes it.
ADDITIONS = {
    "guider": (with_guider, "guider"),
    "controlnets": (with_controlnets, "control_image"),
    "loras": (with_loras, "attention_kwargs"),
    "image_prompt": (with_image_prompt, "ip_adapter_image_embeds"),
}


def taken(name: str) -> list[str]:
    """The additions that a pipeline can have."""
    arguments = inspect.signature(getattr(diffusers_sana, name).__call__).parameters
    return [each for each, (_, argument) in ADDITIONS.items() if argument in arguments]


class Combination:
    """One pipeline, to which guiders, ControlNets, LoRAs and image prompts are added for one call each."""

    def __init__(self, name: str, precision: str) -> None:
        self.name, self.pipe = name, make(name, precision)
        adapter = trained_adapter(self.pipe.transformer, IMAGE_DIM)
        self.pipe.register_modules(ip_adapter=adapter.to(self.pipe.transformer.dtype))
        for seed, adapter in enumerate(("attention", "others")):
            self.pipe.load_lora_weights(dict(lora_layers(seed)), adapter_name=adapter)

    def generate(self, settings: dict[str, str]) -> torch.Tensor:
        """Latents of two prompts, with each addition at its setting; those that are not named are off."""
        pipe, options = self.pipe, {"output_type": "latent"}
        if "control_image" in PIPELINES[self.name]:
            options["controlnet_conditioning_scale"] = SCALE
        self.pipe.disable_lora()
        for addition, setting in settings.items():
            pipe, added = ADDITIONS[addition][0](pipe, setting)
            options |= added
        return generate(pipe, self.name, **options)


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = list(names)
    return [some for count in range(len(names) + 1) for some in combinations(names, count)]


def test_what_a_pipeline_takes():
    """Guiders take the place of classifier-free guidance; distilled ones have none, and PAG is a guidance itself."""
    assert {name: taken(name) for name in PIPELINES} == {
        "SanaPipeline": ["guider", "loras", "image_prompt"],
        "SanaPAGPipeline": ["loras", "image_prompt"],
        "SanaImg2ImgPipeline": ["guider", "loras", "image_prompt"],
        "SanaInpaintPipeline": ["guider", "loras", "image_prompt"],
        "SanaControlNetPipeline": ["guider", "controlnets", "loras", "image_prompt"],
        "SanaControlNetImg2ImgPipeline": ["guider", "controlnets", "loras", "image_prompt"],
        "SanaControlNetInpaintPipeline": ["guider", "controlnets", "loras", "image_prompt"],
        "SanaSprintPipeline": ["loras", "image_prompt"],
        "SanaSprintImg2ImgPipeline": ["loras", "image_prompt"],
        "SanaSprintControlNetPipeline": ["controlnets", "loras", "image_prompt"],
    }


@pytest.mark.parametrize(("name", "precision"), list(product(PIPELINES, ("bf16", "int4"))))
def test_every_subset(name, precision):
    combination, additions = Combination(name, precision), taken(name)
    made = {some: combination.generate(dict.fromkeys(some, ON)) for some in subsets(additions)}
    assert all(latents.isfinite().all() for latents in made.values())
    for some, others in combinations(made, 2):
        assert relative_error(made[some], made[others]) > 3e-4, (some, others)
    for addition in additions:
        others = tuple(each for each in additions if each != addition)
        found = combination.generate(dict.fromkeys(others, ON) | {addition: NEUTRAL})
        assert relative_error(found, made[others]) < 1e-5, addition
    assert torch.equal(combination.generate({}), made[()])  # nothing is left behind
