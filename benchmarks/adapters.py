"""Adapters of every kind on dense and on 4-bit layers, beside them and fused: the errors of the change of the output.

    python -m benchmarks.adapters [--only cases|parts]

The transformer of the bundled checkpoint gets random adapters of the size of trained ones, written by the rules of
their trainers (`tests/loaders/lora/adapter_kinds.py`), on the attention and Mix-FFN of all blocks. The reference has
the changed weights in dense layers; for 4-bit layers these are the weights that the 4-bit layers represent. An error
is the norm of the difference of outputs over the norm of what the adapter changes. All runs compute in fp32, 4-bit
layers with 16-bit activations in their place (w4a16), so only what the layers cannot hold is seen.

The second part is about changes that a 4-bit layer can only keep a part of: by which sizes of the input channels to
choose it. "Smoothing factors" are stored with each layer; "second moments" and "covariance" of the calibration inputs
are not, so they would have to be. The layers are those of `study_svdquant_layers.py` and some of the bundled
checkpoint; the error is that of the change of the output for held-out inputs.

Writes `benchmarks/results/<device>/adapters.json`; with `--only`, the other part of the file stays as it is.
"""

import argparse
import copy
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, environment, write_results
from benchmarks.study_svdquant_layers import SHAPES, Layer, make_layer
from diffusers_sana import SanaPipeline, SVDQuantConfig, quantize
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import weighted_svd
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from diffusers_sana.quantizers.svdquant.layers.lora import MOST_RANKS
from tests.loaders.lora.adapter_kinds import KINDS, Kind
from tests.numerics import relative_error
from tests.quantizers.lora_cases import dense_twin


LAYERS = ("attn1.to_q", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.conv_point")
RANK = 16
PROMPTS = ("cat", "red heart", "rocket", "green apple")  # the inputs of the first half calibrate, the others measure
BLOCKS = (0, 7)
IN_PART = ("DoRA, outputs", "DoRA, inputs", "LoHa with DoRA, outputs", "OFT, inputs", "OFT, outputs", "BOFT")


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


def layers_of_sana() -> dict[str, Layer]:
    """Layers of the bundled checkpoint with their inputs, of two halves of the prompts."""
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = [f"transformer_blocks.{block}.{layer}" for block in BLOCKS for layer in LAYERS]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def observe(name: str, is_conv: bool) -> Any:
        return lambda _, args: seen[name].append((args[0].movedim(1, -1) if is_conv else args[0]).flatten(0, -2))

    layers = {name: pipe.transformer.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(observe(name, isinstance(layer, nn.Conv2d)))
    for index, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(index)
        pipe(prompt, num_inference_steps=4, output_type="latent", generator=generator)
    return {
        name: Layer(
            layer.weight.detach().flatten(1), *(torch.cat(half) for half in (x[: len(x) // 2], x[len(x) // 2 :]))
        )
        for (name, layer), x in zip(layers.items(), seen.values(), strict=True)
    }


@torch.no_grad()
def errors_of_parts(layer: Layer) -> dict[str, float]:
    """Of the change of the output, by what the kept directions were chosen for; the mean over kinds of adapters."""
    weight, inputs, held_out = (x.float() for x in layer)
    hessian = inputs.t() @ inputs
    config = SVDQuantConfig(rank=RANK, gptq=False).for_layer("w4a4")
    (item,), _ = decompose([layer.weight], config, inputs, inputs.abs().amax(0), hessian)
    sizes = {
        "nothing": torch.ones(len(hessian)),
        "smoothing factors": item.smooth_factor.float(),
        "second moments": hessian.diagonal().sqrt(),
    }
    sums = dict.fromkeys([*sizes, "covariance"], 0.0)
    rank = int(MOST_RANKS * min(weight.shape))
    for kind in IN_PART:
        torch.manual_seed(0)
        change = KINDS[kind].make(weight)[1] - weight
        kept = {"covariance": torch.mm(*weighted_svd(change, rank, 0, hessian))}
        for name, size in sizes.items():
            up, values, down = torch.linalg.svd(change * size, full_matrices=False)
            kept[name] = up[:, :rank] * values[:rank] @ down[:rank] / size
        for name, part in kept.items():
            sums[name] += relative_error(held_out @ part.t(), held_out @ change.t()) / len(IN_PART)
    return sums


def parts() -> dict[str, dict[str, float]]:
    """The errors of parts for each kind of layer; of those of Sana the median."""
    found = {kind: errors_of_parts(make_layer(kind, seed=0)) for kind in SHAPES}
    of_sana = [errors_of_parts(layer) for layer in layers_of_sana().values()]
    found["sana-emoji"] = {name: median(errors[name] for errors in of_sana) for name in of_sana[0]}
    return found


def measure_cases() -> dict[str, dict[str, Any]]:
    """`measure` of each kind of adapter, on 16 and on 4 bits."""
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
    return cases


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--only", choices=("cases", "parts"), help="one part of the study (default: both)")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    if args.only:
        found = json.loads((args.results / "cpu" / "adapters.json").read_text(encoding="utf-8"))
    if args.only != "parts":
        found |= environment() | {"rank": RANK, "layers": list(LAYERS), "cases": measure_cases()}
    if args.only != "cases":
        settings = {"rank": RANK, "blocks": list(BLOCKS), "kinds": list(IN_PART)}
        found["parts"] = environment() | settings | {"errors": parts()}
    write_results("adapters", found, args.results)


if __name__ == "__main__":
    main()
