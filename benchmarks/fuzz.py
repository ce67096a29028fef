"""Changes files of a small random Sana at random, and looks at what loading them and generating with them does.

    python -m benchmarks.fuzz --count 500 --seed 0

Each case changes one file of a whole pipeline or LoRA, in a separate process with limits of time and memory. It may
end in the same image, in another one (a value that can be meant), or in an error that names the file. Anything else
fails: a crash, a hang, an error that names no file or comes only from use, an image that is not finite. An image from
weights that were never read is not finite either, because memory that nobody has written is filled with NaN here.

The exit code is 1 where a case fails. The counts are written to `results/<device>/fuzz.json`.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.harness import environment, write_results
from diffusers_sana import FlowDPMSolverScheduler, SanaPipeline, SanaTransformer2DModel
from tests.tiny import TRANSFORMER


MEMORY = 4 * 2**30  # bytes that a case may take beyond what this process has
SECONDS = 30
CONFIG = TRANSFORMER | {"sample_size": 8, "qk_norm": "rms_norm_across_heads"}
WEIGHTS, LORA = diffusers.utils.SAFETENSORS_WEIGHTS_NAME, "pytorch_lora_weights.safetensors"
# Kind of case -> the file that is changed, in the pipeline's folder.
KINDS = {
    "config": "transformer/config.json",
    "index": f"transformer/{WEIGHTS}.index.json",
    "header": f"transformer/{WEIGHTS}",
    "scheduler": "scheduler/scheduler_config.json",
    "lora": LORA,
}
GOOD = ("same", "other", "refused")
BAD = ("crash", "hang", "not finite", "unnamed", "late")
VALUES = [None, True, False, 0, -1, 1, 2, 3, 10**5, 2**31, 2**63, -(2**63), 0.5, -0.5, 1e-9, 1e9, 1e308, math.nan]
VALUES += [math.inf, -math.inf, "", "x", "1", "F16", "I32", [], [1], [0, 4], {}, {"x": 1}]


def write_pipeline(folder: Path) -> None:
    """A whole pipeline without text encoder and autoencoder, in one file of weights, in shards, and its LoRA."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(**CONFIG)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.2)
    pipe = SanaPipeline(None, None, None, transformer, FlowDPMSolverScheduler(flow_shift=3.0))
    pipe.save_pretrained(folder / "whole")
    pipe.save_pretrained(folder / "shards", max_shard_size="20KB")
    factors = {"A": torch.randn(2, 16), "B": torch.randn(16, 2)}
    layers = {
        f"transformer_blocks.{block}.{layer}.lora_{half}.weight": factor.clone()
        for block in range(2)
        for layer in ("attn1.to_q", "attn2.to_k")
        for half, factor in factors.items()
    }
    metadata = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k"]}
    SanaPipeline.save_lora_weights(folder / "whole", layers, transformer_lora_adapter_metadata=metadata)


def use(folder: Path, kind: str) -> torch.Tensor:
    """Latents from the pipeline in the folder, and with the LoRA in it where that is what is changed."""
    with _named_errors():
        pipe = SanaPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None, vae=None)
        if kind == "lora":
            pipe.load_lora_weights(folder / LORA)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    scheduler = pipe.scheduler
    if scheduler.config.use_dynamic_shifting:  # a config that can be meant, for pipelines that give `mu`
        scheduler.register_to_config(use_dynamic_shifting=False)
    embeds = torch.randn(1, 5, CONFIG["caption_channels"], generator=generator)
    return pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=torch.ones(1, 5, dtype=torch.long),
        negative_prompt_embeds=-embeds,
        negative_prompt_attention_mask=torch.ones(1, 5, dtype=torch.long),
        latents=torch.randn(1, 4, 8, 8, generator=generator),
        num_inference_steps=3,
        output_type="latent",
    ).images


class Refused(Exception):
    """An error from loading, as opposed to one from use."""


@contextlib.contextmanager
def _named_errors() -> Any:
    try:
        yield
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content cut off, with bytes flipped, put in or left out, or empty."""
    place = rng.randrange(len(content))
    length = rng.choice([1, 1, 2, 8, 64])
    noise = bytes(rng.randrange(256) for _ in range(length))
    return rng.choice(
        [
            content[:place],
            content[:place] + noise + content[place + length :],
            content[:place] + noise + content[place:],
            content[:place] + content[place + length :],
            content[:place] + content[place:][::-1],
            b"",
        ]
    )


def change_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with something in it replaced, left out, renamed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        name = rng.choice(sorted(value))
        action = rng.choice(["inside", "inside", "inside", "replace", "leave out", "rename", "add", "swap"])
        changed = dict(value)
        if action == "inside":
            changed[name] = change_value(value[name], rng)
        elif action == "replace":
            changed[name] = rng.choice(VALUES)
        elif action == "swap":
            other = rng.choice(sorted(value))
            changed[name], changed[other] = value[other], value[name]
        elif action == "add":
            changed[rng.choice(["x", "num_layers", "shift", "quantization_config", name + "x"])] = rng.choice(VALUES)
        else:
            content = changed.pop(name)
            if action == "rename":
                changed[name + rng.choice(["x", ".weight", "_"])] = content
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], change_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)])
    return rng.choice(VALUES)


def change_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with a value or its bytes changed."""
    if rng.random() < 0.3:
        return change_bytes(content, rng)
    return json.dumps(change_value(json.loads(content), rng)).encode()


def change_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header changed, a length in it, or the file itself cut off."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + size], content[8 + size :]
    how = rng.random()
    if how < 0.6:
        header = json.dumps(change_value(json.loads(header), rng)).encode()
    elif how < 0.8:
        header = change_bytes(header, rng)
    elif how < 0.9:
        return content[: rng.randrange(len(content))]
    else:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63])) + header + data
    return struct.pack("<Q", len(header)) + header + data


def change_lora(content: bytes, rng: random.Random) -> bytes:
    """A LoRA file with its header changed, or one of its numbers NaN or infinite."""
    if rng.random() < 0.8:
        return change_header(content, rng)
    size = struct.unpack("<Q", content[:8])[0]
    place = 8 + size + 4 * rng.randrange((len(content) - 8 - size) // 4)
    return content[:place] + struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf])) + content[place + 4 :]


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "config": change_json,
    "index": change_json,
    "header": change_header,
    "scheduler": change_json,
    "lora": change_lora,
}


def run_case(source: Path, kind: str, number: int, seed: int, wanted: torch.Tensor) -> tuple[str, str]:
    """One case: its outcome, of `GOOD` or `BAD`, and what the error said."""
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(source / ("shards" if kind == "index" else "whole"), Path(place) / "pipeline")
        file = folder / KINDS[kind]
        file.write_bytes(CHANGES[kind](file.read_bytes(), random.Random(f"{seed} {kind} {number}")))
        return in_a_child(lambda: outcome(folder, kind, file, wanted))


def outcome(folder: Path, kind: str, file: Path, wanted: torch.Tensor) -> tuple[str, str]:
    """Loads and uses what is in the folder, in which `file` was changed."""
    try:
        image = use(folder, kind)
    except Refused as error:
        # The index is about files of its own folder, whose names are its stem.
        is_named = file.name in str(error) or (kind == "index" and f"{WEIGHTS.split('.')[0]}-0" in str(error))
        return ("refused" if is_named else "unnamed"), str(error)
    except Exception as error:
        return "late", f"{type(error).__name__}: {error}"
    if image.shape != wanted.shape or not image.isfinite().all():
        return "not finite", f"shape {list(image.shape)}"
    return ("same" if torch.allclose(image, wanted, rtol=1e-3, atol=1e-3) else "other"), ""


def in_a_child(task: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """What the task returns in a separate process, or "crash" or "hang"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            answer = task()
        except BaseException as error:
            answer = ("late", f"{type(error).__name__}: {error}")
        with os.fdopen(writer, "w", encoding="utf-8", errors="replace") as pipe:
            json.dump(answer, pipe)
            pipe.flush()
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, encoding="utf-8") as pipe:
            # A child that dies closes its end, so this waits no longer than it lives.
            if not select.select([pipe], [], [], SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
                return "hang", f"more than {SECONDS} s"
            text = pipe.read()
    finally:
        _, status = os.waitpid(child, 0)
    if status or not text:
        return "crash", f"ended with {os.waitstatus_to_exitcode(status)}"
    return tuple(json.loads(text))


def fuzz(count: int, seed: int, kinds: list[str]) -> dict[str, Any]:
    """Counts of outcomes of each kind, and all cases that failed."""
    report: dict[str, Any] = {"counts": {}, "failed": []}
    with tempfile.TemporaryDirectory() as place:
        source = Path(place)
        write_pipeline(source)
        for kind in kinds:
            wanted = use(source / ("shards" if kind == "index" else "whole"), kind)
            outcomes: Counter[str] = Counter()
            for number in range(count):
                what, message = run_case(source, kind, number, seed, wanted)
                outcomes[what] += 1
                if what in BAD:
                    message = message.replace(str(source), "")[:300]
                    report["failed"].append({"kind": kind, "number": number, "outcome": what, "message": message})
                    print(f"{kind} {number}: {what}: {message}", flush=True)
            report["counts"][kind] = {name: outcomes[name] for name in GOOD + BAD}
            print(kind, report["counts"][kind], flush=True)
    return report


@contextlib.contextmanager
def quiet() -> Any:
    """Without the logs of the hosts, and with NaN in memory that nobody has written."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def main() -> None:
    """Runs all cases, writes the counts, and fails where a case does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same cases")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    args = parser.parse_args()
    with quiet():
        report = fuzz(args.count, args.seed, args.kinds)
    print(write_results("fuzz", {**environment(), "seconds_allowed": SECONDS, **report}))
    if report["failed"]:
        sys.exit(f"{len(report['failed'])} cases failed")


if __name__ == "__main__":
    main()
