"""The nodes of Sana under `inference_mode`, against the pipelines."""

import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffusers_sana import (
    SANA_EMOJI,
    SANA_EMOJI_EDGES,
    SanaControlNetImg2ImgPipeline,
    SanaControlNetInpaintPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaImg2ImgPipeline,
    SanaInpaintPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintControlNetPipeline,
    sobel_edges,
)
from tests.comfyui.stub import PROMPT, SETTINGS, Interrupted, PreviewMethod, call, changed
from tests.loaders.lora.lora_files import FORMATS, TRANSFORMER, random_lora
from tests.pipelines.controlnet_cases import controlnet


def expected(pipe, **options):
    """The pipeline's own images `[B, H, W, 3]`."""
    options = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt", **options}
    return pipe(generator=torch.Generator().manual_seed(7), **options).images.movedim(1, -1)


def sample(nodes, model, **options):
    return call(nodes, "SanaSample", model=model, **{**SETTINGS, **options})[0]


def test_sample(nodes, model, pipe):
    assert torch.equal(sample(nodes, model), expected(pipe))
    options = {"guidance_scale": 3.0, "negative_prompt": "grey", "height": 32, "width": 64}
    images = sample(nodes, model, batch_size=2, **options)
    assert images.shape == (2, 32, 64, 3)
    assert torch.equal(images, expected(pipe, num_images_per_prompt=2, **options))
    perturbed = sample(nodes, model, pag_scale=2.0)
    assert torch.equal(perturbed, expected(SanaPAGPipeline.from_pipe(pipe), pag_scale=2.0))
    assert not torch.allclose(perturbed, sample(nodes, model), atol=0.01)


def test_image_to_image_from_images_and_from_latents(nodes, model, pipe):
    image, latent = call(nodes, "SanaSample", model=model, **SETTINGS)
    changed_image = call(nodes, "SanaImageToImage", model=model, image=image, strength=0.5, **SETTINGS)[0]
    change = SanaImg2ImgPipeline.from_pipe(pipe)
    assert torch.equal(changed_image, expected(change, image=image.movedim(-1, 1), strength=0.5))
    assert not torch.allclose(changed_image, image, atol=0.02)
    latents = pipe(**{"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent"}, generator=seeded()).images
    torch.testing.assert_close(latent["samples"] * model.scaling_factor, latents)
    changed_latents = call(nodes, "SanaImageToImage", model=model, latent=latent, strength=0.5, **SETTINGS)[0]
    torch.testing.assert_close(changed_latents, expected(change, image=latents, strength=0.5))


def seeded():
    return torch.Generator().manual_seed(7)


def test_inpainting(nodes, model, pipe):
    image = sample(nodes, model)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:16, 8:16] = 1
    painted = call(nodes, "SanaInpaint", model=model, image=image, mask=mask, **SETTINGS)[0]
    inpaint = SanaInpaintPipeline.from_pipe(pipe)
    assert torch.equal(painted, expected(inpaint, image=image.movedim(-1, 1), mask_image=mask))
    assert torch.equal(painted[mask == 0], image[mask == 0])
    assert not torch.allclose(painted[mask == 1], image[mask == 1], atol=0.02)
    near = call(nodes, "SanaInpaint", model=model, image=image, mask=mask, whole_image=False, padding=4, **SETTINGS)[0]
    options = {"image": image.movedim(-1, 1), "mask_image": mask, "padding_mask_crop": 4}
    assert torch.equal(near, expected(inpaint, **options))


def test_controlnet(nodes, server):
    """From the list or a folder; a replaced one is loaded again, and one that no branch uses leaves the memory."""
    model, _ = call(nodes, "SanaLoad")
    assert model.pipe.transformer.dtype == torch.float32  # "auto" on a CPU
    image = sample(nodes, model)
    (edges,) = call(nodes, "SanaEdges", image=image)
    torch.testing.assert_close(edges, (sobel_edges(image.movedim(-1, 1) * 2 - 1) / 2 + 0.5).movedim(1, -1))
    branch = call(nodes, "SanaControlNet", model=model, image=edges, strength=0.8, end_percent=0.9)[0]
    followed = sample(nodes, branch)
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    controlnet = SanaControlNetModel.from_pretrained(SANA_EMOJI_EDGES, dtype=torch.float32)
    control = {
        "control_image": nodes.nodes_sana.control_options(branch, PROMPT)["control_image"],
        "controlnet_conditioning_scale": 0.8,
        "control_guidance_end": 0.9,
    }
    torch.testing.assert_close(
        followed, expected(SanaControlNetPipeline.from_pipe(pipe, controlnet=controlnet), **control)
    )
    assert not torch.allclose(followed, image, atol=0.02)
    both = SanaControlNetImg2ImgPipeline.from_pipe(pipe, controlnet=controlnet)
    moved = call(nodes, "SanaImageToImage", model=branch, image=image, **SETTINGS)[0]
    torch.testing.assert_close(moved, expected(both, image=image.movedim(-1, 1), strength=0.6, **control))

    wide = call(nodes, "SanaControlNet", model=model, image=torch.rand(1, 300, 610, 3))[0]
    assert nodes.nodes_sana.control_size(wide) == (192, 352)
    del wide
    copied = shutil.copytree(SANA_EMOJI_EDGES, server.models / "controlnet" / "edges")
    of_list = call(
        nodes, "SanaControlNet", model=model, image=edges, strength=0.8, end_percent=0.9, control_net="edges"
    )
    assert torch.equal(sample(nodes, of_list[0]), followed)
    asked = changed(nodes, "SanaControlNet", control_net="edges")
    os.utime(copied / "config.json", ns=(1, 1))
    assert changed(nodes, "SanaControlNet", control_net="edges") != asked
    del branch
    sample(nodes, of_list[0])
    assert len(model.shared.controlnets) == 1
    del of_list
    assert torch.equal(sample(nodes, model), image)
    assert not model.shared.controlnets


def test_sprint(nodes):
    """The bundled one, which lacks the parts that it shares with sana-emoji."""
    model, vae = call(nodes, "SanaLoad", model="sana-emoji-sprint")
    image, latent = call(nodes, "SanaSprintSample", model=model, **SETTINGS)
    assert torch.equal(image, expected(model.pipe))
    torch.testing.assert_close(vae.decode(latent["samples"]), image)
    near = call(nodes, "SanaSprintImageToImage", model=model, image=image, strength=0.5, **SETTINGS)[0]
    far = call(nodes, "SanaSprintImageToImage", model=model, latent=latent, strength=1.0, **SETTINGS)[0]
    torch.testing.assert_close(far, image, atol=1e-4, rtol=1e-3)  # at strength 1 the image leaves no trace
    assert not torch.allclose(near, image, atol=0.02)
    with pytest.raises(ValueError, match=r"`model` must be a Sana or SANA-1\.5, but is a SANA-Sprint"):
        sample(nodes, model)
    branch = call(nodes, "SanaControlNet", model=model, image=image, strength=0.7)[0]
    controlnet = SanaControlNetModel.from_pretrained(SANA_EMOJI_EDGES, dtype=torch.float32)
    pipe = SanaSprintControlNetPipeline.from_pipe(model.pipe, controlnet=controlnet)
    control = nodes.nodes_sana.control_options(branch, PROMPT)
    followed = call(nodes, "SanaSprintSample", model=branch, **SETTINGS)[0]
    torch.testing.assert_close(followed, expected(pipe, **control))
    assert not torch.allclose(followed, image, atol=0.02)
    with pytest.raises(ValueError, match="`model` must have no ControlNet"):
        call(nodes, "SanaSprintImageToImage", model=branch, image=image, **SETTINGS)


def test_controlnets_in_a_row_steer_together(nodes, model, pipe, server):
    """Of tiny ones, with images, strengths and intervals of their own; also where a part is repainted."""
    images = torch.rand(2, 1, 32, 32, 3)
    nets = [controlnet(**TRANSFORMER), controlnet(**TRANSFORMER, wiring="nvlabs")]
    branch = model
    for name, net, image, strength in zip("ab", nets, images, (0.2, 0.1), strict=True):
        net.save_pretrained(server.models / "controlnet" / name)
        given = {"control_net": name, "image": image, "strength": strength, "end_percent": 3 * strength}
        branch = call(nodes, "SanaControlNet", model=branch, **given)[0]
    control = nodes.nodes_sana.control_options(branch, PROMPT)
    assert control["controlnet_conditioning_scale"] == [0.2, 0.1]
    assert control["control_guidance_end"] == pytest.approx([0.6, 0.3])
    assert [len(each) for each in control["control_image"]] == [1, 1]
    both = SanaControlNetPipeline.from_pipe(pipe, controlnet=nets)
    size = nodes.nodes_sana.control_size(branch)
    followed = sample(nodes, branch)
    torch.testing.assert_close(followed, expected(both, height=size[0], width=size[1], **control))
    assert len(model.shared.controlnets) == 2
    assert not torch.allclose(followed, sample(nodes, model), atol=0.02)
    start, mask = torch.rand(1, 32, 32, 3), (torch.arange(32) < 16).float().expand(1, 32, 32)
    repaint = SanaControlNetInpaintPipeline.from_pipe(pipe, controlnet=nets)
    found = call(nodes, "SanaInpaint", model=branch, image=start, mask=mask, **SETTINGS)[0]
    torch.testing.assert_close(
        found, expected(repaint, image=start.movedim(-1, 1), mask_image=mask, strength=1.0, **control)
    )


def test_lora_is_in_one_branch_only(nodes, model, pipe, server):
    lora = random_lora(pipe.transformer)
    path = str(server.models / "loras" / "kohya.v1.safetensors")
    save_file(FORMATS["kohya"](lora), path)
    without = sample(nodes, model)
    with torch.inference_mode():  # parameters that could be trained are multiplied in another order
        pipe.load_lora_weights(path, adapter_name="lora")
        images = {}
        for strength in (1.0, 0.25):
            pipe.set_adapters("lora", strength)
            images[strength] = expected(pipe)
        pipe.unload_lora_weights()

    def with_lora(model, strength, **place):
        return call(nodes, "SanaLora", model=model, strength=strength, **place)[0]

    of_list = {"lora": "kohya.v1.safetensors"}
    strong, weak = with_lora(model, 1.0, **of_list), with_lora(model, 0.25, path=path)
    several = with_lora(with_lora(with_lora(weak, 0.5, **of_list), 1.0, **of_list), -1.5, **of_list)
    order = (strong, images[1.0]), (weak, images[0.25]), (model, without), (several, images[0.25])
    for branch, expected_image in order:
        assert torch.equal(sample(nodes, branch), expected_image)
    assert not torch.allclose(images[1.0], images[0.25], atol=0.02)
    image = call(nodes, "SanaImageToImage", model=strong, image=without, strength=1.0, **SETTINGS)[0]
    assert torch.equal(image, images[1.0])  # at strength 1 the image leaves no trace


def test_a_lora_file_that_was_replaced(nodes, pipe, server):
    """It is read again, and weights that no branch uses any more are not kept."""
    path = server.models / "loras" / "new.safetensors"
    lora = random_lora(pipe.transformer)
    save_file(FORMATS["kohya"](lora), path)
    model, _ = call(nodes, "SanaLoad", model="tiny")
    branch, other = (call(nodes, "SanaLora", model=model, lora=path.name, strength=s)[0] for s in (1.0, 0.5))
    first = sample(nodes, branch)
    asked = changed(nodes, "SanaLora", lora=path.name)
    assert changed(nodes, "SanaLora", lora=path.name, strength=0.5) == asked
    save_file({name: tensor * 1.5 for name, tensor in FORMATS["kohya"](lora).items()}, path)
    os.utime(path, ns=(1, 1))
    assert changed(nodes, "SanaLora", lora=path.name) != asked
    second = sample(nodes, branch)
    assert not torch.allclose(first, second, atol=1e-3)
    assert len(model.pipe.transformer.peft_config) == 1
    del branch
    sample(nodes, other)
    assert len(model.pipe.transformer.peft_config) == 1
    del other
    without = sample(nodes, model)
    assert not getattr(model.pipe.transformer, "peft_config", {})
    assert torch.equal(without, expected(pipe))


def test_one_of_two_loras_leaves_the_memory(nodes, pipe, server):
    model, _ = call(nodes, "SanaLoad", model="tiny")
    for i, name in enumerate(("one", "two")):
        lora = FORMATS["kohya"](random_lora(pipe.transformer, seed=i))
        save_file(lora, server.models / "loras" / f"{name}.safetensors")
    one, two = (call(nodes, "SanaLora", model=model, lora=f"{name}.safetensors")[0] for name in ("one", "two"))
    sample(nodes, one)
    image = sample(nodes, two)
    assert len(model.pipe.transformer.peft_config) == 2
    del one
    assert torch.equal(sample(nodes, two), image)
    assert len(model.pipe.transformer.peft_config) == 1


def test_a_model_folder_that_was_replaced(nodes, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    asked = changed(nodes, "SanaLoad", path=str(copied))
    assert changed(nodes, "SanaLoad", path=str(copied)) == asked
    os.utime(copied / "transformer" / "config.json", ns=(1, 1))
    assert changed(nodes, "SanaLoad", path=str(copied)) != asked


def test_four_bits(nodes, model, tmp_path):
    quantized, _ = call(nodes, "SanaLoad", model="tiny", four_bit=True)
    image = sample(nodes, quantized)
    assert quantized.pipe.transformer.is_quantized
    assert 0 < (image - sample(nodes, model)).abs().mean() < 0.1
    quantized.pipe.save_pretrained(tmp_path)
    loaded, _ = call(nodes, "SanaLoad", path=str(tmp_path), dtype="float32")
    assert loaded.pipe.transformer.is_quantized
    assert (sample(nodes, loaded) - image).abs().mean() < 0.02


def test_progress_ends_where_the_steps_end(nodes, model, server):
    sample(nodes, model)
    assert server.updates == [2, (1, 2), (2, 2)]
    server.updates.clear()
    settings = {**SETTINGS, "steps": 4}
    call(nodes, "SanaImageToImage", model=model, image=torch.rand(1, 32, 32, 3), strength=0.5, **settings)
    assert server.updates == [4, (1, 2), (2, 2)]  # half of the steps are enough for half of the noise
    assert not server.previews


def test_previews(nodes, model, server):
    server.args.preview_method = PreviewMethod.Latent2RGB
    shown = sample(nodes, model, steps=4)
    assert [image.size for _, image, _ in server.previews] == [(64, 64)] * 3  # the first step shows noise only
    assert {(kind, size) for kind, _, size in server.previews} == {("JPEG", 512)}
    server.args.preview_method = PreviewMethod.NoPreviews
    assert torch.equal(sample(nodes, model, steps=4), shown)


def test_interruption(nodes, model, pipe, server):
    """ComfyUI's exception leaves the pipeline as it was: the next run is right."""
    server.interrupt_at = 1
    with pytest.raises(Interrupted):
        sample(nodes, model)
    server.interrupt_at = None
    assert torch.equal(sample(nodes, model), expected(pipe))


def test_offloading_where_there_is_nothing_to_offload_to(nodes, pipe, caplog):
    with caplog.at_level(logging.WARNING):
        model, _ = call(nodes, "SanaLoad", model="tiny", cpu_offload=True)
    assert "`cpu_offload` has no effect: the models run on the CPU" in caplog.text
    assert torch.equal(sample(nodes, model), expected(pipe))


def test_errors(nodes, model):
    image = torch.rand(1, 32, 32, 3)
    with pytest.raises(ValueError, match="`model` must be a Sana or a SANA-Sprint, but 'vila-u-emoji' is a VilaU"):
        call(nodes, "SanaLoad", path="vila-u-emoji")
    with pytest.raises(
        ValueError, match=r"there is no 'gone' in ComfyUI's models/diffusers\. Choose one of .'sana-em"
    ):
        call(nodes, "SanaLoad", model="gone")
    with pytest.raises(ValueError, match=r"`model` must be a SANA-Sprint, but is a Sana or SANA-1\.5\. Use 'Generate"):
        call(nodes, "SanaSprintSample", model=model, **SETTINGS)
    with pytest.raises(ValueError, match="one of `image` and `latent` must be connected, but none is"):
        call(nodes, "SanaImageToImage", model=model, **SETTINGS)
    with pytest.raises(ValueError, match="one of `image` and `latent` must be connected, but both is"):
        call(nodes, "SanaImageToImage", model=model, image=image, latent={}, **SETTINGS)
    with pytest.raises(
        ValueError, match=r"`latent` must be of this model's autoencoder, \[images, 4, .*got \[1, 16, 8"
    ):
        call(nodes, "SanaImageToImage", model=model, latent={"samples": torch.zeros(1, 16, 8, 8)}, **SETTINGS)
    with pytest.raises(ValueError, match="`mask` must mark something, but is black"):
        call(nodes, "SanaInpaint", model=model, image=image, mask=torch.zeros(1, 64, 64), **SETTINGS)
    three = call(nodes, "SanaControlNet", model=model, image=torch.rand(3, 32, 32, 3))[0]
    with pytest.raises(ValueError, match="the ControlNet's `image` must be one or as many as `image`, 2, got 3"):
        nodes.nodes_sana.control_options(three, PROMPT, torch.rand(2, 3, 32, 32))
    five = call(nodes, "SanaControlNet", model=three, image=torch.rand(2, 32, 32, 3))[0]
    with pytest.raises(ValueError, match="the ControlNets' `image` must be one each, or equally many, got 2 and 3"):
        nodes.nodes_sana.control_options(five, PROMPT)
