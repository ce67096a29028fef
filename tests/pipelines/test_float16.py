"""float16: what overflows it stays in bfloat16 wherever float16 is asked for the whole pipeline."""

import diffusers
import numpy as np
import pytest
import torch

import diffusers_sana
from diffusers_sana.checkpoints import SANA_EMOJI
from tests import tiny


F16, BF16 = torch.float16, torch.bfloat16
MIXED = {"text_encoder": BF16, "transformer": F16, "vae": BF16}


def dtypes(pipe):
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    images = pipe("an apple", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images
    return np.asarray(images[0]).astype(float)


@pytest.mark.parametrize("arguments", [{"dtype": F16}, {"torch_dtype": F16}, {"dtype": {"default": F16}}], ids=str)
@pytest.mark.parametrize(
    "cls", [diffusers_sana.SanaPipeline, diffusers.AutoPipelineForText2Image, diffusers.DiffusionPipeline]
)
def test_from_pretrained(official_folder, cls, arguments):
    assert dtypes(cls.from_pretrained(official_folder, **arguments)) == MIXED


def test_from_pretrained_with_a_dtype_of_the_component(official_folder):
    pipe = diffusers_sana.SanaPipeline.from_pretrained(official_folder, dtype={"default": F16, "vae": F16})
    assert dtypes(pipe) == MIXED | {"vae": F16}


def test_other_classes_and_dtypes_are_as_before(official_folder):
    """`DiffusionPipeline` loads in the dtype asked for what is not ours, and after `unregister`."""
    pipe = diffusers.SanaPipeline.from_pretrained(official_folder, dtype=F16)
    assert set(dtypes(pipe).values()) == {F16}
    by_name = {"transformer": F16, "default": torch.float32}
    for dtype, expected in ((BF16, dict.fromkeys(MIXED, BF16)), (by_name, dict.fromkeys(MIXED, torch.float32))):
        pipe = diffusers.DiffusionPipeline.from_pretrained(official_folder, dtype=dtype)
        assert dtypes(pipe) == expected | {"transformer": F16 if dtype is by_name else dtype}
    diffusers_sana.unregister()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(official_folder, dtype=F16)
        assert set(dtypes(pipe).values()) == {F16}
    finally:
        diffusers_sana.register()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((F16,), {}),
        (("cpu", F16), {}),
        ((), {"dtype": F16}),
        (("cpu",), {"dtype": F16, "silence_dtype_warnings": True}),
    ],
    ids=str,
)
def test_to(args, kwargs):
    pipe = tiny.pipeline(diffusers_sana)
    parts, config = dict(pipe.components), dict(pipe.config)
    assert pipe.to(*args, **kwargs) is pipe
    assert dtypes(pipe) == MIXED
    assert pipe.components == parts
    assert pipe.config == config


def test_to_other_dtypes_and_wrong_arguments():
    pipe = tiny.pipeline(diffusers_sana)
    assert set(dtypes(pipe.to(BF16)).values()) == {BF16}
    with pytest.raises(ValueError, match="first corresponds to `device`"):
        pipe.to(F16, "cpu")
    assert None not in pipe.components.values()


def test_parts_that_are_missing():
    pipe = diffusers_sana.SanaPipeline(**tiny.components(diffusers_sana) | {"vae": None, "text_encoder": None})
    assert dtypes(pipe.to(F16)) == {"transformer": F16}


def test_other_pipelines_by_from_pipe():
    made = diffusers_sana.SanaPAGPipeline.from_pipe(tiny.pipeline(diffusers_sana), dtype=F16)
    assert dtypes(made) == MIXED


@pytest.mark.parametrize("cls", [diffusers_sana.SanaPipeline, diffusers.DiffusionPipeline])
def test_image_is_that_of_bfloat16(cls):
    pipe = cls.from_pretrained(SANA_EMOJI, dtype=F16)
    wanted = image(diffusers_sana.SanaPipeline.from_pretrained(SANA_EMOJI, dtype=BF16))
    assert 20 * np.log10(255 / np.sqrt(((image(pipe) - wanted) ** 2).mean())) > 40  # 50.6 measured
    # What the user has chosen for one component stays, and its overflow is an error.
    pipe.vae.to(F16)
    with pytest.raises(ValueError, match=r"`vae` gave NaN or infinite images in torch.float16"):
        image(pipe)
