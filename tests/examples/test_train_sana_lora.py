"""Training a LoRA at tiny size: on cached latents, resumed, on 4 bits, on folders, and for the emoji checkpoint."""

import json
from copy import deepcopy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import diffusers_sana
from diffusers_sana import SanaPipeline, SanaSprintPipeline, SVDQuantConfig, quantize
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.models.transformers.sprint_student import make_student
from diffusers_sana.prompts.encoding import complex_human_instruction
from diffusers_sana.schedulers import trigflow
from diffusers_sana.training.objectives.trigflow_distillation import TrigFlowStudent
from diffusers_sana.training.recipes import lora
from diffusers_sana.training.recipes.lora import WithPrior, captioned_folder, consistency_loss, prepare, train
from diffusers_sana.training.recipes.options import LoraDataOptions, LoraModelOptions, LoraTrainingConfig
from examples.train_emoji import lora as emoji
from examples.train_emoji.common import bundle_lora
from examples.train_emoji.scenes import COLORS, STYLES, held_out_scenes
from examples.train_sana_lora import main
from tests import tiny
from tests.training.tiny import (
    check_resuming,
    interrupted,
    read_log,
    tiny_autoencoder,
    tiny_pipeline,
    tiny_transformer,
    write_image_folder,
)


WEIGHTS = "pytorch_lora_weights.safetensors"


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 3, "log_every": 1, "sample_steps": 2, "flow_shift": 3.0}
    return LoraTrainingConfig(**settings | {"learning_rate": 1e-2} | changes)


def latent_batch(seed=0):
    """Cached latents and text vectors."""
    generator = torch.Generator().manual_seed(100 + seed)  # not the seed of the noise
    latents, embeds = (torch.randn(4, *shape, generator=generator) for shape in ((4, 4, 4), (6, 16)))
    return {
        "latents": latents,
        "prompt_embeds": embeds,
        "prompt_attention_mask": torch.ones(4, 6, dtype=torch.long),
    }


def copy_of(transformer):
    copy = tiny_transformer()
    copy.load_state_dict(transformer.state_dict())
    return copy


@torch.no_grad()
def predict(transformer):
    batch = latent_batch(seed=1)
    timestep = torch.full((4,), 500.0)
    return transformer.eval()(batch["latents"], batch["prompt_embeds"], timestep, return_dict=False)[0]


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_learns_beside_a_base_that_stays(tmp_path, base):
    transformer = tiny_transformer()
    if base == "int4":
        quantize(transformer, SVDQuantConfig(rank=2), progress=False)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    untrained = predict(transformer)
    config = make_config(tmp_path, max_steps=25, learning_rate=2e-2, mix_ffn=True)
    train(config, [latent_batch()], transformer)
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    trained = predict(transformer)
    assert not torch.allclose(trained, untrained, atol=1e-2)
    after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    saved = load_file(tmp_path / "model" / WEIGHTS)
    assert {name.split(".")[-3] for name in saved} == {"to_q", "to_k", "to_v", "conv_inverted", "conv_point"}
    transformer.unload_lora()
    assert torch.equal(predict(transformer), untrained)
    transformer.load_lora_adapter(tmp_path / "model", weight_name=WEIGHTS)
    assert torch.equal(predict(transformer), trained)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_loads_the_result_with_rank_and_alpha(tmp_path, dora):
    ours, theirs = tiny.transformer(diffusers_sana), tiny.pipeline(diffusers)
    untrained = predict(theirs.transformer)
    train(make_config(tmp_path, rank=2, lora_alpha=6, use_dora=dora), [latent_batch()], ours)
    with safe_open(tmp_path / "model" / WEIGHTS, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (2, 6)
    theirs.load_lora_weights(tmp_path / "model")
    changed = predict(theirs.transformer)
    assert not torch.allclose(changed, untrained, atol=1e-4)
    assert torch.allclose(changed, predict(ours), atol=1e-4)


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_ranks_and_alphas_by_pattern_and_stabilized(tmp_path, base):
    """Each layer has its rank, what is trained is what is loaded, here and, beside a dense base, in diffusers."""
    transformer = tiny.transformer(diffusers_sana)
    if base == "int4":
        quantize(transformer, SVDQuantConfig(rank=2), progress=False)
    changes = {
        "rank": 2,
        "rank_pattern": ("attn2.to_k=3", r"transformer_blocks\.0\.attn1\.to_q=5"),
        "use_rslora": True,
    }
    train(make_config(tmp_path, **changes, alpha_pattern=("attn2.to_v=7",)), [latent_batch()], transformer)
    saved = load_file(tmp_path / "model" / WEIGHTS)
    ranks = {
        name.removeprefix("transformer.transformer_blocks."): len(value)
        for name, value in saved.items()
        if "lora_A" in name
    }
    assert {rank for name, rank in ranks.items() if "attn2.to_k" in name} == {3}
    assert ranks["0.attn1.to_q.lora_A.weight"] == 5
    assert ranks["1.attn1.to_q.lora_A.weight"] == ranks["0.attn2.to_v.lora_A.weight"] == 2
    scales = {
        name.removeprefix("transformer_blocks."): module.scaling["default"]
        for name, module in transformer.named_modules()
        if hasattr(module, "scaling")
    }
    expected = {"0.attn1.to_q": 5**0.5, "0.attn1.to_k": 2**0.5, "0.attn2.to_k": 3**0.5, "0.attn2.to_v": 7 / 2**0.5}
    assert {name: scales[name] for name in expected} == pytest.approx(expected)
    trained = predict(transformer)
    transformer.unload_lora()
    assert not torch.allclose(predict(transformer), trained, atol=1e-4)
    pipe = SanaPipeline.from_pipe(tiny_pipeline(), transformer=transformer)
    pipe.load_lora_weights(tmp_path / "model")
    assert torch.allclose(predict(transformer), trained, atol=1e-5)
    if base == "dense":
        theirs = tiny.pipeline(diffusers)
        theirs.load_lora_weights(tmp_path / "model")
        assert torch.allclose(predict(theirs.transformer), trained, atol=1e-4)


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, base):
    start, vae = tiny_transformer(), tiny_autoencoder()

    def run(folder, resume=False, stop_at=None):
        transformer = copy_of(start)
        if base == "int4":
            quantize(transformer, SVDQuantConfig(rank=2), progress=False)

        batches = interrupted(lambda start: map(latent_batch, range(start, 100)), stop_at)
        config = make_config(folder, max_steps=4, ema_decay=0.9, lora_dropout=0.2, caption_dropout=0.5, resume=resume)
        train(config, batches, transformer, vae)
        return load_file(folder / "model" / WEIGHTS)

    whole = check_resuming(run, tmp_path)
    assert any(value.any() for name, value in whole.items() if "lora_B" in name)
    assert list((tmp_path / "whole" / "samples").glob("*.png"))
    kept = load_file(next((tmp_path / "whole" / "checkpoints").rglob("model.safetensors")))
    assert kept
    assert all("lora" in name for name in kept)  # and not the base


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_gradient_checkpointing_changes_nothing(tmp_path, base):
    start, results = tiny_transformer(), []
    for checkpointing in (False, True):
        transformer = copy_of(start)
        if base == "int4":
            quantize(transformer, SVDQuantConfig(rank=2), progress=False)
        folder = tmp_path / str(checkpointing)
        train(make_config(folder, gradient_checkpointing=checkpointing), [latent_batch()], transformer)
        results.append(load_file(folder / "model" / WEIGHTS))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.fixture
def another_precision():
    """Accelerate knows one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
def test_bf16_base_has_an_adapter_in_fp32(tmp_path):
    transformer = tiny_transformer().to(torch.bfloat16)
    config = make_config(tmp_path, mixed_precision="bf16", max_steps=40, learning_rate=2e-2)
    train(config, [latent_batch()], transformer)
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert {value.dtype for value in load_file(tmp_path / "model" / WEIGHTS).values()} == {torch.float32}
    assert transformer.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.usefixtures("another_precision")
def test_bf16_sprint_has_an_adapter_in_fp32(tmp_path):
    transformer = nn.Module.to(sprint_student(), torch.bfloat16)
    train(make_config(tmp_path, mixed_precision="bf16"), [latent_batch()], transformer)
    saved = load_file(tmp_path / "model" / WEIGHTS)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.any() and value.isfinite().all() for value in saved.values())
    assert transformer.proj_out.weight.dtype == torch.bfloat16


def test_loss_weight(tmp_path):
    """Weight 0 leaves the adapter as if the image were not there."""
    start, results = tiny_transformer(), []
    for name, other in (("one", 1), ("two", 2)):
        batch = latent_batch()
        batch["latents"] = torch.cat([batch["latents"][:2], latent_batch(other)["latents"][2:]])
        batch["loss_weight"] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        train(make_config(tmp_path / name), [batch], copy_of(start))
        results.append(load_file(tmp_path / name / "model" / WEIGHTS))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"target_modules": ("to_q", "to_x")}, "`target_modules` must name layers, got 'to_x'.*'to_k'"),
        ({"flow_shift": None}, "`flow_shift` must be a number"),
        ({"rank_pattern": ("to_k",)}, "`rank_pattern` must be of items LAYER=NUMBER, got 'to_k'"),
        ({"alpha_pattern": ("to_k=0",)}, "`alpha_pattern` must be of items LAYER=NUMBER, got 'to_k=0'"),
        ({"rank_pattern": ("conv_point=3",)}, "`rank_pattern` must name layers that get an adapter, got 'conv_point'"),
    ],
)
def test_bad_settings(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        train(make_config(tmp_path, **changes), [latent_batch()], tiny_transformer())
    with pytest.raises(ValueError, match="`quantize` must be one of"):
        LoraModelOptions(pretrained="some/pipeline", quantize="int3")


def test_captions(tmp_path):
    write_image_folder(tmp_path, [(16, 16)] * 4)
    (tmp_path / "2.txt").write_text("from a file\n")
    assert captioned_folder(str(tmp_path), [(32, 32)], "sks").captions[2:] == ["from a file", "A green house "]
    (tmp_path / "metadata.jsonl").unlink()
    assert captioned_folder(str(tmp_path), [(32, 32)], "sks").captions == ["sks", "sks", "from a file", "sks"]
    with pytest.raises(ValueError, match="`instance_prompt` must be given for images without a caption"):
        captioned_folder(str(tmp_path), [(32, 32)], "")


def sprint_student():
    torch.manual_seed(3)
    return make_student(tiny_transformer())


@torch.no_grad()
def generate(transformer):
    """What a Sprint makes of fixed noise in one step."""
    batch, student = latent_batch(seed=1), TrigFlowStudent(transformer).eval()
    noise, angles = batch["latents"], torch.full((4,), trigflow.MAX_ANGLE)
    prompt = batch["prompt_embeds"], batch["prompt_attention_mask"]
    return trigflow.clean_latents(noise, student(noise, angles, torch.full((4,), 4.5), prompt)[0], angles)


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_on_sprint(tmp_path, base):
    """A run that is killed and resumed, beside a base that stays; the result loads into a Sprint pipeline."""
    start, vae = sprint_student(), tiny_autoencoder()
    kept = []

    def run(folder, resume=False, stop_at=None):
        transformer = deepcopy(start)
        if base == "int4":
            quantize(transformer, SVDQuantConfig(rank=2), progress=False)
        before = {name: value.clone() for name, value in transformer.state_dict().items()}
        batches = interrupted(lambda start: map(latent_batch, range(start, 100)), stop_at)
        config = make_config(folder, max_steps=4, ema_decay=0.9, flow_shift=None, mix_ffn=True, resume=resume)
        train(config, batches, transformer, vae)
        after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
        assert all(torch.equal(after[name], value) for name, value in before.items())
        kept.append(before)
        return load_file(folder / "model" / WEIGHTS)

    whole = check_resuming(run, tmp_path)
    assert any(value.any() for name, value in whole.items() if "lora_B" in name)
    assert not any("log_variance" in name for name in whole)
    grid = Image.open(next((tmp_path / "whole" / "samples").glob("*.png")))
    assert grid.size == (4 * 16, 3 * 16)  # four prompts, in 1, 2 and 4 steps
    transformer = deepcopy(start)
    if base == "int4":
        quantize(transformer, SVDQuantConfig(rank=2), progress=False)
    untrained = generate(transformer)
    parts = tiny_pipeline().components | {"transformer": transformer, "scheduler": diffusers.SCMScheduler()}
    pipe = SanaSprintPipeline(**parts)
    pipe.load_lora_weights(tmp_path / "whole" / "model")
    assert not torch.allclose(generate(pipe.transformer), untrained, atol=1e-4)


@pytest.mark.parametrize("kind", ["sana", "sprint"])
def test_dora_on_4_bits(tmp_path, kind):
    """What was trained beside a 4-bit base is what is loaded beside it, lengths included."""
    start = tiny_transformer() if kind == "sana" else sprint_student()
    outputs = []
    for folder in ("dora", "lora"):
        transformer = deepcopy(start)
        quantize(transformer, SVDQuantConfig(rank=2), progress=False)
        config = make_config(tmp_path / folder, use_dora=folder == "dora", use_rslora=True)
        train(config, [latent_batch()], transformer)
        outputs.append(generate(transformer) if kind == "sprint" else predict(transformer))
    assert not torch.equal(*outputs)
    saved = load_file(tmp_path / "dora" / "model" / WEIGHTS)
    assert any("lora_magnitude_vector" in name for name in saved)
    transformer = deepcopy(start)
    quantize(transformer, SVDQuantConfig(rank=2), progress=False)
    transformer.load_lora_adapter(tmp_path / "dora" / "model", weight_name=WEIGHTS)
    loaded = generate(transformer) if kind == "sprint" else predict(transformer)
    assert torch.allclose(loaded, outputs[0], atol=1e-5)


class NormalWorld(nn.Module):
    """The consistency model of normally distributed latents, whose outputs `shift` makes larger away from the image.

    At the angle t x_t has the variance v = (0.6 cos t)^2 + sin^2 t, and its path ends in 0.6 x_t / sqrt(v).
    """

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, noisy, angles, guidance, prompt):
        assert set(guidance.tolist()) == {4.0, 4.5, 5.0}
        cos, sin = angles.cos().view(-1, 1, 1, 1), angles.sin().view(-1, 1, 1, 1)
        output = 0.6 * noisy / torch.sqrt((0.6 * cos) ** 2 + sin**2)
        return (cos * noisy - output) / sin - self.shift * output, 0 * self.shift.expand(len(noisy))


def test_consistency_training_ends_at_the_consistency_model():
    """There the mean gradient over images is 0, and away from it the gradient leads back."""
    latents = 0.6 * torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    prompt = torch.zeros(20_000, 1, 1), torch.ones(20_000, 1)
    config = LoraTrainingConfig(tangent_constant=1e3)  # so large that tangents are not normalized

    def gradient(shift, weights=1.0):
        torch.manual_seed(0)
        model = NormalWorld(shift)
        consistency_loss(config, Accelerator(), model, latents, prompt, weights).backward()
        return 1e3 * model.shift.grad.item()

    assert abs(gradient(0.0)) < 0.01
    assert gradient(0.3) > 0.05
    assert gradient(-0.3) < -0.05
    assert gradient(0.3, torch.zeros(20_000)) == 0


def test_settings_that_sprint_has_no_use_for(tmp_path):
    for changes in ({"caption_dropout": 0.1}, {"loss_weighting": "min_snr"}):
        with pytest.raises(
            ValueError, match="`caption_dropout` must be 0 and `loss_weighting` 'none' for SANA-Sprint"
        ):
            train(make_config(tmp_path, **changes), [latent_batch()], sprint_student())


def test_main_on_sprint_in_4_bits(tmp_path):
    write_image_folder(tmp_path / "data", [(40, 40)] * 2)
    parts = tiny_pipeline().components
    parts |= {"transformer": sprint_student(), "scheduler": diffusers.SCMScheduler(sigma_data=0.4)}
    SanaSprintPipeline(**parts).save_pretrained(tmp_path / "sprint")
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "sprint"), "--quantize", "int4"]
    arguments += ["--quantize_rank", "2", "--instance_prompt", "a red cat", "--class_prompt", "a cat"]
    arguments += ["--num_class_images", "1", "--batch_size", "2", "--resolution", "32", "--max_steps", "2"]
    arguments += ["--max_sequence_length", "32", "--output_dir", str(tmp_path / "out")]
    main(arguments)
    state = json.loads(next((tmp_path / "out" / "checkpoints").rglob("state.json")).read_text())
    assert state["settings"]["sigma_data"] == 0.4
    pipe = SanaSprintPipeline.from_pretrained(tmp_path / "sprint")
    pipe.load_lora_weights(tmp_path / "out" / "model")
    assert pipe.get_active_adapters() == ["default_0"]


class Items(list):
    """Items of one size each."""

    sizes_of_items = [(1, 1), (2, 2), (3, 3)]


def test_with_prior():
    instance, prior = Items([{"x": 0}, {"x": 1}, {"x": 2}]), Items([{"x": 10}, {"x": 11}])
    both = WithPrior(instance, prior, weight=0.25)
    assert [item["x"] for item in (both[i] for i in range(len(both)))] == [0, 10, 1, 11, 2, 10]
    assert [both[i]["loss_weight"].item() for i in (0, 1)] == [1.0, 0.25]
    assert both.sizes_of_items == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (1, 1)]


def test_main_with_prior_on_4_bits(tmp_path):
    write_image_folder(tmp_path / "data", [(40, 40)] * 3)
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "pipeline"), "--quantize", "int4"]
    arguments += ["--quantize_rank", "2"]
    arguments += ["--instance_prompt", "a red cat", "--class_prompt", "a cat", "--num_class_images", "2"]
    arguments += ["--batch_size", "2", "--resolution", "32", "--max_steps", "2", "--sample_steps", "1"]
    arguments += ["--sample_prompts", "a blue cat", "two dogs", "--max_sequence_length", "32"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    main(arguments)
    generated = sorted((tmp_path / "out" / "class").iterdir())
    assert [Image.open(path).size for path in generated] == [(32, 32), (32, 32)]
    assert len(list((tmp_path / "out" / "cache").rglob("*.safetensors"))) == 3 + 2
    assert Image.open(tmp_path / "out" / "samples" / "step_0000002.png").width == 2 * 32  # an image per prompt
    pipe = SanaPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.load_lora_weights(tmp_path / "out" / "model")
    assert pipe.get_active_adapters() == ["default_0"]
    main([*arguments, "--resume", "--max_steps", "3"])
    assert [path.name for path in generated] == sorted(path.name for path in (tmp_path / "out" / "class").iterdir())
    with pytest.raises(ValueError, match="`pretrained` must be a SanaPipeline"):
        main(arguments[:2])


def test_shift_is_the_schedulers(tmp_path):
    write_image_folder(tmp_path / "data", [(40, 40)])
    pipe = tiny_pipeline()
    pipe.register_modules(scheduler=type(pipe.scheduler)(flow_shift=1.5))
    pipe.save_pretrained(tmp_path / "pipeline")
    config = LoraTrainingConfig(output_dir=str(tmp_path / "out"))
    data = LoraDataOptions(data=str(tmp_path / "data"), resolution=32)
    batches, _, _, samples = prepare(config, data, LoraModelOptions(pretrained=str(tmp_path / "pipeline")))
    assert config.flow_shift == 1.5
    assert samples is None
    batch = next(iter(batches(0)))
    expected, mask, _, _ = pipe.encode_prompt(
        "a red cat",
        do_classifier_free_guidance=False,
        complex_human_instruction=complex_human_instruction().split("\n"),
    )
    assert torch.allclose(batch["prompt_embeds"], expected[:, mask[0].bool()], atol=1e-5)


def test_pixel_art():
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    art = emoji.pixelate(image)
    assert torch.equal(emoji.pixelate(art), art)
    assert len(art.unique()) <= emoji.LEVELS
    assert emoji.within_blocks(art) < 1e-9
    assert emoji.on_grid(art) == pytest.approx(1)
    assert emoji.within_blocks(image) > 0.9
    assert emoji.on_grid(image) == pytest.approx(3 / 63, abs=0.01)


def test_emoji_lora(art, tmp_path, monkeypatch):
    """The bundled checkpoint itself, for a step, and the judge's report."""
    probe = EmojiProbe(art.objects, list(COLORS), list(STYLES), max_objects=3)
    monkeypatch.setattr(EmojiProbe, "from_pretrained", lambda folder: probe)
    monkeypatch.setattr(emoji, "is_kept_out", lambda word: True)  # of so few objects, those kept out have no scene
    emoji.write_images(art, tmp_path / "images", held_out_scenes(art.objects, {"object": 2}))
    rows = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    assert all(row["text"].endswith(", pixel art") for row in rows)
    trained = emoji.train(tmp_path / "images", tmp_path / "lora", SANA_EMOJI, steps=1)
    lora = bundle_lora(trained, tmp_path / "bundle")
    assert 1.8 < (trained / WEIGHTS).stat().st_size / (lora / WEIGHTS).stat().st_size < 2
    report = emoji.judge(art, SANA_EMOJI, {"lora": lora, "lora_int4": lora}, tmp_path, count=1, steps=1)
    assert report.keys() > {"without_lora", "lora", "lora_on_4_bit_base", "lora_trained_on_4_bit_base"}
    assert report["truth"]["variance_within_large_pixels"] == 0
    assert Image.open(tmp_path / "held_out.png").size == (256, 5 * 256)


def test_class_images_are_of_their_prompt(tmp_path):
    """Whatever an earlier run with another prompt has left; what the user has put there counts and stays."""
    (tmp_path / "base").mkdir()
    folder, asked = tmp_path / "class", []

    def pipe(prompt, generator, **size):
        asked.append((prompt, generator.initial_seed()))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    def run(prompt, count):
        asked.clear()
        data = LoraDataOptions(data=str(tmp_path), class_prompt=prompt, num_class_images=count)
        model = LoraModelOptions(pretrained=str(tmp_path / "base"))
        lora.generate_class_images(pipe, LoraTrainingConfig(), data, model, folder)
        return sorted(path.name for path in folder.iterdir())

    names = [f"class_{index:05d}.png" for index in range(3)]
    assert run("a dog", 3) == names
    assert asked == [("a dog", 0), ("a dog", 1), ("a dog", 2)]
    assert run("a dog", 3) == names
    assert asked == []
    assert run("a cat", 2) == names[:2]
    assert asked == [("a cat", 0), ("a cat", 1)]
    Image.new("RGB", (8, 8)).save(folder / "mine.jpg")
    (folder / "mine.txt").write_text("a cat of mine")
    assert run("a cat", 3) == [*names[:2], "mine.jpg", "mine.txt"]
    assert asked == []
    (tmp_path / "base" / "model_index.json").write_text("{}")  # another model of the same name
    run("a cat", 3)
    assert len(asked) == 2
