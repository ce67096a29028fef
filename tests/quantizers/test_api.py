"""`quantize`: the same arguments give the same bits, also after an interruption and in several passes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn

import diffusers_sana
from diffusers_sana import SanaPipeline, SVDQuantConfig, quantize
from diffusers_sana.kernels import low_bit
from diffusers_sana.quantizers.svdquant import api as module
from diffusers_sana.quantizers.svdquant import unfinished_run
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer, quantized_layers
from diffusers_sana.quantizers.svdquant.unfinished_run import UnfinishedRun
from tests import tiny


CONFIG = SVDQuantConfig(rank=4)
GPTQ = SVDQuantConfig(rank=4, gptq=True)
PROMPTS = {"prompts": ["a cat", "a dog"], "num_inference_steps": 2, "height": 32, "width": 32, "progress": False}


@pytest.fixture
def pipe():
    return tiny.pipeline(diffusers_sana)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "quantized"


def same(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same_bits(actual, expected):
    actual, expected = actual.transformer.state_dict(), expected.transformer.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not same(actual[name], expected[name])] == []


def interrupt_after(layers, monkeypatch):
    """Lets a run die after so many layers are on disk."""
    save, left = UnfinishedRun.save_layer, [layers]

    def dying(self, *args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        save(self, *args)

    monkeypatch.setattr(UnfinishedRun, "save_layer", dying)


def generate(pipe):
    arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **arguments).images


def test_without_data(pipe, out):
    plain = generate(pipe)
    report = quantize(pipe, CONFIG, folder=out, progress=False)
    assert len(report.layers) == len(list(quantized_layers(pipe.transformer))) > 10
    quantized = generate(pipe)
    assert not torch.equal(quantized, plain)
    pipe.transformer = SanaPipeline.from_pretrained(out).transformer
    assert torch.equal(generate(pipe), quantized)
    assert not out.with_name("quantized.unfinished").exists()
    assert json.loads((out / "quantization_report.json").read_text())["prompts"] == 0


def test_a_model_alone(pipe, out):
    model = tiny.transformer(diffusers_sana)
    report = quantize(model, CONFIG, folder=out, progress=False)
    of_pipe = quantize(pipe, CONFIG, progress=False)
    assert [layer.error for layer in report.layers] == [layer.error for layer in of_pipe.layers]
    loaded = tiny.pipeline(diffusers_sana)
    loaded.transformer = diffusers_sana.SanaTransformer2DModel.from_pretrained(out)
    assert_same_bits(loaded, pipe)


def test_any_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)))
    report = quantize(model, CONFIG, progress=False)
    assert [layer.layer for layer in report.layers] == ["model.0.0", "model.0.1"]
    assert isinstance(model[0][1], SVDQuantLayer)


def test_two_components(pipe):
    report = quantize(pipe, CONFIG, components=("text_encoder", "transformer"), **PROMPTS)
    assert {layer.layer.split(".")[0] for layer in report.layers} == {"transformer", "text_encoder"}
    assert any(True for _ in quantized_layers(pipe.text_encoder))
    assert generate(pipe).isfinite().all()


def test_prompts_change_the_result_and_repeat():
    first, second, without, other_seed = (tiny.pipeline(diffusers_sana) for _ in range(4))
    report = quantize(first, CONFIG, **PROMPTS)
    assert quantize(second, CONFIG, **PROMPTS) == report
    assert_same_bits(first, second)
    assert quantize(without, CONFIG, progress=False) != report
    assert quantize(other_seed, CONFIG, seed=1, **PROMPTS) != report


def test_passes_make_no_difference(pipe, monkeypatch):
    runs = []
    run_pipeline = module.run_pipeline
    monkeypatch.setattr(module, "run_pipeline", lambda *args: (runs.append(1), run_pipeline(*args)))
    quantize(pipe, GPTQ, **PROMPTS)
    assert len(runs) == 1
    in_passes = tiny.pipeline(diffusers_sana)
    quantize(in_passes, GPTQ, memory_gib=150e3 / 2**30, **PROMPTS)
    assert len(runs) > 3
    assert_same_bits(in_passes, pipe)


@pytest.mark.parametrize("arguments", [{}, PROMPTS], ids=["without data", "prompts"])
def test_interrupted_and_continued(pipe, out, arguments, monkeypatch):
    config = GPTQ if arguments else CONFIG
    expected = tiny.pipeline(diffusers_sana)
    arguments = {"progress": False, **arguments}
    report = quantize(expected, config, **arguments)
    arguments["folder"] = out
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            quantize(pipe, config, **arguments)
    assert not out.exists()
    again = tiny.pipeline(diffusers_sana)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_pipeline", lambda *args: pytest.fail("the pipeline need not run again"))
        assert quantize(again, config, **arguments) == report
    assert_same_bits(again, expected)
    assert_same_bits(SanaPipeline.from_pretrained(out), expected)


def test_interrupted_without_a_folder(pipe, monkeypatch):
    """While layers are fitted, and while they are replaced."""
    before, modules = generate(pipe), list(pipe.transformer.modules())
    for name, calls in (("decompose", 3), ("replace_layer", 7)):
        original, left = getattr(module, name), [calls]

        def dying(*args, original=original, left=left, **kwargs):
            left[0] -= 1
            return original(*args, **kwargs) if left[0] else 1 / 0

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying)
            with pytest.raises(ZeroDivisionError):
                quantize(pipe, CONFIG, progress=False)
        assert all(one is other for one, other in zip(pipe.transformer.modules(), modules, strict=True))
    assert torch.equal(generate(pipe), before)
    quantize(pipe, CONFIG, progress=False)
    assert not any(module.training for module in pipe.transformer.modules())


def test_two_processes_in_one_folder(pipe, out):
    """The second is told; what the first does is not touched."""
    other = UnfinishedRun(out, {"config": "another"})
    made = other.new_model_folder()
    (made / "model_index.json").write_text("whole")
    with pytest.raises(RuntimeError, match=f"Another process quantizes into '{out}'"):
        quantize(pipe, CONFIG, folder=out, progress=False)
    other.finish()
    assert [path.name for path in out.iterdir()] == ["model_index.json"]
    assert not other.path.exists()
    with pytest.raises(ValueError, match="`folder` must be new or empty"):
        quantize(pipe, CONFIG, folder=out, progress=False)
    assert not other.path.exists()


def test_full_disk(pipe, out, monkeypatch):
    """One message; what is done is kept, and nothing half written is taken for whole."""
    save = unfinished_run.save_file

    def save_some(tensors, path, *args):
        if len(list(path.parent.glob("*.safetensors"))) > 3:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished_run, "save_file", save_some)
        with pytest.raises(OSError, match=r"unfinished' cannot be written: .*No space left.* with the same arguments"):
            quantize(pipe, CONFIG, folder=out, progress=False)
    path = out.with_name("quantized.unfinished")
    assert len(list((path / "layers").iterdir())) == 4
    (path / "layers" / ".0123456789ab.safetensors").write_bytes(b"half")  # as a kill leaves it
    expected = tiny.pipeline(diffusers_sana)
    quantize(expected, CONFIG, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(SanaPipeline, "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match=r"cannot be written: full. What is finished there is kept"):
            quantize(pipe, CONFIG, folder=out, progress=False)
    assert not out.exists()
    quantize(tiny.pipeline(diffusers_sana), CONFIG, folder=out, progress=False)
    assert_same_bits(SanaPipeline.from_pretrained(out), expected)


def test_calibration_leaves_no_trace_in_the_tokenizer(pipe):
    before = pipe.tokenizer.backend_tokenizer.to_str()
    quantize(pipe, CONFIG, **PROMPTS)
    assert pipe.tokenizer.backend_tokenizer.to_str() == before
    pipe.tokenizer(["a", "long"], padding="max_length", max_length=7, truncation=True)
    padded = pipe.tokenizer.backend_tokenizer.to_str()
    assert padded != before
    other = tiny.pipeline(diffusers_sana)
    other.tokenizer = pipe.tokenizer
    quantize(other, CONFIG, **PROMPTS)
    assert pipe.tokenizer.backend_tokenizer.to_str() == padded


def test_adapters_are_refused(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"must be without adapters to be quantized. Call `unload_lora_weights`"):
        quantize(pipe, CONFIG, progress=False)


def test_interrupted_while_saving(pipe, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedRun, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(pipe, CONFIG, folder=out, progress=False)
    assert not out.exists()
    out.mkdir()  # an empty folder is as good as none
    quantize(tiny.pipeline(diffusers_sana), CONFIG, folder=out, progress=False)
    assert_same_bits(SanaPipeline.from_pretrained(out), pipe)


def test_another_run_in_the_folder(pipe, out, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            quantize(pipe, CONFIG, folder=out, **PROMPTS)
    pipe = tiny.pipeline(diffusers_sana)
    with pytest.raises(ValueError, match=r"differs from this one in `config\.rank`: 4 there, 2 now"):
        quantize(pipe, SVDQuantConfig(rank=2), folder=out, **PROMPTS)
    with pytest.raises(
        ValueError, match=r'`prompts`: \["a cat", "a dog"\] there, \["a cow"\] now; `seed`: 0 there, 3'
    ):
        quantize(pipe, CONFIG, folder=out, seed=3, **{**PROMPTS, "prompts": "a cow"})
    with pytest.raises(ValueError, match=r"`weights\.transformer`"):
        quantize(tiny.pipeline(diffusers_sana, seed=1), CONFIG, folder=out, **PROMPTS)
    assert not any(True for _ in quantized_layers(pipe.transformer))
    pipe.scheduler = diffusers_sana.FlowDPMSolverScheduler(flow_shift=1.5)
    pipe.tokenizer.add_tokens(["cat"])
    with pytest.raises(ValueError, match=r"`settings\.scheduler`: .*`settings\.tokenizer`: "):
        quantize(pipe, CONFIG, folder=out, **PROMPTS)


def test_no_folder_is_overwritten(pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match="`folder` must be new or empty"):
            quantize(pipe, CONFIG, folder=folder, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": GPTQ}, ValueError, "`gptq=True` needs calibration data"),
        ({"prompts": []}, ValueError, "`prompts` must be strings, at least one"),
        ({"prompts": ["a", 3]}, ValueError, "`prompts` must be strings"),
        ({"components": ("unet",)}, ValueError, r"`components` must name models of the pipeline, some of \['text_enc"),
        ({"components": ()}, ValueError, "`components`"),
        ({"rank": 16}, TypeError, r"\['rank'\] would be arguments of the pipeline"),
        ({"memory_gib": 0}, ValueError, "`memory_gib`"),
        ({"prompts": "a cat", "components": "vae", "config": SVDQuantConfig(rank=2)}, ValueError, "did not run"),
    ],
)
def test_bad_arguments(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(pipe, arguments.pop("config", CONFIG), **arguments, progress=False)
    assert not any(True for model in (pipe.transformer, pipe.vae) for _ in quantized_layers(model))


def test_bad_models(pipe):
    with pytest.raises(TypeError, match="`pipe_or_model` must be a pipeline or a model, got str"):
        quantize("folder")
    with pytest.raises(ValueError, match="`prompts` need the whole pipeline"):
        quantize(pipe.transformer, CONFIG, prompts=["a cat"])
    pipe.transformer.transformer_blocks[1].attn1.to_v.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'transformer_blocks.1.attn1.to_v' must be finite"):
        quantize(pipe, CONFIG, progress=False)
    assert not any(True for _ in quantized_layers(pipe.transformer))
    offloaded = tiny.transformer(diffusers_sana).to("meta")
    with pytest.raises(ValueError, match="must be in memory"):
        quantize(offloaded, CONFIG, progress=False)


@pytest.mark.parametrize(("config", "arguments"), [(CONFIG, {}), (GPTQ, PROMPTS)], ids=["plain", "calibrated"])
def test_at_most_four_files_between_the_call_and_the_rounding(pipe, config, arguments, monkeypatch):
    """Package files on the call stack from `quantize` to the function that rounds to codes, both included."""
    package = str(Path(diffusers_sana.__file__).parent)
    stacks = set()

    def encode_int4(scaled):
        files, frame = [low_bit.__file__], sys._getframe(1)  # `traceback` would read the source of every frame
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        calls = files[: len(files) - files[::-1].index(module.__file__)]
        stacks.add(frozenset(file for file in calls if file.startswith(package)))
        return low_bit_encode(scaled)

    low_bit_encode, decode = low_bit.CODECS["int4"]
    monkeypatch.setitem(low_bit.CODECS, "int4", (encode_int4, decode))
    quantize(pipe, config, **{"progress": False, **arguments})
    assert stacks
    assert max(len(files) for files in stacks) <= 4, stacks


def test_bars_of_the_pipeline_come_back(pipe):
    pipe.set_progress_bar_config(disable=True, leave=False)
    quantize(pipe, CONFIG, **PROMPTS)
    assert pipe._progress_bar_config == {"disable": True, "leave": False}
