"""The authors' files of Sana, ControlNet and DC-AE: every variant, whole and damaged."""

import os
import random
import zipfile

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_sana import (
    AutoencoderDC,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    cli,
)
from diffusers_sana.loaders.nvlabs.convert import convert, plan_conversion
from diffusers_sana.loaders.nvlabs.load import read_official
from tests import tiny
from tests.loaders.nvlabs.official_files import SANA, assert_equal_weights, official_dc, official_sana
from tests.models.autoencoder_dc_cases import SMALL, small_model


HEADS = {"num_cross_attention_heads": 2}  # of the tiny models, whose width the authors never used
VARIANTS = {
    "sana": {},
    "sana_2k": {"sample_size": 64, "interpolation_scale": 1.0},
    "sana_4k": {"sample_size": 128, "interpolation_scale": 2.0},
    "sana_1.5": {"qk_norm": "rms_norm_across_heads", "num_layers": 3},
    "sprint": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
    "patches": {"patch_size": 2, "mlp_ratio": 2.26},
}


def sana(**changes):
    torch.manual_seed(0)
    return SanaTransformer2DModel(**{**SANA, **changes})


def write(path, checkpoint):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in checkpoint.items()}, path)
    else:
        torch.save({"state_dict": checkpoint, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_recognised(variant, suffix, tmp_path):
    model = sana(**VARIANTS[variant])
    checkpoint = official_sana(model, model.config.interpolation_scale)
    if variant == "patches":
        checkpoint["pos_embed"] = checkpoint["pos_embed"][:, : 16 * 16]
    loaded = SanaTransformer2DModel.from_single_file(write(tmp_path / f"m{suffix}", checkpoint), **HEADS)
    assert not loaded.training
    assert_equal_weights(loaded, model.state_dict())
    ours = {name: value for name, value in loaded.config.items() if name != "_use_default_values"}
    theirs = {name: value for name, value in model.config.items() if name != "_use_default_values"}
    if variant == "patches":
        assert int(ours.pop("mlp_ratio") * 64) == int(theirs.pop("mlp_ratio") * 64)
    assert ours == theirs


def test_official_widths_need_no_help():
    """On the meta device, where the published 4.8B has no weight."""
    with torch.device("meta"):
        model = SanaTransformer2DModel(num_layers=60, qk_norm="rms_norm_across_heads")
        checkpoint = official_sana(model)
    checkpoint["pos_embed"] = torch.zeros(1, 32 * 32, 2240)
    config = read_official(SanaTransformer2DModel, checkpoint).config
    assert config == {name: value for name, value in model.config.items() if name in config}


VIDEO = {name: value for name, value in SANA.items() if name != "sample_size"} | {
    "mlp_ratio": 3.0,
    "patch_size": (1, 2, 2),
    "qk_norm": "rms_norm_across_heads",
    "sample_size": 30,
}
VIDEO_HEADS = HEADS | {"attention_head_dim": 32, "sample_size": 30}


@pytest.mark.parametrize("container", ["state_dict", "generator", "generator_ema"])
def test_videos(container, tmp_path):
    """SANA-Video's files, and LongSANA's with the same names, as released and as its trainer writes them."""
    torch.manual_seed(0)
    model = SanaVideoTransformer3DModel(**VIDEO)
    torch.nn.init.normal_(model.transformer_blocks[0].ff.conv_temp.weight)
    checkpoint, file = official_sana(model), tmp_path / "video.pth"
    if container == "state_dict":
        torch.save({"state_dict": checkpoint, "epoch": 3}, file)
    else:
        wrapped = {f"model.{key}": value for key, value in checkpoint.items()}
        critic = {"critic": {"x": torch.zeros(1)}, "step": 100}
        torch.save(critic | {"generator": {k: v * 2 for k, v in wrapped.items()}} | {container: wrapped}, file)
    weights = "ema" if container == "generator_ema" else "model"
    loaded = SanaVideoTransformer3DModel.from_single_file(file, weights=weights, **VIDEO_HEADS)
    assert_equal_weights(loaded, model.state_dict())
    assert {name: loaded.config[name] for name in VIDEO} == VIDEO | {"patch_size": (1, 2, 2)}
    plan = convert(file, tmp_path / "folder", weights=weights, **VIDEO_HEADS)
    assert len(plan.official.left_out) == 3
    assert plan.component == "transformer"
    for cls in (SanaVideoTransformer3DModel, diffusers.SanaVideoTransformer3DModel):
        assert_equal_weights(cls.from_pretrained(tmp_path / "folder"), model.state_dict())


def test_released_videos_need_no_help():
    for config, channels in (({"patch_size": (1, 2, 2)}, 16), ({"patch_size": (1, 1, 1), "sample_size": 22}, 128)):
        with torch.device("meta"):
            sides = {"in_channels": channels, "out_channels": channels}
            model = SanaVideoTransformer3DModel(**config | sides, mlp_ratio=3.0, num_layers=1)
            checkpoint = official_sana(model)
        official = read_official(SanaVideoTransformer3DModel, checkpoint)
        expected = {name: value for name, value in model.config.items() if name in official.config}
        assert official.config == expected | {"patch_size": config["patch_size"]}
    for field in ("attention_head_dim", "num_cross_attention_heads", "sample_size"):
        model = SanaVideoTransformer3DModel(**VIDEO)
        given = {name: value for name, value in VIDEO_HEADS.items() if name != field}
        with pytest.raises(ValueError, match=f"`{field}` must be given"):
            read_official(SanaVideoTransformer3DModel, official_sana(model), **given)


def test_a_file_without_positions_must_be_told_its_size():
    checkpoint = official_sana(sana(), None)
    del checkpoint["pos_embed"]
    with pytest.raises(ValueError, match="`sample_size` must be given"):
        SanaTransformer2DModel.from_single_file(checkpoint, **HEADS)
    model = SanaTransformer2DModel.from_single_file(checkpoint, sample_size=64, timestep_scale=0.001, **HEADS)
    assert (model.config.interpolation_scale, model.config.timestep_scale) == (1.0, 0.001)


def test_a_table_that_published_models_lack_is_not_believed_unasked():
    checkpoint = official_sana(sana(), 1.0)
    with pytest.raises(
        ValueError, match=r"`interpolation_scale` must be given: the position table .* has 1.0, .* have None"
    ):
        SanaTransformer2DModel.from_single_file(checkpoint, **HEADS)
    model = SanaTransformer2DModel.from_single_file(checkpoint, interpolation_scale=1.0, **HEADS)
    assert model.config.interpolation_scale == 1.0


def test_the_config_of_a_folder_and_our_own_names(tmp_path):
    model = sana()
    model.save_config(tmp_path)
    official = SanaTransformer2DModel.from_single_file(
        official_sana(model), config=str(tmp_path), dtype=torch.bfloat16
    )
    assert official.dtype == torch.bfloat16
    ours = SanaTransformer2DModel.from_single_file(dict(model.state_dict()), config=str(tmp_path))
    assert_equal_weights(ours, model.state_dict())
    with pytest.raises(TypeError, match="'no_such_field' must be a field of SanaTransformer2DModel's config"):
        SanaTransformer2DModel.from_single_file(official_sana(model), no_such_field=1)


def test_a_controlnet_and_its_base_in_one_file(tmp_path):
    torch.manual_seed(1)
    controlnet = diffusers.SanaControlNetModel(**SANA)
    base = sana(num_layers=3)
    branch = official_sana(controlnet, block="controlnet.{}.copied_block")
    shared = {key for key in official_sana(base) if not key.startswith(("blocks.", "final_layer."))}
    path = write(tmp_path / "c.pth", {**official_sana(base), **branch})

    plan = convert(path, tmp_path / "controlnet", **HEADS)
    assert "SanaControlNetModel: " in str(plan)
    assert f"left out: {len(official_sana(base)) - len(shared) + 2} tensors" in str(plan)
    assert "  wiring = 'nvlabs'" in str(plan)
    assert SanaControlNetModel.from_pretrained(tmp_path / "controlnet").config["wiring"] == "nvlabs"
    loaded = diffusers.SanaControlNetModel.from_pretrained(tmp_path / "controlnet")
    assert_equal_weights(loaded, controlnet.state_dict())
    assert SanaControlNetModel.from_single_file(path, **HEADS).config["wiring"] == "nvlabs"
    assert SanaControlNetModel.from_single_file(path, wiring="diffusers", **HEADS).config["wiring"] == "diffusers"
    plan = plan_conversion(path, component="transformer", **HEADS)
    assert plan.model.config.num_layers == 3
    assert_equal_weights(plan.model.transformer_blocks, base.transformer_blocks.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_every_layout_of_the_autoencoder_is_recognised(name, tmp_path):
    model = small_model(name)
    config = {"scaling_factor": model.config.scaling_factor}
    if name in ("in", "lite", "1.5"):  # nothing in these files tells it
        config["attention_head_dim"] = model.config.attention_head_dim
    path = write(tmp_path / "ae.safetensors", official_dc(model))
    plan = convert(path, tmp_path / "vae", **config)
    assert plan.component == "vae"
    loaded = AutoencoderDC.from_pretrained(tmp_path / "vae")
    assert_equal_weights(loaded, model.state_dict())
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(loaded(x).sample, model(x).sample)


def test_scaling_factors():
    sana_ae = official_dc(small_model("sana"))
    with pytest.raises(ValueError, match="`scaling_factor` must be given: the tensors do not determine it"):
        AutoencoderDC.from_single_file({"model": official_dc(small_model("in"))})
    sana_ae["encoder.project_out.main.op_list.0.conv.weight"] = torch.zeros(32, 32, 3, 3)
    assert read_official(AutoencoderDC, sana_ae).config["scaling_factor"] == 0.41407


@pytest.mark.parametrize("cls", [SanaTransformer2DModel, AutoencoderDC])
def test_damaged_files(cls, tmp_path):
    is_sana = cls is SanaTransformer2DModel
    whole = official_sana(sana()) if is_sana else official_dc(small_model("sana"))
    options = HEADS if is_sana else {"scaling_factor": 1.0}
    key = "blocks.1.cross_attn.kv_linear.bias" if is_sana else "decoder.stages.3.op_list.1.local_module.main."
    key = next(name for name in whole if name.startswith(key))

    for suffix in (".pth", ".safetensors"):
        path = write(tmp_path / f"cut{suffix}", whole)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(
            ValueError,
            match=rf"cut{suffix}' must be a complete .safetensors or PyTorch .pth file, .* Download or copy",
        ):
            cls.from_single_file(path, **options)
    for checkpoint, message in (
        ({**whole, "blocks.0.adaln.weight": torch.zeros(1)}, "'blocks.0.adaln.weight' is in no original"),
        ({name: value for name, value in whole.items() if name != key}, "the file must have a tensor for '.*'"),
        ({**whole, key: whole[key][:-2]}, f"'{key}' must give"),
        ({**whole, key: 3}, f"must be a dictionary of tensors, but '{key}' is of type int"),
    ):
        with pytest.raises(ValueError, match=message):
            cls.from_single_file(checkpoint, **options)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", ["state_dict", "rng_state", "numpy"])
def test_code_in_a_file_is_not_run(place, is_zip, tmp_path):
    bomb = Bomb(tmp_path / "made")
    content = {"state_dict": official_sana(sana()), place: bomb}
    if place == "numpy":
        content["rng_state"] = np.array([bomb], dtype=object)
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=is_zip)
    for weights in ("model", "ema"):
        with pytest.raises(
            ValueError, match=r"evil.pth' must contain only tensors .* references \w+.mkdir, which could"
        ):
            plan_conversion(tmp_path / "evil.pth", weights=weights, **HEADS)
    assert not (tmp_path / "made").exists()


def test_a_file_of_another_model(tmp_path):
    with pytest.raises(ValueError, match="must be an original file of Sana or DC-AE, but has a tensor 'a'"):
        plan_conversion(write(tmp_path / "a.pth", {"a": torch.zeros(1)}))


def trainer_file(path, model, average):
    """What the authors' trainer saves: weights, averages, optimizer, schedule, states of random numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(1e-3))
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rng = {"torch": torch.get_rng_state(), "torch_cuda": [], "numpy": np.random.get_state()}
    content = {"state_dict": official_sana(model), "state_dict_ema": official_sana(average)}
    content |= {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "epoch": 1}
    rng |= {"python": random.getstate(), "generator": torch.Generator().get_state()}
    torch.save({**content, "rng_state": rng}, path)
    return path


@pytest.mark.parametrize("numpy_names", ["numpy._core", "numpy.core"])
def test_a_file_of_the_authors_trainer(numpy_names, tmp_path, capsys):
    model, average = sana(), sana(num_layers=3)
    path = trainer_file(tmp_path / "epoch_1_step_7.pth", model, average)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "other.pth", "w") as target:
        for name in source.namelist():  # NumPy 1 and 2 name their functions differently
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core" in data or b"numpy.core" in data
                data = data.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", numpy_names.encode())
            target.writestr(name, data)
    path = tmp_path / "other.pth"
    assert_equal_weights(SanaTransformer2DModel.from_single_file(path, **HEADS), model.state_dict())
    loaded = SanaTransformer2DModel.from_single_file(path, weights="ema", **HEADS)
    assert_equal_weights(loaded, average.state_dict())
    assert np.ndarray not in torch.serialization.get_safe_globals()  # the list belongs to the user

    command = ["convert", str(path), "--set", "num_cross_attention_heads=2", "--weights", "ema"]
    cli.main([*command, "-o", str(tmp_path / "out")])
    assert "weights: ema; the file also has model" in capsys.readouterr().out
    assert_equal_weights(SanaTransformer2DModel.from_pretrained(tmp_path / "out"), average.state_dict())


def test_averaged_weights_of_other_trainers(tmp_path):
    """efficientvit's and DC-Gen's, which write a set for each decay."""
    model = sana()
    named = {f"0.{key}": value for key, value in official_sana(model).items()}
    content = {"model_state_dict": named, "ema": {0.999: named}}
    for weights in ("model", "ema"):
        loaded = SanaTransformer2DModel.from_single_file(content, weights=weights, **HEADS)
        assert_equal_weights(loaded, model.state_dict())
    for change, weights, message in (
        ({"ema": {0.9: named, 0.99: named}}, "ema", r"EMA weights for the decays \[0.9, 0.99\]"),
        ({"ema": None}, "ema", "`weights` must be 'model' for this file"),
        ({}, "average", r"`weights` must be one of \['model', 'ema'\], got 'average'"),
    ):
        with pytest.raises(ValueError, match=message):
            SanaTransformer2DModel.from_single_file({**content, **change}, weights=weights, **HEADS)


def test_odd_nesting_ends(tmp_path):
    itself: dict = {}
    itself["state_dict"] = itself
    two: dict = {"model": {}}
    two["model"]["state_dict"] = two
    deep: dict = {"x": torch.zeros(1)}
    for _ in range(200):
        deep = {"module": deep}
    for content in (itself, two, {"ema": itself}, deep, {0: {}}, {"state_dict": []}, [1], torch.zeros(1), {}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match="must be a dictionary of tensors"):
            plan_conversion(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="must be a dictionary of tensors"):
        SanaTransformer2DModel.from_single_file({"ema": itself}, weights="ema")


@pytest.mark.parametrize("place", ["missing.pth", "no/such.pth", "/no/such/file.pth", "./a/b/c.pth"])
def test_no_such_file(place):
    with pytest.raises(FileNotFoundError, match=f"'{place}' must be a file, or the address of one on the Hub"):
        SanaTransformer2DModel.from_single_file(place)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("owner/name/sub/m.pth", {"repo_id": "owner/name", "filename": "sub/m.pth", "revision": None}),
        ("https://huggingface.co/owner/name/blob/v1/sub/m.pth",
         {"repo_id": "owner/name", "filename": "sub/m.pth", "revision": "v1"}),
        ("https://huggingface.co/owner/name/resolve/main/m.pth",
         {"repo_id": "owner/name", "filename": "m.pth", "revision": "main"}),
    ],
)  # fmt: skip
def test_addresses_on_the_hub(address, expected, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, filename, **kwargs):
        asked.update(repo_id=repo_id, filename=filename, **kwargs)
        return str(write(tmp_path / "m.pth", official_sana(sana())))

    monkeypatch.setattr("diffusers_sana.loaders.single_file.hf_hub_download", download)
    SanaTransformer2DModel.from_single_file(address, token="secret", cache_dir=None, **HEADS)
    assert asked == {**expected, "token": "secret"}


def test_a_pipeline_around_the_file(tmp_path, capsys):
    base = tiny.write_official_folder(tmp_path / "base", **SANA)
    path = write(tmp_path / "m.pth", official_sana(sana()))
    heads = ["--set", "num_cross_attention_heads=2"]
    cli.main(["convert", str(path), "-o", str(tmp_path / "out"), "--dry-run", *heads])
    assert "  sample_size = 32\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    cli.main(["convert", str(path), "-o", str(tmp_path / "out"), "--base", str(base), "--dtype", "bfloat16", *heads])
    assert capsys.readouterr().out.startswith(str(tmp_path / "out"))
    pipe = diffusers.SanaPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert_equal_weights(pipe.transformer, sana().bfloat16().state_dict())
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    assert pipe("a fox", num_inference_steps=1, output_type="pt", **size).images.isfinite().all()
    with pytest.raises(SystemExit):
        cli.main(["convert", str(path), "-o", str(tmp_path / "out"), *heads])
    assert "--out must be new or empty" in capsys.readouterr().err


def test_a_pipeline_of_another_family(tmp_path):
    base = tiny.write_official_folder(tmp_path / "base", **SANA)
    sprint = write(tmp_path / "sprint.pth", official_sana(sana(**VARIANTS["sprint"])))
    with pytest.raises(ValueError, match="must have a transformer with guidance_embeds = True, as in the file"):
        convert(sprint, tmp_path / "out", base, **HEADS)
    controlnet = diffusers.SanaControlNetModel(**SANA)
    both = {**official_sana(sana()), **official_sana(controlnet, block="controlnet.{}.copied_block")}
    with pytest.raises(
        ValueError, match=r"`base` must be a pipeline with a 'controlnet', but .* Convert the model alone"
    ):
        convert(write(tmp_path / "c.pth", both), tmp_path / "out", base, **HEADS)
    assert not (tmp_path / "out").exists()
