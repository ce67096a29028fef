"""The nodes of VILA-U under `inference_mode`, with the bundled model."""

import pytest
import torch
from PIL import Image

from diffusers_sana import VILA_U_EMOJI, VilaUPipeline
from tests.comfyui.stub import Interrupted, PreviewMethod, call, changed


SETTINGS = {"prompt": "a lemon on a black background, flat style", "seed": 7}


@pytest.fixture(scope="module")
def model(nodes):
    return call(nodes, "VilaULoad")[0]


@pytest.fixture(scope="module")
def images(nodes, model):
    return call(nodes, "VilaUGenerate", model=model, **SETTINGS)[0]


def test_generated_images_are_the_pipeline_s(images):
    pipe = VilaUPipeline.from_pretrained(VILA_U_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7), "output_type": "pt"}
    assert torch.equal(images, pipe(SETTINGS["prompt"], negative_prompt="", **options).images.movedim(1, -1))


def test_progress_previews_and_interruption(nodes, model, images, server):
    server.args.preview_method, server.interrupt_at = PreviewMethod.Latent2RGB, 9
    with pytest.raises(Interrupted):
        call(nodes, "VilaUGenerate", model=model, **SETTINGS)
    tokens = model.num_timesteps
    assert server.updates == [1, *((token, tokens) for token in range(1, 9))]
    assert len(server.previews) == 8 // (tokens // 8)
    assert all(isinstance(image, Image.Image) for _, image, _ in server.previews)
    server.args.preview_method, server.interrupt_at = PreviewMethod.NoPreviews, None
    assert torch.equal(call(nodes, "VilaUGenerate", model=model, **SETTINGS)[0], images)


def test_answers(nodes, model, images):
    assert "lemon" in call(nodes, "VilaUAsk", model=model, image=images)[0]
    assert call(nodes, "VilaUAsk", model=model, image=images.repeat(2, 1, 1, 1), max_new_tokens=4)[0]


def test_a_model_that_was_replaced(nodes, server):
    folder = server.models / "diffusers" / "mine"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vila_u"}', encoding="utf-8")
    asked = changed(nodes, "VilaULoad", model="mine")
    assert changed(nodes, "VilaULoad", model="mine") == asked != changed(nodes, "VilaULoad")
    (folder / "model.safetensors").write_bytes(b"weights")
    assert changed(nodes, "VilaULoad", model="mine") != asked
