"""The class-conditional example at tiny size."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_sana.training.recipes.dc_ae_dit import class_images, load_autoencoder, make_dit, train
from diffusers_sana.training.recipes.options import DiTDataOptions, DiTModelOptions, DiTTrainingConfig
from examples.train_dc_ae_dit import main
from tests.training.tiny import check_resuming, interrupted, read_log, short_run, tiny_autoencoder


WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = ["cat", "dog"]


def make_config(folder, **changes):
    return DiTTrainingConfig(**short_run(folder, sample_steps=2, ema_decay=0.0) | changes)


def two_classes(start):
    """Latents around -0.6 for the first class and 0.6 for the second, the same whenever begun at the same number."""
    while True:
        noise = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(start))
        labels = torch.arange(8) % 2
        yield {"latents": 0.2 * noise + (1.2 * labels - 0.6)[:, None, None, None], "class_labels": labels}
        start += 1


def tiny_dit(**changes):
    settings = {"vae": ".", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    return make_dit(DiTModelOptions(**settings | changes), torch.zeros(4, 4, 4))


def tiny_kl(**changes):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, **blocks, **changes)


def write_classes(folder):
    """Two classes of three plain images."""
    for at, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.full((20, 24, 3), 40 + 150 * at + 10 * index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def read_losses(folder):
    return [row["loss"] for row in read_log(folder)]


def test_classes_are_learned_and_guidance_sharpens_them(tmp_path):
    """The saved folder is diffusers' DiTPipeline; its samples have the means of their classes."""
    settings = {"learning_rate": 2e-2, "lr_schedule": "cosine", "class_dropout": 0.3}
    config = make_config(tmp_path, max_steps=200, log_every=20, **settings)
    transformer = tiny_dit(num_layers=1, attention_head_dim=16)
    train(config, two_classes, transformer, CLASSES, tiny_autoencoder())
    losses = read_losses(tmp_path)
    assert losses[-1] < 0.6 * losses[0]
    pipe = DiTPipeline.from_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderDC"]
    pipe.vae.decode = lambda latents: SimpleNamespace(sample=latents)  # its weights are random
    pipe.set_progress_bar_config(disable=True)

    def means(guidance):
        labels = pipe.get_label_ids(["cat"] * 8 + ["dog"] * 8)
        assert labels == [0] * 8 + [1] * 8
        generator = torch.Generator().manual_seed(0)
        latents = pipe(labels, guidance, generator, 10, output_type="pt").images * 2 - 1
        return latents.flatten(1).mean(1).view(2, 8).mean(1)

    plain, guided = means(1.0), means(1.5)
    assert plain[0] == pytest.approx(-0.6, abs=0.15)
    assert plain[1] == pytest.approx(0.6, abs=0.15)
    assert guided[1] - guided[0] > plain[1] - plain[0]


def test_a_dropped_label_is_dropped_in_every_block(tmp_path):
    """In training mode a DiT of diffusers would drop labels by itself, in each block others."""
    config = make_config(tmp_path)
    transformer = tiny_dit()
    torch.nn.init.normal_(transformer.proj_out_2.weight)
    torch.nn.init.normal_(transformer.proj_out_1.weight)
    inputs = torch.randn(64, 4, 4, 4), torch.full((64,), 500.0), torch.ones(64, dtype=torch.long)

    def outputs():
        with torch.no_grad():
            return transformer(*inputs).sample

    transformer.train()
    assert not torch.equal(outputs(), outputs())
    train(config, two_classes, transformer, CLASSES)
    assert transformer.training
    assert torch.equal(outputs(), outputs())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_class_dropout(tmp_path, share):
    """Only what was seen is trained: the classes' vectors, or the one of no class."""
    config = make_config(tmp_path, class_dropout=share, learning_rate=1e-2)
    transformer = tiny_dit()
    for parameter in (transformer.proj_out_1.weight, transformer.proj_out_2.weight):
        torch.nn.init.normal_(parameter)
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    before = table.detach().clone()
    train(config, two_classes, transformer, CLASSES)
    changed = (table != before).any(1).nonzero().flatten().tolist()
    assert changed == ([1000] if share else [0, 1])


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    start = tiny_dit().state_dict()

    def run(folder, resume=False, stop_at=None):
        batches = interrupted(two_classes, stop_at)
        config = make_config(folder, max_steps=5, lr_schedule="cosine", ema_decay=0.9, resume=resume)
        transformer = tiny_dit()
        transformer.load_state_dict(start)
        train(config, batches, transformer, CLASSES, tiny_autoencoder())
        return load_file(folder / "model" / "transformer" / WEIGHTS)

    whole = check_resuming(run, tmp_path)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


@pytest.mark.parametrize(
    ("autoencoder", "patch_size"), [(tiny_autoencoder, 1), (tiny_kl, 2)], ids=["AutoencoderDC", "AutoencoderKL"]
)
def test_main_trains_from_folders_of_classes(tmp_path, autoencoder, patch_size):
    write_classes(tmp_path / "data")
    vae = autoencoder()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    arguments = ["--data", str(tmp_path / "data"), "--vae", str(tmp_path / "pipeline"), "--vae_subfolder", "vae"]
    arguments += ["--resolution", "16", "--patch_size", str(patch_size), "--batch_size", "4", "--num_layers", "1"]
    arguments += ["--num_attention_heads", "1", "--attention_head_dim", "8", "--max_steps", "2", "--sample_steps", "1"]
    arguments += ["--log_every", "1", "--sample_classes", "dog", "cat", "--output_dir", str(tmp_path / "run")]
    main(arguments)
    (cached,) = (  # of the first dog
        load_file(path)["latents"]
        for path in (tmp_path / "run" / "cache").glob("*.safetensors")
        if json.loads(safe_open(path, "pt").metadata()["made_from"])[0] == "dog/0.png"
    )
    pixels = torch.full((1, 3, 16, 16), 190 / 127.5 - 1)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    latents = encoded.latent_dist.mean * 0.5 if autoencoder is tiny_kl else encoded.latent
    torch.testing.assert_close(cached, latents[0])
    assert Image.open(next((tmp_path / "run" / "samples").glob("*.png"))).size == (32, 16)

    pipe = DiTPipeline.from_pretrained(tmp_path / "run" / "model")
    assert type(pipe.vae) is (AutoencoderKL if autoencoder is tiny_kl else AutoencoderDC)  # diffusers' classes
    assert pipe.transformer.config.patch_size == patch_size
    assert pipe.labels == {"cat": 0, "dog": 1}
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=2).images[0].size == (16, 16)


def test_compiling_and_gradient_checkpointing_change_nothing(tmp_path):
    start, results = tiny_dit().state_dict(), []
    for name in ("plain", "compile", "gradient_checkpointing"):
        config = make_config(tmp_path / name, max_steps=1, **({} if name == "plain" else {name: True}))
        transformer = tiny_dit()
        transformer.load_state_dict(start)
        with torch.compiler.set_stance("force_eager"):  # only the plumbing: compiling takes minutes
            train(config, two_classes, transformer, CLASSES)
        results.append(load_file(tmp_path / name / "model" / "transformer" / WEIGHTS))
    assert results[0].keys() == start.keys()
    assert all(torch.equal(results[0][name], result[name]) for result in results[1:] for name in start)


def test_images_outside_of_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`data` must be a folder with images"):
        class_images(DiTDataOptions(data=str(tmp_path), resolution=16))
    write_classes(tmp_path)
    assert class_images(DiTDataOptions(data=str(tmp_path), resolution=16))[1] == CLASSES
    Image.new("RGB", (16, 16)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"`data` must say the class of each image.*'stray.png' has none"):
        class_images(DiTDataOptions(data=str(tmp_path), resolution=16))


def test_autoencoders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`vae` must be an autoencoder's folder"):
        load_autoencoder("")
    tiny_kl(shift_factor=0.1).save_pretrained(tmp_path / "shifted")
    with pytest.raises(ValueError, match="`vae` must have no `shift_factor`"):
        load_autoencoder(str(tmp_path / "shifted"))
    tiny_dit().save_config(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"`vae` must be one of .*got 'DiTTransformer2DModel'"):
        load_autoencoder(str(tmp_path / "dit"))


def test_transformers_and_classes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`patch_size` must divide the latents' side 4, got 3"):
        tiny_dit(patch_size=3)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "patch_size": 1}
    small = DiTTransformer2DModel(num_embeds_ada_norm=10, **sizes)
    with pytest.raises(ValueError, match=r"`transformer` must have `num_embeds_ada_norm` 1000.*got 10"):
        train(make_config(tmp_path), two_classes, small, CLASSES)
    silent = DiTTransformer2DModel(in_channels=4, **sizes)
    with pytest.raises(ValueError, match=r"`transformer` must have `out_channels` equal.*got None and 4"):
        train(make_config(tmp_path), two_classes, silent, CLASSES)
    transformer = tiny_dit()
    with pytest.raises(ValueError, match="`class_names` must be 1 to 1000 names, got 1001"):
        train(make_config(tmp_path), two_classes, transformer, ["x"] * 1001)
    with pytest.raises(ValueError, match=r"`sample_classes` must be one of \['cat', 'dog'\], got 'cow'"):
        train(make_config(tmp_path, sample_classes=("cow",)), two_classes, transformer, CLASSES)
