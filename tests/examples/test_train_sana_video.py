"""Training of SANA-Video at tiny size: videos and images, a LoRA, chunk by chunk, and from a model of images."""

from copy import deepcopy

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusers_sana
from diffusers_sana import (
    LongSanaVideoPipeline,
    SanaTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoState,
    SVDQuantConfig,
    quantize,
)
from diffusers_sana.pipelines.video_decoding import encode_videos
from diffusers_sana.training.growth import video_transformer
from diffusers_sana.training.objectives.block_causal import BlockCausalTransformer
from diffusers_sana.training.objectives.flow_matching import (
    ConditionedTransformer,
    noisy_batch,
    sample_guided,
    timesteps_of,
)
from diffusers_sana.training.recipes.options import SanaVideoTrainingConfig
from diffusers_sana.training.recipes.sana_video import train
from examples.train_sana_video import main
from tests import tiny, tiny_video
from tests.numerics import assert_close_fp32
from tests.pipelines.image_prompt_cases import trained_adapter
from tests.training.data.test_videos import write_animation
from tests.training.tiny import (
    CAPTIONS,
    check_resuming,
    encoders,
    interrupted,
    read_log,
    short_run,
    smooth_images,
    tiny_autoencoder,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
)


WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def make_config(folder, **changes):
    settings = short_run(folder, max_sequence_length=32, sample_steps=2, caption_dropout=0.5, chunk_frames=2)
    return SanaVideoTrainingConfig(**settings | changes)


def tiny_transformer():
    changes = {"in_channels": 4, "out_channels": 4, "patch_size": (1, 1, 1)}
    model = tiny_video.transformer(diffusers_sana, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("conv_temp.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def latent_batch(seed=0, frames=5, count=2):
    generator = torch.Generator().manual_seed(100 + seed)
    latents = torch.randn(count, 4, frames, 3, 3, generator=generator)
    embeds = torch.randn(count, 6, tiny.TEXT_WIDTH, generator=generator)
    mask = torch.ones(count, 6, dtype=torch.long)
    return {"latents": latents, "prompt_embeds": embeds, "prompt_attention_mask": mask}


def mixed_batches(start):
    """Endless batches of images and of videos, in turn, the same whenever begun at the same number."""
    while True:
        images = smooth_images(4, 16, seed=start)
        frames = 1 + 2 * (start % 2)
        videos = torch.stack([images.roll(4 * at, -1) for at in range(frames)], dim=2)
        yield {"pixel_values": videos, "text": CAPTIONS}
        start += 1


def tiny_video_pipeline():
    parts = tiny_tokenizer(), tiny_text_encoder(), tiny_autoencoder(), tiny_transformer()
    return SanaVideoPipeline(*parts, diffusers_sana.FlowDPMSolverScheduler(flow_shift=5.0))


@torch.no_grad()
def predict(transformer):
    batch = latent_batch(seed=1)
    return transformer.eval()(batch["latents"], batch["prompt_embeds"], torch.full((2,), 500.0), return_dict=False)[0]


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
def test_training_learns_a_fixed_batch(tmp_path, causal):
    changes = {"max_steps": 60, "learning_rate": 1e-2, "max_grad_norm": 1.0, "caption_dropout": 0.0}
    train(make_config(tmp_path, causal=causal, **changes), [latent_batch()], tiny_transformer())
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert (tmp_path / "model" / "transformer" / WEIGHTS).exists()
    assert not (tmp_path / "samples").exists()  # which need an autoencoder


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
def test_images_and_videos_train_a_pipeline_that_runs(tmp_path, causal):
    transformer, text_encoder, vae = tiny_transformer(), tiny_text_encoder(), tiny_autoencoder()
    before = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    config = make_config(tmp_path, causal=causal, train_text_encoder=True, ema_decay=0.9, learning_rate=1e-2)
    train(config, mixed_batches, transformer, encoders(text_encoder, vae))
    pipeline_class = LongSanaVideoPipeline if causal else SanaVideoPipeline
    pipe = pipeline_class.from_pretrained(tmp_path / "model")
    after = pipe.text_encoder.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert pipe.scheduler.config.flow_shift == 8.0
    pipe.set_progress_bar_config(disable=True)
    settings = {} if causal else {"num_inference_steps": 2}
    frames = pipe("a red cat", frames=3, height=16, width=16, max_sequence_length=32, **settings).frames[0]
    assert [frame.size for frame in frames] == [(16, 16)] * 3
    grid = Image.open(sorted((tmp_path / "samples").glob("*.png"))[-1])
    assert grid.size == (3 * 16, 4 * 16)  # a row of frames for each prompt


@pytest.mark.parametrize("kind", ["whole", "causal", "lora"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    start, vae = tiny_transformer(), tiny_autoencoder()

    def batches(number):
        return map(lambda at: latent_batch(at, frames=1 + 4 * (at % 2)), range(number, 100))

    def run(folder, resume=False, stop_at=None):
        changes = {"max_steps": 4, "ema_decay": 0.9, "learning_rate": 1e-2, "lora_dropout": 0.2}
        config = make_config(folder, resume=resume, lora=kind == "lora", causal=kind == "causal", **changes)
        train(config, interrupted(batches, stop_at), deepcopy(start), encoders(None, vae))
        return load_file(folder / "model" / (LORA if kind == "lora" else f"transformer/{WEIGHTS}"))

    whole = check_resuming(run, tmp_path)
    if kind == "lora":
        assert any(value.any() for name, value in whole.items() if "lora_B" in name)
    else:
        assert any(not torch.equal(whole[name], value) for name, value in start.state_dict().items())


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_lora_beside_a_base_that_stays(tmp_path, base):
    transformer = tiny_transformer()
    if base == "int4":
        quantize(transformer, SVDQuantConfig(rank=2), progress=False)
    start, before = deepcopy(transformer), {name: value.clone() for name, value in transformer.state_dict().items()}
    untrained = predict(transformer)
    targets = ("to_q", "to_v", "conv_temp")
    config = make_config(tmp_path, lora=True, target_modules=targets, max_steps=20, learning_rate=2e-2)
    train(config, [latent_batch()], transformer)
    trained = predict(transformer)
    assert not torch.allclose(trained, untrained, atol=1e-2)
    after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    kept = load_file(next((tmp_path / "checkpoints").rglob("model.safetensors")))
    assert kept
    assert all("lora" in name for name in kept)
    pipe = SanaVideoPipeline(**tiny_video_pipeline().components | {"transformer": start})
    pipe.load_lora_weights(tmp_path / "model")
    assert_close_fp32(predict(pipe.transformer), trained, 1e-5)


def streamed(transformer, noisy, clean, sigmas, embeds, mask):
    """The velocities of chunks of 3 and 2 frames, as a stream that has seen the clean frames computes them."""
    options = {"encoder_attention_mask": mask}
    time = timesteps_of(sigmas)
    first = transformer(noisy[:, :, :3], embeds, time, state=SanaVideoState(), **options).sample
    seen = transformer(clean[:, :, :3], embeds, torch.zeros_like(time), state=SanaVideoState(), **options).state
    return torch.cat([first, transformer(noisy[:, :, 3:], embeds, time, state=seen, **options).sample], dim=2)


def test_causal_loss_is_that_of_the_stream(tmp_path):
    """The loss in the log, without a step before it, against the same noise through the streaming state."""
    transformer, batch = tiny_transformer(), latent_batch()
    embeds, mask, latents = batch["prompt_embeds"], batch["prompt_attention_mask"], batch["latents"]
    config = make_config(tmp_path, causal=True, max_steps=1, caption_dropout=0.0)
    expected = deepcopy(transformer)
    train(config, [batch], transformer)
    torch.manual_seed(0)
    noisy, sigmas, target = noisy_batch(latents, 3.0)
    with torch.no_grad():
        velocity = streamed(expected, noisy, latents, sigmas, embeds, mask)
    assert read_log(tmp_path)[0]["loss"] == pytest.approx((velocity - target).square().mean().item(), rel=1e-4)


@torch.no_grad()
def test_chunks_see_clean_earlier_ones_only():
    transformer, batch = tiny_transformer(), latent_batch()
    prompt, clean = (batch["prompt_embeds"], batch["prompt_attention_mask"]), batch["latents"]
    noisy, sigmas, _ = noisy_batch(clean, 3.0)
    causal = BlockCausalTransformer(transformer, 2)  # chunks of 3 and 2 frames
    velocity = causal(noisy, sigmas, prompt, clean=clean)

    def change(tensor, frame):
        changed = tensor.clone()
        changed[:, :, frame] += 1
        return changed

    assert torch.equal(causal(noisy, sigmas, prompt, clean=change(clean, 4)), velocity)
    by_clean = causal(noisy, sigmas, prompt, clean=change(clean, 2)) - velocity
    assert not by_clean[:, :, :3].any()
    assert by_clean[:, :, 3:].abs().mean() > 1e-4
    by_noisy = causal(change(noisy, 2), sigmas, prompt, clean=clean) - velocity
    assert by_noisy[:, :, :3].abs().mean() > 1e-4
    assert not by_noisy[:, :, 3:].any()
    one = BlockCausalTransformer(transformer, 5)(noisy, sigmas, prompt, clean=clean)
    assert_close_fp32(one, ConditionedTransformer(transformer)(noisy, sigmas, prompt))


@torch.no_grad()
def test_samples_of_a_causal_model_are_made_chunk_by_chunk():
    transformer, batch = tiny_transformer(), latent_batch()
    prompt = tuple(torch.cat([part, part]) for part in (batch["prompt_embeds"], batch["prompt_attention_mask"]))
    noise = torch.randn(2, 4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    model = BlockCausalTransformer(transformer, 2)
    made = model.sample(prompt, noise, 2.0, 2, 3.0)
    dropped = torch.tensor([False, False, True, True])
    first = sample_guided(lambda *inputs, **options: model(*inputs, prompt, **options), noise[:, :, :3], 2.0, 2, 3.0)
    assert_close_fp32(made[:, :, :3], first)
    mask = prompt[1].clone()
    mask[dropped, 1:] = 0
    seen = transformer(
        torch.cat([first, first]), prompt[0], torch.zeros(4), encoder_attention_mask=mask, state=SanaVideoState()
    ).state
    after = sample_guided(
        lambda *inputs, **options: model(*inputs, prompt, state=seen, **options), noise[:, :, 3:], 2.0, 2, 3.0
    )
    assert_close_fp32(made[:, :, 3:], after)


@torch.no_grad()
@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_a_model_of_images_becomes_one_of_videos(timestep_scale):
    """At one token, whose position turns nothing, it computes the same for each time."""
    torch.manual_seed(0)
    changes = {"timestep_scale": timestep_scale, "qk_norm": "rms_norm_across_heads"}
    images = SanaTransformer2DModel(**tiny.TRANSFORMER | changes).eval()
    before = torch.get_rng_state()
    videos = video_transformer(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not videos.training
    latents, embeds = torch.randn(5, 4, 1, 1), torch.randn(5, 6, tiny.TEXT_WIDTH)
    times = torch.tensor([0.0, 17.0, 500.0, 833.0, 999.0])
    expected = images(latents, embeds, times * timestep_scale).sample
    found = videos(latents.unsqueeze(2), embeds, times).sample.squeeze(2)
    assert_close_fp32(found, expected, 1e-5 if timestep_scale == 1 else 1e-3)
    with pytest.raises(ValueError, match="`transformer` must have no guidance embedding and no positional table"):
        video_transformer(SanaTransformer2DModel(**tiny.TRANSFORMER | {"interpolation_scale": 1}))


@torch.no_grad()
def test_videos_are_encoded_as_the_pipelines_decode_them():
    videos = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = tiny_autoencoder()
    latents = encode_videos(vae, videos)
    assert latents.shape == (2, 4, 5, 4, 4)
    assert_close_fp32(latents[1:, :, 3], vae.encode(videos[1:, :, 3]).latent * vae.config.scaling_factor)
    wan = tiny_video.vae()
    latents = encode_videos(wan, videos)
    assert latents.shape == (2, 16, 2, 2, 2)
    assert_close_fp32(latents[:, :, :1], encode_videos(wan, videos[:, :, :1]), 1e-4)  # it looks at no later frame


def folder_of_videos(folder):
    """Animations of 4, 5 and 6 frames, and an image."""
    folder.mkdir()
    for count in (4, 5, 6):
        write_animation(folder / f"{count}.webp", count, size=(16, 16))
        (folder / f"{count}.txt").write_text(CAPTIONS[count % 2])
    Image.new("RGB", (16, 16)).save(folder / "still.png")
    (folder / "still.txt").write_text("a green house")
    return folder


def test_command_line(tmp_path):
    """A LoRA beside 4 bits from a folder, whose latents and text vectors are computed once."""
    tiny_video_pipeline().save_pretrained(tmp_path / "start")
    folder = folder_of_videos(tmp_path / "data")
    settings = {"data": folder, "pretrained": tmp_path / "start", "output_dir": tmp_path / "out", "max_steps": 2}
    settings |= {"resolution": 16, "fps": 8, "batch_size": 2, "max_sequence_length": 32, "sample_steps": 1}
    arguments = [f"--{name}={value}" for name, value in settings.items()] + ["--frames", "3", "5"]
    main([*arguments, "--lora", "--quantize=int4", "--quantize_rank=2", "--sample-prompts", "a red cat"])
    shapes = {load_file(path)["latents"].shape for path in (tmp_path / "out" / "cache").glob("*.safetensors")}
    assert shapes == {(4, 3, 4, 4), (4, 5, 4, 4), (4, 1, 4, 4)}
    assert load_file(tmp_path / "out" / "model" / LORA)
    assert Image.open(next((tmp_path / "out" / "samples").glob("*.png"))).height == 16
    with pytest.raises(ValueError, match="`quantize` must be 'no' without `lora`, got 'int4'"):
        main([*arguments, "--quantize=int4", f"--output_dir={tmp_path / 'other'}"])


def test_samples_of_a_causal_lora_in_bf16(tmp_path):
    config = make_config(tmp_path, causal=True, lora=True, mixed_precision="bf16", train_text_encoder=False)
    batch = latent_batch() | {"latents": torch.randn(2, 4, 5, 4, 4)}
    transformer = tiny_transformer().bfloat16()
    train(config, [batch], transformer, encoders(None, tiny_autoencoder()))
    assert Image.open(next((tmp_path / "samples").glob("*.png"))).width == 5 * 16


def test_from_a_pipeline_of_images(tmp_path):
    """Its IP-Adapter is none of videos."""
    pipe = tiny_pipeline()
    pipe.register_modules(ip_adapter=trained_adapter(pipe.transformer))
    pipe.save_pretrained(tmp_path / "start")
    folder = folder_of_videos(tmp_path / "data")
    settings = {"data": folder, "pretrained": tmp_path / "start", "output_dir": tmp_path / "out", "max_steps": 1}
    settings |= {"resolution": 16, "frames": 3, "fps": 0, "max_sequence_length": 32, "sample_steps": 1}
    main([f"--{name}={value}" for name, value in settings.items()])
    pipe = SanaVideoPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.transformer.config.patch_size == [1, 1, 1]
    assert pipe.scheduler.config.flow_shift == 8.0


def test_frames_that_the_autoencoder_cannot_have(tmp_path):
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder()}
    tiny_video.pipeline(diffusers_sana, parts=parts).save_pretrained(tmp_path / "start")
    folder = folder_of_videos(tmp_path / "data")
    settings = {"data": folder, "pretrained": tmp_path / "start", "output_dir": tmp_path / "out", "frames": 6}
    with pytest.raises(ValueError, match=r"`frames` must be one more than a multiple of 4.*got 6\. Use 5 or 9"):
        main([f"--{name}={value}" for name, value in settings.items()])


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="`train_text_encoder` must be left out with `lora`"):
        SanaVideoTrainingConfig(lora=True, train_text_encoder=True)
    with pytest.raises(ValueError, match="`chunk_frames` must be at least 1, got 0"):
        SanaVideoTrainingConfig(chunk_frames=0)
    with pytest.raises(ValueError, match="`text_encoder` must be given to be trained"):
        train(SanaVideoTrainingConfig(train_text_encoder=True), [latent_batch()], tiny_transformer())
