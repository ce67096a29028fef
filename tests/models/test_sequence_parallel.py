"""The transformer with its tokens, or its weights, on two processes, against one process that has them all."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from safetensors.torch import load_file, save_file

import diffusers_sana
from tests import tiny
from tests.models import sana_video_transformers, test_transformer_sana_video2
from tests.models.sana_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.image_prompt_cases import trained_adapter
from tests.two_processes import join, run_in_two


VIDEO, VIDEO2 = "video", "video2"
# Family of the model, height (or number of frames) of the latents, and whether a LoRA is on.
CASES = {
    "plain": ("sana", 8, False),
    "qk_norm": ("sana_1.5", 8, False),
    "positions": ("sana_2k", 6, False),
    "guided": ("sprint", 4, False),
    "lora": ("sana_1.5", 8, True),
    "odd": ("sana_2k", 7, False),
    "two_rows": ("sana_1.5", 2, False),
    "video": (VIDEO, 4, True),
    "odd_video": (VIDEO, 3, False),
    "video2": (VIDEO2, 4, True),
    "odd_video2": (VIDEO2, 3, False),
}
ODD = ("odd", "odd_video", "odd_video2")
SHARDED = ("sana", "sana_1.5", "sprint")


def new_model(family, with_lora):
    torch.manual_seed(0)
    if family == VIDEO2:
        model = test_transformer_sana_video2.tiny_model(relu_divisor=True)
    else:
        model = sana_video_transformers.tiny_model() if family == VIDEO else tiny_model(family)
    if with_lora and family == VIDEO2:
        targets = ["qkv", "kv_linear", "up_proj", "output_gate"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    elif with_lora:
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
        targets += ["conv_temp"] if family == VIDEO else []
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model


@torch.no_grad()
def outputs(model, height):
    """Without and with the text done before."""
    if isinstance(model, diffusers_sana.SanaVideo2Transformer3DModel):
        inputs = test_transformer_sana_video2.tiny_inputs(frames=height)
        inputs["timestep"] = torch.linspace(0, 900, 2 * height).view(2, height)  # of frames
    elif isinstance(model, diffusers_sana.SanaVideoTransformer3DModel):
        inputs = sana_video_transformers.tiny_inputs(model, frames=height)
        inputs["timestep"] = torch.linspace(0, 900, 2 * height).view(2, height)  # of frames
    else:
        inputs = tiny_inputs(model, height=height)
    whole = model(**inputs).sample.contiguous()
    text = {name: inputs.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    context = model.encode_text(**text)
    sample = model(**inputs, encoder_hidden_states=None, text_context=context).sample
    return {"whole": whole, "context": sample.contiguous()}


def generate(pipe):
    """Without and with an image prompt."""
    found = {}
    prompt = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(1))
    pipe.register_modules(ip_adapter=trained_adapter(pipe.transformer))
    for name, options in {"image": {}, "image_prompt": {"ip_adapter_image_embeds": [prompt]}}.items():
        options |= {"num_inference_steps": 3, "height": 24, "width": 16, "output_type": "pt"}
        found[name] = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images.contiguous()
    return found


def errors_of(config):
    """What a model says to what it cannot do."""
    model = new_model("sana", False)
    model.enable_parallelism(config=config)
    messages = {}
    for name, height, grad in (("odd", 7, False), ("too_low", 1, False), ("grad", 8, True)):
        with torch.set_grad_enabled(grad):
            try:
                model(**tiny_inputs(model, height=height))
            except (ValueError, RuntimeError) as error:
                messages[name] = f"{type(error).__name__}: {error}"
    return messages


def errors_of_shards():
    """What a model says that has other heads, adapters, gradients, or a second call."""
    plain, config = new_model("sana", False), TensorParallelConfig(tp_degree=2)
    plain.enable_parallelism(config=config)
    calls = {
        "heads": lambda: tiny_model(num_cross_attention_heads=1, cross_attention_head_dim=32).enable_parallelism(
            config=config
        ),
        "adapter": lambda: new_model("sana", True).enable_parallelism(config=config),
        "shards_grad": lambda: plain(**tiny_inputs(plain)),
        "twice": lambda: plain.enable_parallelism(config=config),
        "saved": lambda: plain.save_pretrained("unused"),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def all_gather(pieces, piece, group):
    """Of unlike sizes too, which NCCL can do and gloo cannot."""
    for rank, other in enumerate(pieces):
        if rank == torch.distributed.get_rank(group):
            other.copy_(piece)
        torch.distributed.broadcast(other, group=group, group_src=rank)


def main(folder):
    rank = join()
    torch.distributed.all_gather = all_gather
    for name, (family, height, with_lora) in CASES.items():
        model = new_model(family, with_lora)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=name in ODD))
        save_file(outputs(model, height), folder / f"{name}-{rank}.safetensors")
    for family in SHARDED:
        model = new_model(family, False)
        before = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
        after = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
        assert after < 0.6 * before  # all but the modulation, and the biases of the outputs
        save_file(outputs(model, 8), folder / f"sharded_{family}-{rank}.safetensors")
    messages = errors_of(ContextParallelConfig(ring_degree=2)) | errors_of_shards()
    (folder / f"errors-{rank}.json").write_text(json.dumps(messages))
    pipe = tiny.pipeline(diffusers_sana)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    save_file(generate(pipe), folder / f"pipeline-{rank}.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_in_two(__file__, folder)
    return folder


def of_both(results, name):
    """The tensors of the first process, after a look at those of the other: equal bits."""
    ours, others = (load_file(results / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(ours[key], others[key]) for key in ours)
    return ours


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    family, height, with_lora = CASES[case]
    expected, actual = outputs(new_model(family, with_lora), height), of_both(results, case)
    for name in expected:
        assert_close_fp32(actual[name], expected[name])


@pytest.mark.parametrize("family", SHARDED)
def test_weights_on_two_processes_equal_those_on_one(results, family):
    expected, actual = outputs(new_model(family, False), 8), of_both(results, f"sharded_{family}")
    for name in expected:
        assert_close_fp32(actual[name], expected[name])


def test_both_processes_generate_the_image_of_one(results):
    expected, found = generate(tiny.pipeline(diffusers_sana)), of_both(results, "pipeline")
    assert relative_error(expected["image_prompt"], expected["image"]) > 1e-3
    for name, image in expected.items():
        assert (found[name] - image).abs().max() < 1e-5


def test_errors(results):
    messages = json.loads((results / "errors-0.json").read_text())
    assert messages == json.loads((results / "errors-1.json").read_text())
    assert "`hidden_states` must have rows of tokens divisible by the 2 processes, got 7" in messages["odd"]
    assert "at least one row of tokens per process (2), got 1" in messages["too_low"]
    assert "has no gradients" in messages["grad"]
    assert "`tp_degree` must divide `num_cross_attention_heads`, 1, got 2" in messages["heads"]
    assert "adapter" in messages["adapter"]
    assert "has no gradients" in messages["shards_grad"]
    assert "already applied" in messages["twice"]
    assert "sharded with tensor parallelism" in messages["saved"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
