"""One pipeline, called from several threads at once: each call gets what it would get alone, to the last bit."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig

import diffusers_sana
from tests.pipelines.test_matrix import IMAGE, make


PROMPTS = ["a cat", "a red fox in the snow", "", "two very small houses", "one dog", "stars"]


def options(number):
    """A call unlike its neighbors: prompt, length of the text, steps, guidance, strength of the LoRA."""
    return {
        "prompt": PROMPTS[number % 6],
        "negative_prompt": "" if number % 2 else "a dark photograph",
        "num_inference_steps": 5 + number % 3,
        "guidance_scale": (4.5, 1.0, 2.5, 1.0)[number % 4],
        "attention_kwargs": (None, {"scale": 0.0}, {"scale": 0.5}, {"scale": -1.5}, {})[number % 5],
        "max_sequence_length": (300, 40)[number % 2],
        "complex_human_instruction": None if number % 3 else ["Describe:", "Prompt: "],
        "num_images_per_prompt": 1 + number % 2,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "output_type": "pt",
    }


def add_lora(pipe):
    torch.manual_seed(5)
    layers = LoraConfig(r=2, lora_alpha=100, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(layers)


def run(pipe, number, **changes):
    generator = torch.Generator().manual_seed(number)
    return pipe(**options(number) | changes, generator=generator).images


@contextmanager
def quick_switches():
    """Threads take turns every few microseconds of Python."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(work, num_threads, num_calls):
    """`work(number)` for every number, in threads that begin together and do `num_calls` each."""
    barrier = threading.Barrier(num_threads)

    def thread(first):
        torch.set_num_threads(1)
        barrier.wait()
        return {first + i * num_threads: work(first + i * num_threads) for i in range(num_calls)}

    with quick_switches(), ThreadPoolExecutor(num_threads) as pool:
        results = list(pool.map(thread, range(num_threads)))
    return {number: result for part in results for number, result in part.items()}


CACHES = {
    "none": None,
    "first block": FirstBlockCacheConfig(threshold=0.5),  # its state has a name
    "broadcast": PyramidAttentionBroadcastConfig(  # its state is one for all
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001)
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_each_call_gets_the_bits_that_it_gets_alone(precision, cache):
    pipe = make("SanaPipeline", precision)
    add_lora(pipe)
    if CACHES[cache] is not None:
        pipe.transformer.enable_cache(CACHES[cache])
    alone = {number: run(pipe, number) for number in range(12)}
    assert not any(
        torch.equal(alone[i], alone[j]) for i in range(12) for j in range(i) if len(alone[i]) == len(alone[j])
    )
    together = in_threads(lambda number: run(pipe, number), num_threads=4, num_calls=3)
    different = [number for number in alone if not torch.equal(alone[number], together[number])]
    assert not different


def test_pipelines_that_share_their_parts():
    """Perturbed self-attentions, an image and a plain call on one transformer."""
    plain = make("SanaPipeline", "bf16")
    add_lora(plain)
    pag = diffusers_sana.SanaPAGPipeline.from_pipe(plain)
    image = diffusers_sana.SanaImg2ImgPipeline.from_pipe(plain)

    def work(number):
        if number % 3 == 0:
            return run(plain, number)
        if number % 3 == 1:
            return run(pag, number, pag_scale=number / 2)
        return run(image, number, image=IMAGE, strength=0.7)

    alone = {number: work(number) for number in range(6)}
    together = in_threads(work, num_threads=3, num_calls=2)
    assert all(torch.equal(alone[number], together[number]) for number in alone)


def test_callbacks_see_and_change_their_own_call():
    pipe = make("SanaPipeline", "fp32")
    schedulers = {}

    def work(number):
        expected = options(number)
        seen = []

        def callback(called, step, timestep, tensors):
            assert called is pipe
            assert pipe.num_timesteps == expected["num_inference_steps"]
            assert pipe.guidance_scale == (expected["guidance_scale"] if step < 2 else 0.0)
            assert pipe.attention_kwargs == expected["attention_kwargs"]
            assert pipe.current_timestep == timestep
            assert not pipe.interrupt
            assert len(pipe.scheduler.timesteps) == expected["num_inference_steps"]
            schedulers[number] = pipe.scheduler
            seen.append(step)
            if step == 1:
                pipe._guidance_scale = 0.0
            return {}

        made = run(pipe, number, callback_on_step_end=callback, negative_prompt="")
        assert seen == list(range(expected["num_inference_steps"]))
        return made

    alone = {number: work(number) for number in range(4)}
    together = in_threads(work, num_threads=4, num_calls=1)
    assert all(torch.equal(alone[number], together[number]) for number in alone)
    assert len({id(scheduler) for scheduler in schedulers.values()} | {id(pipe.scheduler)}) == 5


def test_official_callback_ends_the_guidance_of_its_own_call():
    pipe = make("SanaPipeline", "fp32")

    def work(number):
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1) if number % 2 else None
        return run(pipe, number, callback_on_step_end=cutoff, guidance_scale=4.5, num_images_per_prompt=1)

    alone = {number: work(number) for number in range(4)}
    together = in_threads(work, num_threads=4, num_calls=1)
    assert all(torch.equal(alone[number], together[number]) for number in alone)


def test_a_thread_without_a_call_interrupts_those_that_run():
    pipe = make("SanaPipeline", "fp32")
    begun, interrupted = threading.Barrier(3), threading.Barrier(3)

    def work(number):
        steps = []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            if step == 0:
                begun.wait(60)
                interrupted.wait(60)
            return {}

        run(pipe, number, callback_on_step_end=callback)
        return steps

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(work, number) for number in range(2)]
        begun.wait(60)
        pipe._interrupt = True
        interrupted.wait(60)
        assert [call.result() for call in calls] == [[0], [0]]
    assert pipe.interrupt
    assert len(run(pipe, 0)) == 1
    assert not pipe.interrupt


def test_the_scheduler_of_the_caller_is_left_as_it_was():
    pipe = make("SanaPipeline", "fp32")
    pipe.scheduler.set_timesteps(3)
    scheduler, before = pipe.scheduler, dict(vars(pipe.scheduler))
    copies = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    copies |= {name: list(value) for name, value in before.items() if isinstance(value, list)}
    run(pipe, 0)
    assert pipe.scheduler is scheduler
    assert vars(scheduler).keys() == before.keys()
    for name, value in vars(scheduler).items():
        assert value is before[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, copies[name])
        if isinstance(value, list):
            assert value == copies[name]


def test_properties_tell_of_the_last_call():
    pipe = make("SanaPipeline", "fp32")
    with pytest.raises(AttributeError, match="guidance_scale"):
        _ = pipe.guidance_scale
    run(pipe, 2)
    assert pipe.num_timesteps == 7
    assert pipe.guidance_scale == 2.5
    assert pipe.attention_kwargs == {"scale": 0.5}
