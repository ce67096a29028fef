"""Training an IP-Adapter at tiny size: on cached features, on folders, resumed, and beside 4-bit weights."""

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana import SanaIPAdapterModel, SanaPipeline, SVDQuantConfig, quantize
from diffusers_sana.models.ip_adapter_sana import IP_ADAPTER_FILE
from diffusers_sana.training.objectives.flow_matching import velocity_errors
from diffusers_sana.training.recipes.image_prompt import train
from diffusers_sana.training.recipes.options import ImagePromptTrainingConfig
from examples.train_sana_image_prompt import main
from tests.pipelines.image_prompt_cases import clip_encoder, colored
from tests.training import tiny


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 3, "log_every": 1, "warmup_steps": 0, "sample_steps": 2}
    return ImagePromptTrainingConfig(**settings | {"max_sequence_length": 32, "caption_dropout": 0.5} | changes)


def described_batch():
    """A batch of flat latents whose colors only the image prompt tells: the prompts are the same."""
    batch, levels = tiny.latent_batch(), torch.tensor([-3.0, -1.0, 1.0, 3.0])
    embeds = torch.zeros(4, 1, 12)
    embeds[:, 0, :4] = 3 * torch.eye(4)
    prompt = batch["prompt_embeds"][:1].repeat(4, 1, 1)
    return batch | {
        "latents": levels.view(4, 1, 1, 1).expand(4, 4, 4, 4).clone(),
        "prompt_embeds": prompt,
        "image_embeds": embeds,
    }


@pytest.mark.parametrize("bits", [16, 4])
def test_learns_what_only_the_image_says_and_leaves_the_transformer_alone(tmp_path, bits):
    transformer = tiny.tiny_transformer()
    if bits == 4:
        quantize(transformer, SVDQuantConfig(rank=4), progress=False)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    adapter = SanaIPAdapterModel.from_transformer(transformer, 12)
    batch = described_batch()
    config = make_config(tmp_path, max_steps=80, learning_rate=3e-2, caption_dropout=0.0)
    train(config, [batch], adapter, transformer)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    losses = [row["loss"] for row in tiny.read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    trained = SanaIPAdapterModel.from_tensors([load_file(tmp_path / "model" / IP_ADAPTER_FILE)], num_heads=2)

    @torch.no_grad()
    def error(embeds):
        """Of the velocity at much noise, where the latents hardly tell the color."""
        noise, latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1)), batch["latents"]
        text = batch["prompt_embeds"], batch["prompt_attention_mask"]
        context = transformer.encode_text(*text, image_states=trained([embeds]))
        noisy, sigmas = 0.1 * latents + 0.9 * noise, torch.full((4,), 0.9)
        velocity = transformer(noisy, None, 1000 * sigmas, text_context=context).sample
        return velocity_errors(velocity, noise - latents, sigmas).mean()

    assert error(batch["image_embeds"]) < 0.8 * error(batch["image_embeds"].flip(0))


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    transformer, vae, text_encoder = tiny.tiny_transformer(), tiny.tiny_autoencoder(), tiny.tiny_text_encoder()
    encoder, processor = clip_encoder()
    pixels = processor([colored(color) for color in ("red", "blue", "green", "white")], return_tensors="pt")

    def run(folder, resume=False, stop_at=None):
        torch.manual_seed(0)
        adapter = SanaIPAdapterModel.from_transformer(transformer, 8, features="patches", depth=1)

        def with_images(start):
            return (batch | {"prompt_image": pixels.pixel_values} for batch in tiny.image_batches(start))

        config = make_config(folder, max_steps=4, ema_decay=0.9, resume=resume, learning_rate=1e-2)
        encoders = tiny.encoders(text_encoder, vae)
        train(config, tiny.interrupted(with_images, stop_at), adapter, transformer, encoders, encoder)
        return load_file(folder / "model" / IP_ADAPTER_FILE)

    whole = tiny.check_resuming(run, tmp_path)
    assert all(value.any() for value in whole.values())  # the values of a new adapter are 0
    assert list((tmp_path / "whole" / "samples").glob("*.png"))


def test_says_which_part_a_batch_needs(tmp_path):
    batch = described_batch()
    batch["prompt_image"] = batch.pop("image_embeds")
    transformer = tiny.tiny_transformer()
    with pytest.raises(ValueError, match="`image_encoder` must be given for batches of `prompt_image`"):
        train(make_config(tmp_path), [batch], SanaIPAdapterModel.from_transformer(transformer, 12), transformer)


@pytest.mark.parametrize("quantized", [False, True])
def test_main(tmp_path, quantized):
    tiny.write_image_folder(tmp_path / "data", [(40, 40), (40, 40), (40, 90)])
    tiny.tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    encoder, processor = clip_encoder()
    for part in (encoder, processor):
        part.save_pretrained(tmp_path / "encoder")
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "pipeline")]
    arguments += ["--batch_size", "2", "--num_workers", "0", "--resolution", "32", "--max_steps", "2"]
    arguments += ["--sample_steps", "1", "--log_every", "1", "--max_sequence_length", "32"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="`image_encoder` must be a vision encoder's folder"):
        main(arguments)
    arguments += ["--image_encoder", str(tmp_path / "encoder")]
    main([*arguments, *(["--quantize", "int4", "--quantize-rank", "4"] if quantized else [])])
    pipe = SanaPipeline.from_pretrained(tmp_path / "pipeline", image_encoder=encoder, feature_extractor=processor)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(tmp_path / "out" / "model")
    assert pipe.ip_adapter.config["adapters"][0]["image_dim"] == 12
    options = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
    images = [
        pipe("a red cat", ip_adapter_image=image, generator=torch.Generator().manual_seed(0), **options).images
        for image in (colored("red"), None)
    ]
    assert not torch.equal(*images)
