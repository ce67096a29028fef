"""The text-to-image example at tiny size."""

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana import SanaPipeline
from diffusers_sana.training.data.captions import Caption, caption_line
from diffusers_sana.training.recipes.options import SanaTrainingConfig
from diffusers_sana.training.recipes.sana import train
from diffusers_sana.training.state_files import read_state
from examples.train_sana import main
from tests.training.tiny import (
    check_resuming,
    encoders,
    image_batches,
    interrupted,
    latent_batch,
    read_log,
    short_run,
    tiny_autoencoder,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_transformer,
    write_image_folder,
)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_config(folder, **changes):
    settings = short_run(folder, warmup_steps=0, max_sequence_length=32, sample_steps=2, caption_dropout=0.5)
    return SanaTrainingConfig(**settings | changes)


def test_training_learns_a_fixed_batch(tmp_path):
    config = make_config(tmp_path, max_steps=60, learning_rate=2e-2, max_grad_norm=1.0, caption_dropout=0.0)
    train(config, [latent_batch()], tiny_transformer())
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert (tmp_path / "model" / "transformer" / WEIGHTS).exists()
    assert (tmp_path / "loss.png").exists()
    assert not (tmp_path / "samples").exists()  # which need an autoencoder


def test_joint_training_saves_a_pipeline_that_runs(tmp_path):
    transformer, text_encoder = tiny_transformer(), tiny_text_encoder()
    before = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    vae = tiny_autoencoder()
    vae_before = {name: value.clone() for name, value in vae.state_dict().items()}
    config = make_config(tmp_path, train_text_encoder=True, ema_decay=0.9, learning_rate=1e-2)
    train(config, image_batches, transformer, encoders(text_encoder, vae))
    pipeline = SanaPipeline.from_pretrained(tmp_path / "model")
    after = pipeline.text_encoder.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, vae_before[name]) for name, value in pipeline.vae.state_dict().items())
    assert pipeline.scheduler.config.flow_shift == 3.0
    image = pipeline("a red cat", num_inference_steps=2, height=32, width=32, max_sequence_length=32).images[0]
    assert image.width > 0
    assert list((tmp_path / "samples").glob("*.png"))


def test_a_frozen_text_encoder_stays_as_it_is(tmp_path):
    text_encoder = tiny_text_encoder()
    before = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    config = make_config(tmp_path, learning_rate=1e-2, sample_prompts=("a cat", "a dog"))
    train(config, image_batches, tiny_transformer(), encoders(text_encoder, tiny_autoencoder()))
    after = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("train_text_encoder", [True, False], ids=["joint", "frozen"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, train_text_encoder):
    transformer_start, encoder_start = tiny_transformer().state_dict(), tiny_text_encoder().state_dict()
    vae = tiny_autoencoder()

    def run(folder, resume=False, stop_at=None):
        transformer, text_encoder = tiny_transformer(), tiny_text_encoder()
        transformer.load_state_dict(transformer_start)
        text_encoder.load_state_dict(encoder_start)

        batches = interrupted(image_batches, stop_at)
        config = make_config(
            folder,
            max_steps=5,
            lr_schedule="cosine",
            ema_decay=0.9,
            resume=resume,
            train_text_encoder=train_text_encoder,
        )
        train(config, batches, transformer, encoders(text_encoder, vae))
        return load_file(folder / "model" / "transformer" / WEIGHTS)

    whole = check_resuming(run, tmp_path)
    assert any(not torch.equal(whole[name], transformer_start[name]) for name in whole)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    start, batch = tiny_transformer().state_dict(), latent_batch()
    results = []
    for checkpointing in (False, True):
        transformer = tiny_transformer()
        transformer.load_state_dict(start)
        config = make_config(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        train(config, [batch], transformer)
        results.append(load_file(tmp_path / str(checkpointing) / "model" / "transformer" / WEIGHTS))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)


def test_compiled_blocks_are_saved_under_their_own_names(tmp_path):
    with torch.compiler.set_stance("force_eager"):  # only the plumbing: compiling takes minutes
        train(make_config(tmp_path, compile=True), [latent_batch()], tiny_transformer())
    assert load_file(tmp_path / "model" / "transformer" / WEIGHTS).keys() == tiny_transformer().state_dict().keys()


def test_a_trained_text_encoder_reads_the_text_of_a_cache(tmp_path):
    batch = latent_batch() | {"text": ["a red cat"] * 4}
    text_encoder = tiny_text_encoder()
    config = make_config(tmp_path, train_text_encoder=True, learning_rate=1e-2)
    before = {name: value.clone() for name, value in text_encoder.state_dict().items()}
    train(config, [batch], tiny_transformer(), encoders(text_encoder, tiny_autoencoder()))
    after = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_train_refuses_to_train_a_missing_text_encoder(tmp_path):
    with pytest.raises(ValueError, match="`text_encoder` must be given"):
        train(make_config(tmp_path, train_text_encoder=True), [latent_batch()], tiny_transformer())


def test_train_says_which_part_a_batch_needs(tmp_path):
    batch = latent_batch()
    with pytest.raises(ValueError, match="`text_encoder` and `tokenizer` must be given"):
        train(make_config(tmp_path), [{"latents": batch["latents"], "text": ["a"] * 4}], tiny_transformer())
    with pytest.raises(ValueError, match="`vae` must be given"):
        train(make_config(tmp_path), image_batches, tiny_transformer())


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_main_trains_from_a_folder_with_and_without_cache(tmp_path, joint):
    write_image_folder(tmp_path / "data", [(40, 40), (40, 40), (40, 90)])
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_transformer().save_config(tmp_path)
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "pipeline")]
    arguments += ["--transformer_config", str(tmp_path / "config.json"), "--max_sequence_length", "32"]
    arguments += ["--batch_size", "2", "--num_workers", "0", "--resolution", "32", "--max_steps", "2"]
    arguments += ["--sample_steps", "1", "--log_every", "1", "--warmup_steps", "0"]
    arguments += ["--train_text_encoder"] if joint else []
    results = []
    for name in ("plain", "cached", "cached-again"):
        cache = [] if name == "plain" else ["--cache_dir", str(tmp_path / "cache")]
        main([*arguments, *cache, "--output_dir", str(tmp_path / name)])
        results.append(load_file(tmp_path / name / "model" / "transformer" / WEIGHTS))
    cached = load_file(next((tmp_path / "cache").glob("*.safetensors")))
    assert ("prompt_embeds" in cached) is not joint
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.allclose(result[name], value, atol=1e-5)
    with pytest.raises(ValueError, match="`pretrained` must be a SanaPipeline"):
        main(arguments[:2])


def folder_arguments(tmp_path, name, *more):
    """A command line on the folder `data` and the pipeline `pipeline` of `tmp_path`."""
    settings = {"batch_size": 2, "num_workers": 0, "max_steps": 2, "sample_steps": 1, "warmup_steps": 0}
    settings |= {"max_sequence_length": 32, "log_every": 1}
    paths = {"data": tmp_path / "data", "pretrained": tmp_path / "pipeline", "output_dir": tmp_path / name}
    return [part for key, value in (settings | paths).items() for part in (f"--{key}", str(value))] + list(more)


def test_main_samples_captions_with_and_without_cache(tmp_path):
    write_image_folder(tmp_path / "data", [(40, 40), (40, 40), (40, 90)])
    captions = [Caption(model, text, None) for model, text in (("a", "a red cat"), ("b", "two dogs on a blue hill"))]
    lines = [caption_line(f"{i}.png", captions) for i in range(3)]
    (tmp_path / "data" / "captions.jsonl").write_text("".join(lines))
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    results = []
    for name in ("plain", "cached", "best"):
        cache = ["--cache_dir", str(tmp_path / "cache")] if name == "cached" else []
        if name == "best":  # of which only one caption is ever sampled: the weights matter
            scored = [Caption(caption.model, caption.text, 30.0 * (caption.model == "b")) for caption in captions]
            lines = [caption_line(f"{i}.png", scored) for i in range(3)]
            (tmp_path / "data" / "captions.jsonl").write_text("".join(lines))
        main(folder_arguments(tmp_path, name, "--resolution", "32", "--caption_dropout", "0", *cache))
        results.append(load_file(tmp_path / name / "model" / "transformer" / WEIGHTS))
    cached = load_file(next((tmp_path / "cache").glob("*.safetensors")))
    assert cached.keys() == {"latents", "prompt_embeds.0", "prompt_embeds.1"}
    assert all(torch.allclose(results[1][name], value, atol=1e-5) for name, value in results[0].items())
    assert not all(torch.allclose(results[2][name], value, atol=1e-5) for name, value in results[0].items())


def test_main_goes_on_at_the_next_size(tmp_path):
    write_image_folder(tmp_path / "data", [(70, 70), (70, 70)])
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    stages = {"first": ("32", "8"), "second": ("64", "16"), "third": ("64", "16", "1")}
    for name, (resolution, sample_size, *scale) in stages.items():
        arguments = folder_arguments(tmp_path, name, "--resolution", resolution, "--sample_size", sample_size)
        arguments += ["--interpolation_scale", *scale] if scale else []
        main([*arguments, "--learning_rate", "1e-30"])  # the size alone is to change
        (tmp_path / "pipeline").rename(tmp_path / f"before-{name}")
        (tmp_path / name / "model").rename(tmp_path / "pipeline")
        before = load_file(tmp_path / f"before-{name}" / "transformer" / WEIGHTS)
        after = load_file(tmp_path / "pipeline" / "transformer" / WEIGHTS)
        assert all(torch.equal(after[key], value) for key, value in before.items())
        pipeline = SanaPipeline.from_pretrained(tmp_path / "pipeline")
        config = pipeline.transformer.config
        assert config.sample_size == int(sample_size)
        assert config.interpolation_scale == (1 if scale else None)
        images = pipeline("a red cat", num_inference_steps=1, max_sequence_length=32, output_type="pt").images
        assert images.shape[-2:] == (int(resolution), int(resolution))
        assert len(read_log(tmp_path / name)) == 2


def test_the_optimizer_is_that_of_its_name(tmp_path):
    pytest.importorskip("bitsandbytes")
    train(make_config(tmp_path / "run", optimizer="adamw8bit"), [latent_batch()], tiny_transformer())
    state = read_state(next((tmp_path / "run" / "checkpoints").glob("*/optimizer.safetensors")))
    assert all("state1" in values["__bnb_optimizer_quant_state__"] for values in state["state"].values())
    batch, settings = latent_batch(), {"optimizer": "adamw8bit", "max_steps": 4, "resume": True}
    train(make_config(tmp_path / "run", **settings), [batch], tiny_transformer())
    with pytest.raises(ValueError, match="`optimizer` must be one of"):
        train(make_config(tmp_path / "other", optimizer="sgd"), [latent_batch()], tiny_transformer())


def test_main_grows_on_several_resolutions_and_resumes(tmp_path):
    """With the options that recipes share: the resumed run is the uninterrupted one, bit for bit."""
    write_image_folder(tmp_path / "data", [(70, 70), (70, 140), (70, 70)])
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    options = ["--num_layers", "4", "--kept_layers", "2", "--optimizer", "schedulefree", "--learning_rate", "1e-3"]
    options += [
        "--resolution",
        "64",
        "--more_resolutions",
        "32",
        "--buckets",
        "authors",
        "--loss_weighting",
        "min_snr",
    ]
    whole = folder_arguments(tmp_path, "whole", *options, "--cache_dir", str(tmp_path / "cache"), "--max_steps", "4")
    parts = folder_arguments(tmp_path, "parts", *options, "--cache_dir", str(tmp_path / "cache"))
    main(whole)
    main(parts)
    main([*parts, "--max_steps", "4", "--resume"])
    results = [load_file(tmp_path / name / "model" / "transformer" / WEIGHTS) for name in ("whole", "parts")]
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 6, "three images at two resolutions"
    assert SanaPipeline.from_pretrained(tmp_path / "whole" / "model").transformer.config.num_layers == 4
