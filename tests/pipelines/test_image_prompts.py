"""Image prompts in all pipelines: loading, scales, batches, guidance, 4 bits, LoRA, encoders, folders and errors."""

import copy

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import diffusers_sana
from diffusers_sana import SanaIPAdapterModel, SVDQuantConfig, quantize
from diffusers_sana.pipelines.image_prompts import image_features, image_processor_of, load_image_encoder
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.controlnet_cases import controlnet
from tests.pipelines.image_prompt_cases import (
    clip_encoder,
    colored,
    siglip_encoder,
    trained_adapter,
    vila_u_encoder,
)
from tests.pipelines.sprint_cases import SPRINT


RED, BLUE = colored("red"), colored("blue")
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(32) < 16).float().expand(1, 1, 32, 32)
SIZED = {"height": 32, "width": 32, "use_resolution_binning": False, "num_inference_steps": 2}

# Pipeline -> arguments of its call beside those of all.
PIPELINES = {
    "SanaPipeline": {},
    "SanaPAGPipeline": {"pag_scale": 2.0},
    "SanaImg2ImgPipeline": {"image": IMAGE, "strength": 0.7},
    "SanaInpaintPipeline": {"image": IMAGE, "mask_image": MASK},
    "SanaControlNetPipeline": {"control_image": IMAGE},
    "SanaControlNetImg2ImgPipeline": {"image": IMAGE, "control_image": IMAGE, "strength": 0.7},
    "SanaControlNetInpaintPipeline": {"image": IMAGE, "mask_image": MASK, "control_image": IMAGE},
    "SanaSprintPipeline": {},
    "SanaSprintImg2ImgPipeline": {"image": IMAGE, "strength": 0.6},
    "SanaSprintControlNetPipeline": {"control_image": IMAGE},
}


def with_encoder(name="SanaPipeline", **changes):
    """A pipeline with a CLIP encoder and without an adapter."""
    is_sprint = "Sprint" in name
    parts = tiny.components(diffusers_sana, **(SPRINT if is_sprint else {}), **changes)
    if is_sprint:
        parts["scheduler"] = diffusers.SCMScheduler()
    if "ControlNet" in name:
        parts["controlnet"] = controlnet()
    encoder, processor = clip_encoder()
    pipe = getattr(diffusers_sana, name)(**parts, image_encoder=encoder, feature_extractor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="a cat", seed=3, **kwargs):
    return tiny.generate(pipe, prompt, seed, **SIZED | kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter's file."""
    path = tmp_path_factory.mktemp("adapter")
    trained_adapter(tiny.transformer(diffusers_sana)).save_adapter(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    """For tests that leave it as it is."""
    made = with_encoder()
    made.load_ip_adapter(folder)
    return made


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline(name, tmp_path):
    pipe, options = with_encoder(name), PIPELINES[name]
    plain = generate(pipe, **options)
    trained_adapter(pipe.transformer).save_adapter(tmp_path)
    pipe.load_ip_adapter(tmp_path)
    assert torch.equal(generate(pipe, **options), plain)  # no image, no effect
    red = generate(pipe, **options, ip_adapter_image=RED)
    assert relative_error(red, plain) > 1e-3
    assert relative_error(generate(pipe, **options, ip_adapter_image=BLUE), red) > 1e-4
    embeds = pipe.prepare_ip_adapter_image_embeds(RED)
    assert torch.equal(generate(pipe, **options, ip_adapter_image_embeds=embeds), red)
    pipe.set_ip_adapter_scale(0.0)
    assert torch.equal(generate(pipe, **options, ip_adapter_image=RED), plain)
    pipe.unload_ip_adapter()
    assert pipe.components.keys() == getattr(diffusers_sana, name).from_pipe(pipe).components.keys()
    assert "image_encoder" not in pipe.components
    assert torch.equal(generate(pipe, **options), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_a_batch_is_its_images(pipe, guidance_scale):
    """Also prompts without a token, whose attention to the text is a constant, and several images per prompt."""
    prompts, options = ["a cat", "", "a red fox"], {"guidance_scale": guidance_scale}
    images = (RED, BLUE, colored("green"))
    embeds = torch.cat([pipe.prepare_ip_adapter_image_embeds(image)[0] for image in images])
    noise = torch.randn(6, tiny.LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(3))
    batch = generate(
        pipe, prompts, latents=noise, num_images_per_prompt=2, ip_adapter_image_embeds=[embeds], **options
    )
    for row in range(6):
        own = {"latents": noise[row : row + 1], "ip_adapter_image": images[row // 2]}
        assert_close_fp32(batch[row : row + 1], generate(pipe, prompts[row // 2], **own, **options))
    shared = generate(pipe, prompts, latents=noise[:3], ip_adapter_image=RED, **options)
    expected = generate(pipe, "a red fox", latents=noise[2:3], ip_adapter_image=RED, **options)
    assert_close_fp32(shared[2:], expected)


def test_guidance_is_away_from_the_transformer_alone(pipe):
    """One step by hand: the negative half has no image prompt."""
    seen = []

    def record(module, args, kwargs, output):
        seen.append((kwargs["text_context"], output[0]))

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        generate(pipe, num_inference_steps=1, ip_adapter_image=RED)
        generate(pipe, num_inference_steps=1)
        generate(pipe, num_inference_steps=1, guider=diffusers.ClassifierFreeGuidance(4.5), ip_adapter_image=RED)
    finally:
        handle.remove()
    (context, with_image), (_, without), (_, guided) = seen
    assert [len(image.key) for images in context.image_states for image in images] == [1, 1]
    assert_close_fp32(with_image[:1], without[:1])
    assert relative_error(with_image[1:], without[1:]) > 1e-3
    assert torch.equal(guided, with_image)


def test_an_image_is_projected_once_per_call(pipe):
    counts = {"image_encoder": 0, "ip_adapter": 0, "transformer": 0}
    handles = []
    for name in counts:

        def count(*_, name=name):
            counts[name] += 1

        handles.append(getattr(pipe, name).register_forward_hook(count))
    generate(pipe, num_inference_steps=3, ip_adapter_image=RED)
    for handle in handles:
        handle.remove()
    assert counts == {"image_encoder": 1, "ip_adapter": 1, "transformer": 3}


def test_several_images_and_several_adapters(pipe, tmp_path):
    two = pipe.prepare_ip_adapter_image_embeds([[RED, BLUE]])
    assert two[0].shape == (1, 2, 12)
    both = generate(pipe, ip_adapter_image=[[RED, BLUE]])
    assert relative_error(both, generate(pipe, ip_adapter_image=RED)) > 1e-4
    assert_close_fp32(generate(pipe, ip_adapter_image=[[BLUE, RED]]), both)

    multiple = with_encoder()
    for name, options in (("one", {}), ("two", {"image_dim": 8, "seed": 2, "features": "patches"})):
        trained_adapter(multiple.transformer, **options).save_adapter(tmp_path / name)
    multiple.load_ip_adapter([tmp_path / "one", tmp_path / "two"])
    all_of_them = generate(multiple, ip_adapter_image=[RED, [RED, BLUE]])
    multiple.set_ip_adapter_scale([1.0, 0.0])
    first = generate(multiple, ip_adapter_image=[RED, [RED, BLUE]])
    assert relative_error(first, all_of_them) > 1e-3
    multiple.load_ip_adapter(tmp_path / "one")
    assert_close_fp32(generate(multiple, ip_adapter_image=RED), first)
    multiple.load_ip_adapter(tmp_path, subfolder=["one", "two"])
    assert_close_fp32(generate(multiple, ip_adapter_image=[RED, [RED, BLUE]]), all_of_them)


def test_pil_images_arrays_and_tensors_are_the_same(pipe):
    array = np.asarray(RED)
    expected = pipe.prepare_ip_adapter_image_embeds(RED)[0]
    for image in (array, array / 255.0, torch.from_numpy(array).permute(2, 0, 1), RED.convert("RGBA")):
        assert_close_fp32(pipe.prepare_ip_adapter_image_embeds(image)[0], expected)


@pytest.mark.parametrize("make", [siglip_encoder, vila_u_encoder], ids=["siglip", "vila_u"])
@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_encoders(make, features, tmp_path):
    encoder, processor = make()
    pipe, width = with_encoder(), encoder.config.hidden_size
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    trained_adapter(pipe.transformer, width, features=features).save_adapter(tmp_path)
    pipe.load_ip_adapter(tmp_path)
    embeds = pipe.prepare_ip_adapter_image_embeds(RED)[0]
    pixels = processor([RED], return_tensors="pt").pixel_values
    if make is vila_u_encoder:
        patches = encoder.encode(pixels).flatten(1, 2)
        expected = patches.mean(dim=1) if features == "pooled" else patches
    else:
        outputs = encoder(pixels, output_hidden_states=True)
        expected = outputs.pooler_output if features == "pooled" else outputs.hidden_states[-2]
    assert_close_fp32(embeds, expected[None])
    assert relative_error(generate(pipe, ip_adapter_image=RED), generate(pipe)) > 1e-4


def test_the_semantic_head_of_vila_u():
    encoder, processor = vila_u_encoder(use_semantic_head=True)
    pixels = processor([RED], return_tensors="pt").pixel_values
    assert_close_fp32(image_features(encoder, pixels, "pooled"), encoder.get_image_features(pixels))


@pytest.mark.parametrize("make", [clip_encoder, siglip_encoder, vila_u_encoder], ids=["clip", "siglip", "vila_u"])
def test_an_image_encoder_is_loaded_beside_the_adapter(make, folder, tmp_path):
    encoder, processor = make()
    width = 12 if make is clip_encoder else encoder.config.hidden_size
    pipe = tiny.pipeline(diffusers_sana)
    trained_adapter(pipe.transformer, width).save_adapter(tmp_path)
    encoder.save_pretrained(tmp_path / "image_encoder")
    processor.save_pretrained(tmp_path / "image_encoder")
    pipe.load_ip_adapter(tmp_path)
    assert type(pipe.image_encoder) is type(encoder)
    assert type(pipe.feature_extractor).__name__.removesuffix("Fast") == type(processor).__name__.removesuffix("Fast")
    found = pipe.prepare_ip_adapter_image_embeds(RED)[0]
    usual = image_processor_of(encoder)([RED], return_tensors="pt").pixel_values
    assert_close_fp32(found, image_features(encoder, usual, "pooled")[None])
    other = tiny.pipeline(diffusers_sana)
    other.load_ip_adapter(tmp_path / "ip_adapter.safetensors", image_encoder_folder=str(tmp_path / "image_encoder"))
    assert_close_fp32(other.prepare_ip_adapter_image_embeds(RED)[0], found)
    without = tiny.pipeline(diffusers_sana)
    without.load_ip_adapter(tmp_path, image_encoder_folder=None)
    assert without.image_encoder is None
    assert_close_fp32(generate(without, ip_adapter_image_embeds=[found]), generate(pipe, ip_adapter_image=RED))


def test_the_half_of_a_whole_clip_that_sees(tmp_path):
    expected, processor = clip_encoder()
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = CLIPConfig(text_config=text, vision_config=expected.config.to_dict(), projection_dim=12)
    whole = CLIPModel(config)
    whole.load_state_dict(expected.state_dict(), strict=False)
    whole.save_pretrained(tmp_path)
    encoder, made = load_image_encoder(tmp_path)
    pixels = made([RED], return_tensors="pt").pixel_values
    assert torch.equal(pixels, processor([RED], return_tensors="pt").pixel_values)
    assert_close_fp32(image_features(encoder, pixels, "pooled"), expected(pixels).image_embeds)


def test_the_tower_of_a_whole_vila_u():
    encoder, processor = load_image_encoder(diffusers_sana.VILA_U_EMOJI)
    side = encoder.config.image_size
    pixels = processor([RED], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, side, side)
    assert image_features(encoder, pixels, "patches").shape == (
        1,
        encoder.config.grid_size**2,
        encoder.config.hidden_size,
    )


def test_tensors_in_place_of_a_file(pipe, folder):
    expected = generate(pipe, ip_adapter_image=RED)
    flat = trained_adapter(pipe.transformer).ip_adapters[0].state_dict()
    nested = {}
    for name, tensor in flat.items():
        part, _, key = name.partition(".")
        nested.setdefault(part, {})[key] = tensor
    for tensors in (flat, nested):
        other = with_encoder()
        other.load_ip_adapter(tensors)
        assert torch.equal(generate(other, ip_adapter_image=RED), expected)


def test_folders_of_pipelines(pipe, tmp_path):
    """With image prompts, the whole pipeline; without them, what diffusers writes."""
    pipe.save_pretrained(tmp_path / "whole")
    loaded = diffusers_sana.SanaPipeline.from_pretrained(tmp_path / "whole")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.ip_adapter, SanaIPAdapterModel)
    assert relative_error(generate(loaded, ip_adapter_image=RED), generate(pipe, ip_adapter_image=RED)) < 1e-5
    plain = tiny.pipeline(diffusers_sana)
    plain.save_pretrained(tmp_path / "plain")
    index = (tmp_path / "plain" / "model_index.json").read_text()
    assert "ip_adapter" not in index
    assert "image_encoder" not in index
    assert plain.components.keys() == tiny.pipeline(diffusers).components.keys()
    assert diffusers.SanaPipeline(**plain.components).components.keys() == plain.components.keys()


def test_components_are_shared(pipe):
    other = diffusers_sana.SanaImg2ImgPipeline.from_pipe(pipe)
    assert other.ip_adapter is pipe.ip_adapter
    assert other.image_encoder is pipe.image_encoder
    again = diffusers_sana.SanaPipeline.from_pipe(tiny.pipeline(diffusers), ip_adapter=pipe.ip_adapter)
    assert again.image_encoder is None


def test_with_lora_and_4_bits_and_offload(folder, tmp_path):
    wider = {"num_attention_heads": 8, "num_cross_attention_heads": 8, "cross_attention_dim": 64}
    pipe = with_encoder(**wider)
    trained_adapter(pipe.transformer).save_adapter(tmp_path)
    pipe.load_ip_adapter(tmp_path)
    exact = generate(pipe, ip_adapter_image=RED)
    model = tiny.transformer(diffusers, **wider)
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, lora_alpha=20, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    layers = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora" in name}
    diffusers.SanaPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    quantize(pipe, SVDQuantConfig(rank=4), progress=False)
    quantized = generate(pipe, ip_adapter_image=RED)
    assert 1e-5 < relative_error(quantized, exact) < 0.3
    pipe.load_lora_weights(tmp_path / "lora")
    with_both = generate(pipe, ip_adapter_image=RED)
    assert relative_error(with_both, quantized) > 1e-4
    assert relative_error(with_both, generate(pipe)) > 1e-4
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe, ip_adapter_image=RED), with_both)
    pipe.disable_lora()
    assert torch.equal(generate(pipe, ip_adapter_image=RED), quantized)


def test_group_offload_and_half_precision(folder):
    pipe = with_encoder()
    pipe.load_ip_adapter(folder)
    expected, cpu = generate(pipe, ip_adapter_image=RED), torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert relative_error(generate(pipe, ip_adapter_image=RED), expected) < 1e-5
    half = with_encoder().to(torch.bfloat16)
    half.load_ip_adapter(folder)
    assert half.ip_adapter.dtype == torch.bfloat16
    assert relative_error(generate(half, ip_adapter_image=RED), expected) < 0.05


@pytest.mark.parametrize("make", [clip_encoder, vila_u_encoder], ids=["clip", "vila_u"])
def test_sequential_offload(make, tmp_path):
    """Weights that are kept elsewhere are on "meta", where no inputs may go and no adapter may be loaded."""
    pipe, cpu = with_encoder(), torch.device("cpu")
    encoder, processor = make()
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    width = image_features(encoder, processor([RED], return_tensors="pt").pixel_values, "pooled").shape[-1]
    trained_adapter(pipe.transformer, width).save_adapter(tmp_path)
    pipe.load_ip_adapter(tmp_path)
    embeds, expected = pipe.prepare_ip_adapter_image_embeds(RED), generate(pipe, ip_adapter_image=RED)
    accelerate.cpu_offload(pipe.ip_adapter, execution_device=cpu)
    assert_close_fp32(generate(pipe, ip_adapter_image_embeds=embeds), expected)
    accelerate.cpu_offload(pipe.transformer, execution_device=cpu)
    pipe.load_ip_adapter(tmp_path)
    assert_close_fp32(generate(pipe, ip_adapter_image_embeds=embeds), expected)
    accelerate.cpu_offload(encoder, execution_device=cpu)
    assert encoder.device.type == "meta"
    assert_close_fp32(pipe.prepare_ip_adapter_image_embeds(RED, device=cpu)[0], embeds[0])


class TestErrors:
    def test_missing_parts(self, pipe, folder):
        with pytest.raises(ValueError, match=r"`ip_adapter_image` needs an IP-Adapter. Call `pipe.load_ip_adapter`"):
            generate(with_encoder(), ip_adapter_image=RED)
        with pytest.raises(ValueError, match="no IP-Adapter to set the `scale` of"):
            with_encoder().set_ip_adapter_scale(1.0)
        without = tiny.pipeline(diffusers_sana)
        without.load_ip_adapter(folder)
        with pytest.raises(ValueError, match="`ip_adapter_image` needs `image_encoder`, which this pipeline does not"):
            generate(without, ip_adapter_image=RED)
        with pytest.raises(ValueError, match="exclude each other"):
            generate(pipe, ip_adapter_image=RED, ip_adapter_image_embeds=[torch.zeros(1, 1, 12)])

    def test_wrong_encoder(self, folder):
        pipe = with_encoder()
        encoder, processor = siglip_encoder()
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
        pipe.load_ip_adapter(folder)
        with pytest.raises(
            ValueError, match=r"\[prompts, images, 12\].*got \[1, 1, 8\]. Use the image encoder that it"
        ):
            generate(pipe, ip_adapter_image=RED)

    def test_adapter_of_another_model(self, folder, tmp_path):
        deeper = tiny.pipeline(diffusers_sana, num_layers=3)
        with pytest.raises(ValueError, match=r"for another transformer: it has 2 blocks .* the transformer 3 with"):
            deeper.load_ip_adapter(folder)
        assert deeper.ip_adapter is None
        pipe = with_encoder()
        pipe.load_ip_adapter(folder)
        pipe.transformer = deeper.transformer
        with pytest.raises(ValueError, match="for another transformer"):
            generate(pipe, ip_adapter_image=RED)
        theirs = diffusers_sana.SanaPipeline(**tiny.components(diffusers))
        with pytest.raises(ValueError, match=r"`transformer` must be diffusers_sana.SanaTransformer2DModel"):
            theirs.load_ip_adapter(folder)
        file = tmp_path / "lora.safetensors"
        save_file({"proj.weight": torch.zeros(2, 2)}, file)
        with pytest.raises(ValueError, match=r"lora.safetensors: the tensors must be those of an IP-Adapter of Sana"):
            with_encoder().load_ip_adapter(file)
        with pytest.raises(OSError, match=r"ip_adapter.safetensors"):
            with_encoder().load_ip_adapter(tmp_path)

    def test_wrong_prompts(self, pipe):
        for wrong, error, message in (
            ({"ip_adapter_image": [RED, BLUE]}, ValueError, "one entry for each of 1 IP-Adapters, got 2"),
            ({"ip_adapter_image": [[]]}, TypeError, "must hold PIL images, arrays or tensors"),
            ({"ip_adapter_image": "red.png"}, TypeError, "must hold PIL images, arrays or tensors"),
            ({"ip_adapter_image_embeds": torch.zeros(1, 1, 12)}, ValueError, "must be a list of 1"),
            ({"ip_adapter_image_embeds": [torch.zeros(3, 1, 12)]}, ValueError, "1 row, or one for each of 1 prompts"),
            ({"ip_adapter_image_embeds": [torch.full((1, 1, 12), torch.nan)]}, ValueError, "must be finite"),
        ):
            with pytest.raises(error, match=message):
                generate(pipe, **wrong)
        with pytest.raises(TypeError, match="`ip_adapter` is no argument of `load_ip_adapter`"):
            copy.copy(pipe).load_ip_adapter({}, ip_adapter=1)
        with pytest.raises(ValueError, match="must be of one length"):
            copy.copy(pipe).load_ip_adapter(["a", "b"], weight_name=["a", "b", "c"])
