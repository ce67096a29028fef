"""Adapters of every kind on dense and on 4-bit layers, beside them and fused: the errors of the change of the output.

    python -m benchmarks.adapters

The transformer of the bundled checkpoint gets random adapters of the size of trained ones, written by the rules of
their trainers (`tests/loaders/lora/adapter_kinds.py`), on the attention and Mix-FFN of all blocks. The reference has
the changed weights in dense layers; for 4-bit layers these are the weights that the 4-bit layers represent. An error
is the norm of the difference of outputs over the norm of what the adapter changes. All runs compute in fp32, 4-bit
layers with 16-bit activations in their place (w4a16), so only what the layers cannot hold is seen. Writes
`benchmarks/results/<device>/adapters.json`.
"""

import argparse
import copy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import SanaPipeline, SVDQuantConfig, quantize
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests.loaders.lora.adapter_kinds import KINDS, Kind
from tests.numerics import relative_error
from tests.quantizers.lora_cases import dense_twin


LAYERS = ("attn1.to_q", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.conv_point")
RANK = 16


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Noise and text features for two images."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    return {
        "hidden_states": torch.randn(2, config.in_channels, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 12, config.caption_channels, generator=generator),
        "timestep": torch.tensor([500.0, 120.0]),
    }


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """One forward."""
    return model(**given).sample


def adapter(kind: Kind, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file with an adapter of a kind for all blocks of a dense model, and the changed weights."""
    torch.manual_seed(0)
    file, weights = {}, {}
    for index in range(model.config.num_layers):  # type: ignore[union-attr,arg-type]
        for layer in LAYERS:
            name = f"transformer_blocks.{index}.{layer}"
            tensors, weights[name] = kind.make(model.get_submodule(name).weight.detach())  # type: ignore[operator]
            file |= {f"lycoris_{name.replace('.', '_')}.{ending}": tensor for ending, tensor in tensors.items()}
    return file, weights


def measure(kind: Kind, pipe: SanaPipeline, twin: nn.Module) -> dict[str, Any]:
    """The errors of one adapter beside the layers and fused, and the sizes of what it changes."""
    given = inputs(twin)
    file, weights = adapter(kind, twin)
    changed, before = copy.deepcopy(twin), run(twin, given)
    sizes = []
    for name, weight in weights.items():
        layer: Any = changed.get_submodule(name)
        sizes.append(relative_error(weight, layer.weight))
        layer.weight.data = weight
    expected = run(changed, given)
    pipe.load_lora_weights(file)
    found: dict[str, Any] = {
        "weight_change": median(sizes),
        "output_change": relative_error(expected, before),
        "beside": relative_error(run(pipe.transformer, given) - before, expected - before),
    }
    stored = {id(layer): layer.rank for layer in quantized_layers(pipe.transformer)}
    try:
        pipe.fuse_lora(components=["transformer"])
    except RuntimeError as error:
        found["fused"] = None
        found["refusal"] = str(error)
    else:
        found["fused"] = relative_error(run(pipe.transformer, given) - before, expected - before)
        ranks = [layer.rank - stored[id(layer)] for layer in quantized_layers(pipe.transformer)]
        found["ranks"] = max(ranks, default=0)
        pipe.unfuse_lora(components=["transformer"])
        found["unfused"] = relative_error(run(pipe.transformer, given) - before, expected - before)
    pipe.unload_lora_weights()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args(argv)
    cases: dict[str, dict[str, Any]] = {}
    for bits in ("16 bit", "4 bit"):
        pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
        twin = copy.deepcopy(pipe.transformer)
        if bits == "4 bit":
            config = SVDQuantConfig(rank=RANK, smoothing="none", refinements=0, compute_mode="w4a16")
            quantize(pipe.transformer, config, progress=False)
            twin = dense_twin(pipe.transformer)
        for name, kind in KINDS.items():
            cases.setdefault(name, {})[bits] = measure(kind, pipe, twin)
            print(name, bits, cases[name][bits])
            pipe.transformer.requires_grad_(False)
    write_results("adapters", environment() | {"rank": RANK, "layers": list(LAYERS), "cases": cases}, args.results)


if __name__ == "__main__":
    main()
