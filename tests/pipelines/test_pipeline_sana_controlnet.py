"""`SanaControlNetPipeline` makes what diffusers' pipeline makes, from control images of all kinds."""

import inspect
import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import diffusers_sana
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.controlnet_cases import CAT, EDGES, controlnet, generate, options, pipeline


@pytest.fixture(scope="module")
def ours():
    return pipeline()


@pytest.fixture(scope="module")
def upstream():
    return pipeline(diffusers)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"controlnet_conditioning_scale": 0.4, "negative_prompt": "ugly"},
        {"guidance_scale": 1.0, "output_type": "pt"},
        {"prompt": [CAT, "a dog that has eaten too much"], "control_image": np.concatenate([EDGES, 1 - EDGES])},
        {"num_images_per_prompt": 2, "control_image": Image.fromarray((EDGES[0] * 255).astype(np.uint8))},
        {"control_image": torch.from_numpy(EDGES).movedim(-1, 1) * 2 - 1},
        {"control_image": [torch.from_numpy(EDGES[0]).movedim(-1, 0)]},
        {"height": 64, "width": 32},
        {"height": 64, "width": 64, "control_image": torch.zeros(1, 3, 32, 64)},  # generates at the tensor's size
    ],
    ids=["plain", "scale", "unguided", "batch", "image", "tensor", "list", "resized", "tensor_size"],
)
def test_equals_diffusers(ours, upstream, kwargs):
    assert_close_fp32(generate(ours, **kwargs), generate(upstream, **kwargs))


def test_equals_diffusers_with_binning():
    arguments = {"height": 300, "width": 280, "use_resolution_binning": True, "num_inference_steps": 1}
    pipes = [pipeline(library, num_stages=6) for library in (diffusers_sana, diffusers)]
    images = [generate(pipe, **arguments, output_type="np") for pipe in pipes]
    assert images[0].shape == (1, 300, 280, 3)
    np.testing.assert_allclose(*images, atol=1e-4)


@pytest.mark.parametrize("name", ["controlnet", "transformer", "vae", "scheduler"])
def test_parts_of_diffusers_in_ours_and_ours_in_theirs(ours, upstream, name):
    expected = generate(upstream)
    assert_close_fp32(generate(pipeline(parts={**ours.components, name: upstream.components[name]})), expected)
    if name != "controlnet":  # whose class their pipeline checks
        theirs = pipeline(diffusers, parts={**upstream.components, name: ours.components[name]})
        assert_close_fp32(generate(theirs), expected)


def test_signature_extends_that_of_diffusers():
    theirs, ours = (
        list(inspect.signature(library.SanaControlNetPipeline.__call__).parameters)
        for library in (diffusers, diffusers_sana)
    )
    more = ["control_guidance_start", "control_guidance_end", "guider", "share_prompt_mask"]
    assert ours == [*theirs, *more, "ip_adapter_image", "ip_adapter_image_embeds"]
    assert diffusers_sana.SanaControlNetPipeline.model_cpu_offload_seq == (
        diffusers.SanaControlNetPipeline.model_cpu_offload_seq
    )


def test_folders_go_both_ways(ours, upstream, tmp_path):
    upstream.save_pretrained(tmp_path / "theirs")
    pipe = diffusers_sana.SanaControlNetPipeline.from_pretrained(tmp_path / "theirs")
    assert type(pipe.controlnet) is diffusers_sana.SanaControlNetModel
    pipe.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "SanaControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "SanaControlNetModel"]
    back = diffusers.SanaControlNetPipeline.from_pretrained(tmp_path / "ours")
    assert type(back.controlnet) is diffusers.SanaControlNetModel
    unnamed = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(unnamed) is diffusers_sana.SanaControlNetPipeline
    for each in (pipe, back, unnamed):
        each.set_progress_bar_config(disable=True)
        assert_close_fp32(generate(each), generate(upstream))


def test_made_from_the_text_to_image_pipeline(ours, tmp_path):
    plain = tiny.pipeline(diffusers_sana)
    pipe = diffusers_sana.SanaControlNetPipeline.from_pipe(plain, controlnet=ours.controlnet)
    assert pipe.transformer is plain.transformer
    plain.save_pretrained(tmp_path)
    auto = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path, controlnet=ours.controlnet)
    assert type(auto) is diffusers_sana.SanaControlNetPipeline


def test_gray_images_and_bytes(ours):
    gray = (EDGES[0, :, :, 0] * 255).astype(np.uint8)
    as_color = Image.fromarray(gray).convert("RGB")
    expected = generate(ours, control_image=as_color)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    for image in (Image.fromarray(gray), [Image.fromarray(gray)], deep, np.asarray(as_color), [np.asarray(as_color)]):
        assert_close_fp32(generate(ours, control_image=image), expected)
    tensor = torch.from_numpy(gray)[None, None] / 127.5 - 1
    assert_close_fp32(generate(ours, control_image=tensor), expected)


def test_size_defaults_to_that_of_the_tensor_or_the_checkpoint(ours):
    arguments = {"height": None, "width": None, "output_type": "pt", "num_inference_steps": 1}
    assert generate(ours, **arguments).shape == (1, 3, 32, 32)
    assert generate(ours, **arguments, control_image=torch.zeros(1, 3, 32, 64)).shape == (1, 3, 32, 64)


def test_steers_only_the_steps_it_is_told_to(ours):
    calls = []
    handle = ours.controlnet.input_block.register_forward_hook(lambda *_: calls.append(1))
    full = generate(ours, num_inference_steps=4)
    assert len(calls) == 4
    begin = generate(ours, num_inference_steps=4, control_guidance_end=0.5)
    assert len(calls) == 6
    end = generate(ours, num_inference_steps=4, control_guidance_start=0.5)
    assert len(calls) == 8
    off = generate(ours, num_inference_steps=4, controlnet_conditioning_scale=0.0)
    assert len(calls) == 8
    handle.remove()
    outputs = [full, begin, end, off]
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_off_is_text_to_image(ours):
    t2i = diffusers_sana.SanaPipeline(**{k: v for k, v in ours.components.items() if k != "controlnet"})
    t2i.set_progress_bar_config(disable=True)
    plain = t2i(CAT, **{k: v for k, v in options({}).items() if k != "control_image"}).images
    assert torch.equal(generate(ours, controlnet_conditioning_scale=0.0), plain)


@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
def test_texts_are_projected_and_images_encoded_once(ours, wiring):
    pipe = pipeline(parts={**ours.components, "controlnet": controlnet(wiring=wiring)})
    counts = {"text": 0, "image": 0}
    hooks = [
        pipe.controlnet.caption_projection.register_forward_hook(lambda *_: counts.update(text=counts["text"] + 1)),
        pipe.vae.encoder.register_forward_hook(lambda _, args, out: counts.update(image=counts["image"] + len(out))),
    ]
    out = generate(pipe, num_images_per_prompt=2)
    for hook in hooks:
        hook.remove()
    assert counts == {"text": 1, "image": 1}
    assert (relative_error(out, generate(ours, num_images_per_prompt=2)) > 1e-3) == (wiring == "nvlabs")


def test_callback_sees_and_replaces_the_control_image(ours):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append(tensors["control_image"])
        return {"control_image": torch.cat([-tensors["control_image"]] * 2)}  # both halves, as diffusers has it

    names = ["latents", "control_image"]
    replaced = generate(ours, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen[0].shape == (1, tiny.LATENT_CHANNELS, 16, 16)
    assert torch.equal(seen[1], torch.cat([-seen[0]] * 2))
    assert relative_error(replaced, generate(ours)) > 1e-3


@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
def test_offload(wiring, offload):
    parts = {"controlnet": controlnet(wiring=wiring)}
    pipe = pipeline(parts=parts)
    expected = generate(pipe, output_type="pt")
    cpu = torch.device("cpu")
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        assert_close_fp32(generate(pipe, output_type="pt"), expected)


def test_lora_of_the_transformer(tmp_path):
    pipe, upstream = pipeline(), pipeline(diffusers)
    model = tiny.transformer(diffusers)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora" in k}
    diffusers.SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    plain = generate(pipe)
    for each in (pipe, upstream):
        each.load_lora_weights(tmp_path)
    half = {"attention_kwargs": {"scale": 0.5}}
    assert relative_error(generate(pipe), plain) > 1e-3
    assert_close_fp32(generate(pipe, **half), generate(upstream, **half))


@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
@pytest.mark.parametrize("layer", ["attn1.to_v", "attn2.to_v"], ids=["each_step", "text"])
def test_attention_kwargs_reach_the_controlnet(wiring, layer):
    """Layers that run at each step, and those of the text, which run once."""
    pipe = pipeline(parts={"controlnet": controlnet(wiring=wiring)})
    plain = generate(pipe)
    pipe.controlnet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[layer], init_lora_weights=False), "a")
    full, half = generate(pipe), generate(pipe, attention_kwargs={"scale": 0.5})
    assert_close_fp32(generate(pipe, attention_kwargs={"scale": 0.0}), plain)
    pipe.controlnet.set_adapters(["a"], [0.5])
    assert_close_fp32(generate(pipe), half)
    assert min(relative_error(half, full), relative_error(half, plain)) > 1e-3


def test_four_bits():
    pipe = pipeline()
    plain = generate(pipe)
    config = diffusers_sana.SVDQuantConfig(rank=4)
    diffusers_sana.quantize(pipe, config, components=("transformer", "controlnet"), progress=False)
    assert hasattr(pipe.controlnet.transformer_blocks[0].attn1.to_q, "qweight")
    assert 0 < relative_error(generate(pipe), plain) < 0.5


def test_compiled(ours):
    # diffusers' pipeline refuses a compiled ControlNet.
    compiled = torch.compile(ours.controlnet, backend="eager", fullgraph=True)
    pipe = pipeline(parts={**ours.components, "controlnet": compiled})
    assert_close_fp32(generate(pipe, num_inference_steps=1), generate(ours, num_inference_steps=1))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"control_image": None}, ValueError, "`control_image` must be given"),
        (
            {"control_image": torch.zeros(3, 32, 32)},
            ValueError,
            r"`control_image` must be .*got torch.float32 \[3, 32",
        ),
        (
            {"control_image": torch.zeros(1, 3, 32, 33)},
            ValueError,
            "`width` of `control_image` must be a multiple of 2",
        ),
        ({"control_image": torch.zeros(1, 4, 32, 32)}, ValueError, "must be gray or RGB, got 4 channels"),
        ({"control_image": torch.zeros(3, 3, 32, 32)}, ValueError, "one for each of the 1 prompts.*got 3"),
        ({"controlnet_conditioning_scale": [0.5]}, TypeError, r"`controlnet_conditioning_scale`.*got \[0.5\]"),
        ({"control_guidance_start": 0.7, "control_guidance_end": 0.7}, ValueError, "got 0.7 and 0.7"),
        ({"callback_on_step_end_tensor_inputs": ["image"]}, ValueError, "control_image.*got 'image'"),
    ],
)
def test_says_what_is_wrong(ours, kwargs, error, match):
    with pytest.raises(error, match=match):
        generate(ours, **kwargs)


@pytest.mark.parametrize("layers", [2, 3])
def test_outputs_that_nothing_reads(ours, upstream, layers, caplog):
    """A ControlNet as deep as the transformer, or deeper, works as in diffusers; with a warning."""
    logging.getLogger("diffusers_sana").addHandler(caplog.handler)
    try:
        deep = pipeline(parts={**ours.components, "controlnet": controlnet(num_layers=layers)})
    finally:
        logging.getLogger("diffusers_sana").removeHandler(caplog.handler)
    assert f"`controlnet` has {layers} layers for a transformer of 2, which uses the outputs of 1" in caplog.text
    theirs = pipeline(diffusers, parts={**upstream.components, "controlnet": controlnet(diffusers, num_layers=layers)})
    assert_close_fp32(generate(deep), generate(theirs))


def test_says_which_parts_do_not_fit(ours, upstream):
    def run(**parts):
        generate(pipeline(parts={**ours.components, **parts}))

    with pytest.raises(ValueError, match="their `caption_channels` are 8 and 16"):
        run(controlnet=controlnet(caption_channels=8))
    with pytest.raises(ValueError, match="`num_attention_heads` times `attention_head_dim` are 8 and 16"):
        run(controlnet=controlnet(num_attention_heads=1, cross_attention_dim=8, num_cross_attention_heads=1))
    with pytest.raises(ValueError, match="`wiring='nvlabs'`, which the transformer of diffusers cannot run"):
        run(controlnet=controlnet(wiring="nvlabs"), transformer=upstream.transformer)
