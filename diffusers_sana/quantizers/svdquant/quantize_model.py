"""Quantizing a model in memory, layer by layer: the loop, and what can be said to a quantized model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_sana.quantizers.svdquant.algorithm.decompose import LayerReport, Options, QuantizedWeight, decompose
from diffusers_sana.quantizers.svdquant.config import LAYOUT, SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer, quantized_layer
from diffusers_sana.quantizers.svdquant.targets import as_patterns, find_targets, sibling_groups


def options_for(config: SVDQuantConfig, mode: str) -> Options:
    """How a layer of that mode is decomposed. Layers with 16-bit activations are always int4."""
    return Options(
        precision=config.precision if mode == "w4a4" else "int4",
        rank=config.rank,
        smoothing=config.smoothing,
        refinements=config.refinements,
        gptq=config.gptq and mode == "w4a4",
        seed=config.seed,
        quantize_activations=mode == "w4a4",
    )


def replace_layer(
    model: nn.Module, name: str, weight: QuantizedWeight, mode: str, config: SVDQuantConfig
) -> SVDQuantLayer:
    """Puts the quantized layer in the place of a linear layer or a 1x1 convolution."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, leaf)
    layer = quantized_layer(original, weight, config.compute_mode, is_weight_only=mode == "w4a16")
    setattr(parent, leaf, layer.train(original.training))
    return layer


def decompose_layers(
    model: nn.Module,
    names: list[str],
    mode: str,
    config: SVDQuantConfig,
    statistics: Mapping[str, Tensor] | None = None,
) -> list[tuple[QuantizedWeight, LayerReport]]:
    """Decomposes layers that share their input; nothing is replaced.

    Args:
        model: holds them.
        names: theirs.
        mode: "w4a4" or "w4a16".
        config: how.
        statistics: `decompose`'s `inputs`, `largest` and `hessian`.
    """
    weights = [cast(Tensor, model.get_submodule(name).weight).detach().flatten(1) for name in names]
    with torch.no_grad():
        return list(zip(*decompose(weights, options_for(config, mode), **(statistics or {})), strict=True))


def check_not_quantized(model: nn.Module) -> None:
    """Raises ValueError for a model with layers of ours, where nothing is left to quantize well, or with adapters."""
    if any(True for _ in quantized_layers(model)):
        raise ValueError(f"{type(model).__name__} is already quantized by SVDQuant. Load the original to do it again.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} must be without adapters to be quantized. Call `unload_lora_weights` before, and "
            "`fuse_lora` before that to make them part of the weights; or load them after quantizing."
        )


def check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Whether all weights can be quantized, before any is.

    Raises:
        ValueError: a weight that is not in memory or not finite.
    """
    for name in names:
        weight = cast(Tensor, model.get_submodule(name).weight)
        if weight.is_meta:
            raise ValueError(
                f"the weight of {name!r} must be in memory, got one that was offloaded. Quantize the model first, "
                "offload it afterwards."
            )
        if not weight.isfinite().all():
            raise ValueError(
                f"the weight of {name!r} must be finite, got NaN or infinity. Load the model in bf16 or fp32."
            )


def quantize_layers(
    model: nn.Module,
    config: SVDQuantConfig,
    finished: Mapping[str, tuple[QuantizedWeight, LayerReport]] | None = None,
    on_layer: Callable[[str, QuantizedWeight, LayerReport], Any] = lambda name, weight, report: None,
    progress: bool = True,
) -> tuple[SVDQuantConfig, dict[str, LayerReport]]:
    """Replaces the target layers of a model by quantized ones.

    Args:
        model: 16 bit or fp32, with its weights.
        config: which layers and how; see `SVDQuantConfig`.
        finished: layers that are already done, by name.
        on_layer: called with each layer that was not in `finished`.
        progress: show a bar.

    Returns:
        The config with the layers it was applied to, and a report a layer.

    Raises:
        ValueError: see `find_targets`, `check_weights` and `decompose`; before anything is replaced.
    """
    check_not_quantized(model)
    targets, finished = find_targets(model, config), dict(finished or {})
    if config.gptq and not finished.keys() >= targets.keys():
        raise ValueError("`gptq=True` needs calibration data: pass prompts to `quantize`, or set `gptq=False`.")
    check_weights(model, targets)
    finish_layers(model, targets, config, finished, on_layer, progress)
    with all_or_nothing([model]):
        recorded = replace_layers(model, targets, {name: finished[name][0] for name in targets}, config)
    return recorded, {name: finished[name][1] for name in targets}


def finish_layers(
    model: nn.Module,
    targets: Mapping[str, str],
    config: SVDQuantConfig,
    finished: dict[str, tuple[QuantizedWeight, LayerReport]],
    on_layer: Callable[[str, QuantizedWeight, LayerReport], Any],
    progress: bool,
) -> None:
    """Decomposes the targets that are not in `finished` yet and puts them there, on the CPU; nothing is replaced."""
    for names in tqdm(sibling_groups(targets), desc="Quantizing", unit="group", disable=not progress):
        if all(name in finished for name in names):
            continue
        results = decompose_layers(model, names, targets[names[0]], config)
        for name, (weight, report) in zip(names, results, strict=True):
            on_layer(name, weight, report)
            finished[name] = weight.to("cpu"), report


def recorded_config(
    config: SVDQuantConfig, model: nn.Module, targets: Mapping[str, str] | None = None
) -> SVDQuantConfig:
    """The config that a model is saved with: in our layout, with its dtype, and with its targets where given."""
    modules = config.modules if targets is None else as_patterns(dict(targets), model)
    layer = next(quantized_layers(model), None)
    dtype = config.dtype if layer is None else str(layer.proj_up.dtype).removeprefix("torch.")
    return replace(config, modules=modules, layout=LAYOUT, dtype=dtype)


def replace_layers(
    model: nn.Module, targets: Mapping[str, str], weights: Mapping[str, QuantizedWeight], config: SVDQuantConfig
) -> SVDQuantConfig:
    """Replaces the targets by quantized layers on the same devices; returns the config that lists them."""
    for name, mode in targets.items():
        device = cast(Tensor, model.get_submodule(name).weight).device
        replace_layer(model, name, weights[name].to(device), mode, config)
    return recorded_config(config, model, targets)


@contextmanager
def all_or_nothing(models: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the submodules of models back as they were if the block is interrupted or fails."""
    before = [(module, dict(module._modules)) for model in models for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, children in before:
            module._modules.update(children)
        raise


def set_compute_mode(model: nn.Module, compute_mode: str) -> None:
    """Sets how the quantized layers of a model compute; adaLN layers stay in w4a16.

    Args:
        model: with layers quantized by SVDQuant.
        compute_mode: "auto", "w4a4", "w4a8" or "w4a16".

    Raises:
        ValueError: another name, or a model without quantized layers.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers quantized by SVDQuant. Quantize it first.")
    for layer in layers:
        layer.set_compute_mode(compute_mode)


def quantized_layers(model: nn.Module) -> Iterator[SVDQuantLayer]:
    """The quantized layers of a model, in its order."""
    return (module for module in model.modules() if isinstance(module, SVDQuantLayer))
