"""The autoencoder example, all phases, at tiny size."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderDC as DiffusersAutoencoderDC
from safetensors.torch import load_file

from diffusers_sana.training.recipes.dc_ae import train
from diffusers_sana.training.recipes.options import DCAETrainingConfig
from examples.train_dc_ae import main
from tests.training.tiny import image_batches, read_log, short_run, smooth_images, tiny_autoencoder, write_image_folder


def make_config(folder, **changes):
    """Settings that make a tiny run use everything that uses random numbers or keeps a state."""
    settings = {"perceptual_crop": 8, "perceptual_every": 2, "discriminator_channels": 8, "scaling_batches": 2}
    return DCAETrainingConfig(**short_run(folder, ema_decay=0.9) | settings | changes)


def test_phase_1_learns_a_fixed_batch(tmp_path):
    batch = {"pixel_values": smooth_images(4, 32)}
    config = make_config(tmp_path, max_steps=30, learning_rate=5e-3, perceptual_every=1, ema_decay=0.0)
    train(config, [batch], tiny_autoencoder())
    rows = read_log(tmp_path)
    assert rows[-1]["l1"] < 0.6 * rows[0]["l1"]
    assert rows[-1]["perceptual"] < rows[0]["perceptual"]
    assert (tmp_path / "loss.png").exists()
    assert list((tmp_path / "samples").glob("*.png"))


def test_the_result_is_a_diffusers_model_with_its_scaling_factor(tmp_path):
    batch = {"pixel_values": smooth_images(4, 32)}
    train(make_config(tmp_path), [batch], tiny_autoencoder())
    model = DiffusersAutoencoderDC.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        latent = model.encode(batch["pixel_values"]).latent * model.config.scaling_factor
    assert latent.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_phase_changes_what_it_trains_and_nothing_else(tmp_path, phase):
    model = tiny_autoencoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(make_config(tmp_path, phase=phase), image_batches, model)
    after = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefixes = {
        1: ("encoder.", "decoder."),
        2: ("encoder.conv_out.", "decoder.conv_in."),
        3: ("decoder.norm_out.", "decoder.conv_out."),
    }
    assert changed == {name for name in before if name.startswith(prefixes[phase])}
    assert all(value.isfinite().all() for value in after.values())


def test_the_discriminator_takes_part_in_phase_3_after_its_warm_up(tmp_path):
    train(make_config(tmp_path, phase=3, gan_warmup_steps=2), image_batches, tiny_autoencoder())
    rows = read_log(tmp_path)
    assert ["generator" in row for row in rows] == [False, False, True]
    assert ["discriminator" in row for row in rows] == [True, True, True]
    assert ["perceptual" in row for row in rows] == [True, False, True]


@pytest.mark.parametrize("settings", [{"phase": 1, "latent_prefix_step": 2}, {"phase": 3}], ids=["prefix", "gan"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, settings):
    """Also where every step of the resumed one is followed by a sample grid and a checkpoint."""
    start = tiny_autoencoder(has_attention=True).state_dict()

    def run(folder, max_steps, **changes):
        model = tiny_autoencoder(has_attention=True)
        model.load_state_dict(start)
        train(make_config(folder, max_steps=max_steps, **settings, **changes), image_batches, model)
        return load_file(folder / "model" / "diffusion_pytorch_model.safetensors")

    often = {"sample_minutes": 0.0, "save_minutes": 0.0}
    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "parts", 2, **often)
    resumed = run(tmp_path / "parts", 5, resume=True, **often)
    assert len(list((tmp_path / "parts" / "samples").glob("*.png"))) == 5
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_accumulating_in_bf16(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # one process keeps one precision otherwise
    config = make_config(tmp_path, mixed_precision="bf16", gradient_accumulation_steps=2, max_steps=2)
    train(config, image_batches, tiny_autoencoder())
    after = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())


def test_compiled_parts_are_saved_under_their_own_names(tmp_path):
    with torch.compiler.set_stance("force_eager"):  # only the plumbing: compiling takes minutes
        train(make_config(tmp_path, compile=True, latent_prefix_step=2), image_batches, tiny_autoencoder())
    saved = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == tiny_autoencoder().state_dict().keys()


def test_a_frozen_encoder_keeps_its_scaling_factor(tmp_path):
    model = tiny_autoencoder()
    model.register_to_config(scaling_factor=0.5)
    train(make_config(tmp_path, trained_prefixes=("decoder.",)), image_batches, model)
    assert DiffusersAutoencoderDC.from_pretrained(tmp_path / "model").config.scaling_factor == 0.5


def test_main_trains_on_a_folder_and_continues_in_the_next_phase(tmp_path):
    write_image_folder(tmp_path / "data", [(20, 20)] * 3)
    tiny_autoencoder().save_config(tmp_path)
    arguments = ["--data", str(tmp_path / "data"), "--batch_size", "2", "--num_workers", "0", "--resolution", "16"]
    arguments += ["--max_steps", "2", "--scaling_batches", "1"]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    main([*arguments, "--model_config", str(tmp_path / "config.json"), "--output_dir", first])
    main([*arguments, "--pretrained", f"{first}/model", "--phase", "2", "--output_dir", second])
    before = load_file(f"{first}/model/diffusion_pytorch_model.safetensors")
    after = load_file(f"{second}/model/diffusion_pytorch_model.safetensors")
    assert torch.equal(before["decoder.conv_out.conv.weight"], after["decoder.conv_out.conv.weight"])
    assert not torch.equal(before["encoder.conv_out.weight"], after["encoder.conv_out.weight"])
    with pytest.raises(ValueError, match="exactly one of `model_config` and `pretrained`"):
        main(arguments)


def test_latents_are_pulled_to_unit_scale(tmp_path):
    batch = {"pixel_values": smooth_images(4, 32)}
    settings = {"max_steps": 60, "learning_rate": 3e-3, "perceptual_weight": 0.0, "ema_decay": 0.0, "mse_weight": 1.0}
    train(make_config(tmp_path, latent_weight=1.0, latent_noise=0.1, **settings), [batch], tiny_autoencoder())
    rows = read_log(tmp_path)
    assert rows[-1]["latent"] < 0.2 * rows[0]["latent"]
    assert rows[-1]["mse"] < rows[0]["mse"]
    with torch.no_grad():
        model = DiffusersAutoencoderDC.from_pretrained(tmp_path / "model")
        mean_square = model.encode(batch["pixel_values"]).latent.square().mean((0, 2, 3))
    assert (mean_square - 1).abs().max() < 0.5
