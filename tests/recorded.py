"""What the authors' own programs computed, recorded once, against which our classes are held.

A fixture `tests/fixtures/<name>.safetensors` has the outputs. The tensors of the checkpoint and the inputs follow from
a formula, so that the program and the test have the same ones: keys and shapes are in the fixture's metadata, as the
program's own state dict has them. LoRA files are in the fixture as the trainers wrote them. Which program, which
commit and which settings is there too.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


FOLDER = Path(__file__).parent / "fixtures"


def numbers(shape: tuple[int, ...] | list[int], seed: int) -> Tensor:
    """`shape` numbers between -1 and 1 that look random, fp32; the same on every machine."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    waves = torch.sin(index * 12.9898 + seed * 78.233) * 43758.5453
    return (2 * (waves - waves.floor()) - 1).float().reshape(shape)


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, of sizes at which no layer blows up or dies; positions are sorted keys'."""
    out = {}
    for seed, key in enumerate(sorted(shapes)):
        shape = shapes[key]
        value = numbers(shape, seed)
        if key.endswith("num_batches_tracked"):
            out[key] = torch.tensor(1)
        elif key.endswith("running_var"):
            out[key] = 1 + 0.5 * value
        elif len(shape) < 2:
            out[key] = (1 + 0.3 * value) if key.endswith("weight") else 0.2 * value
        elif key.endswith("scale_shift_table"):
            out[key] = 0.5 * value
        else:
            out[key] = value * math.sqrt(3 / math.prod(shape[1:]))
    return out


class Recording:
    """A fixture.

    Attributes:
        about: program, commit, settings and what else was written down.
        shapes: of the checkpoint, by the program's keys; several checkpoints by name where there are several.
        outputs: what the program computed.
    """

    def __init__(self, name: str):
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            self.about: dict[str, Any] = json.loads(file.metadata()["about"])
            self.outputs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dictionary
        self.shapes: dict[str, Any] = self.about["shapes"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, L2."""
    return ((actual - expected).norm() / expected.norm()).item()
