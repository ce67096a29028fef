"""`diffusers_sana.quantize(pipe)`: a 16-bit pipeline to a 4- or 8-bit one, in one call.

    targets.py       which layers
    calibrate.py     with prompts: the inputs of the layers while the 16-bit pipeline runs
    algorithm/       the weights of each group of layers to 4 or 8 bits and a low-rank branch
    budget.py        with a budget: which ranks, and which layers stay in 16 bit
    layers/          quantized layers in place of the original ones

With a folder, `unfinished_run.py` keeps finished layers on disk until the result is saved.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from diffusers import ConfigMixin, DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_sana.quantizers.svdquant.algorithm.decompose import LayerReport, decompose
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.budget import (
    Option,
    bf16_bytes,
    choose,
    parse_budget,
    ranks_for,
)
from diffusers_sana.quantizers.svdquant.calibrate import Statistics, group_statistics, run_pipeline
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig, mode_for
from diffusers_sana.quantizers.svdquant.integrations.checkpoint import recorded_config
from diffusers_sana.quantizers.svdquant.integrations.diffusers import SVDQuantQuantizer
from diffusers_sana.quantizers.svdquant.integrations.transformers import SVDQuantTransformersQuantizer
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers, replace_layer
from diffusers_sana.quantizers.svdquant.model_card import model_card, save_card
from diffusers_sana.quantizers.svdquant.report import LayerResult, QuantizationReport
from diffusers_sana.quantizers.svdquant.targets import LayerGroup, check_finite, find_targets, layer_groups
from diffusers_sana.quantizers.svdquant.unfinished_run import UnfinishedRun, digest, settings_digest


MODEL = "model"  # the component name of a model that is passed without a pipeline


def quantize(
    pipe_or_model: DiffusionPipeline | nn.Module,
    config: SVDQuantConfig | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    components: Sequence[str] = ("transformer",),
    folder: str | os.PathLike | None = None,
    num_inference_steps: int | None = None,
    memory_gib: float = 4.0,
    progress: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> QuantizationReport:
    """Quantizes a pipeline, or one model, in place to 4 or 8 bits with SVDQuant (arXiv 2411.05007).

    Without prompts it needs no data and takes minutes. With prompts the 16-bit pipeline first generates their images,
    and each layer is fitted to the inputs that it had. The same prompts and seed give the same bits. If the call is
    interrupted, the pipeline is unchanged; original and quantized weights are briefly in memory at the same time.

    Args:
        pipe_or_model: any diffusers pipeline, or a model of diffusers or transformers, with its weights in memory.
        config: how; by default int4, rank 32.
        prompts: calibration prompts; a few dozen are enough.
        components: which models of the pipeline to quantize.
        folder: where to save the result, with a report and a model card; new or empty. An interrupted quantization
            continues if it is called again with the same arguments; until it is finished, its state is in
            `folder` + ".unfinished".
        num_inference_steps: of the calibration; by default that of the pipeline.
        memory_gib: limit for the statistics that are collected at a time: for each distinct layer input of K features
            mainly a K x K matrix in fp32. The pipeline runs as many times as the limit requires. Without a low-rank
            branch and without `gptq` no such matrix is needed.
        progress: show progress bars.
        seed: of the noise, `seed + i` for prompt i, and of the sample of inputs.
        **kwargs: arguments of the pipeline's call, for the calibration.

    Returns:
        The errors per layer; print it, or `.save(folder)` it.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
        RuntimeError: another process quantizes into `folder`.
        OSError: `folder` cannot be written, for example because the disk is full.
    """
    config = SVDQuantConfig() if config is None else config
    models = _models(pipe_or_model, components)
    prompts = _checked_prompts(pipe_or_model, prompts, config, kwargs)
    if not memory_gib > 0:
        raise ValueError(f"`memory_gib` must be positive, got {memory_gib!r}.")
    if folder is not None and not hasattr(pipe_or_model, "save_pretrained"):
        raise TypeError(f"`folder` needs a model with `save_pretrained`, got {type(pipe_or_model).__name__}.")
    for model in models.values():
        _check_not_quantized(model)
    targets = {component: find_targets(model, config) for component, model in models.items()}
    for component, model in models.items():
        _check_weights(model, targets[component])
    groups = [group for name, model in models.items() for group in layer_groups(name, model, targets[name])]

    with _opened_run(folder, pipe_or_model, models, config, prompts, num_inference_steps, seed, kwargs) as run:
        finished = run.layers() if run else {}
        unfinished = [group for group in groups if not all(key in finished for key in group.keys)]
        statistics: Iterable[tuple[LayerGroup, Statistics | None]] = ((group, None) for group in unfinished)
        if prompts:
            with_hessian = {group.key for group in unfinished if config.for_layer(group.mode).uses_hessian}
            generate = partial(run_pipeline, pipe_or_model, prompts, num_inference_steps, seed, progress, kwargs)
            statistics = group_statistics(generate, groups, unfinished, with_hessian, memory_gib * 2**30, seed, run)
        options: dict[str, list[Option]] = {}
        bar = tqdm(statistics, "Quantizing", len(unfinished), unit="group", disable=not progress or not unfinished)
        for group, inputs in bar:
            data = inputs.tensors() if inputs else {}
            if config.budget is not None:
                options[group.key] = _options(group, config, data)
                continue
            for key, weight, errors in zip(
                group.keys, *decompose(group.weights, config.for_layer(group.mode), **data), strict=True
            ):
                finished[key] = weight.to("cpu"), errors
                if run:
                    run.save_layer(key, weight, errors)
            if run:
                run.drop_statistics(group.key)
        if config.budget is not None:
            finished = _within_budget(models, groups, targets, options, config.budget)
        recorded = _replace_layers(models, targets, finished, config)
        layers = [
            LayerResult.of(f"{component}.{name}", mode, *finished[f"{component}.{name}"])
            for component in models
            for name, mode in targets[component].items()
        ]
        report = QuantizationReport(recorded if len(models) == 1 else config, layers, len(prompts))
        if run:
            _save(pipe_or_model, next(iter(models.values())), report, run)
    return report


def set_compute_mode(model: nn.Module, compute_mode: str) -> None:
    """Sets the compute mode of all quantized layers of a model; adaLN layers keep 16-bit activations.

    Args:
        model: with layers quantized by SVDQuant.
        compute_mode: "auto", "w4a4", "w4a8", "w4a16", "w8a8" or "w8a16"; see `mode_for` for models of 4- and 8-bit
            layers.

    Raises:
        ValueError: another name, or a model without quantized layers.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers quantized by SVDQuant. Quantize it first.")
    for layer in layers:
        layer.set_compute_mode(compute_mode)


def mark_quantized(model: nn.Module, config: SVDQuantConfig) -> None:
    """Registers a model whose layers were quantized in memory with its library, so that it can be saved and loaded.

    Args:
        model: of diffusers or transformers, with quantized layers.
        config: lists them, see `recorded_config`.
    """
    cls = SVDQuantQuantizer if isinstance(model, ConfigMixin) else SVDQuantTransformersQuantizer
    cls(config, pre_quantized=True).mark_quantized(model)  # type: ignore[arg-type]


def _models(pipe_or_model: Any, components: str | Sequence[str]) -> dict[str, nn.Module]:
    """The models to quantize, by component name; of a component that is several models, each by itself."""
    if not isinstance(pipe_or_model, DiffusionPipeline):
        if not isinstance(pipe_or_model, nn.Module):
            raise TypeError(f"`pipe_or_model` must be a pipeline or a model, got {type(pipe_or_model).__name__}.")
        return _parts(MODEL, pipe_or_model)
    available = _modules(pipe_or_model)
    names = [components] if isinstance(components, str) else list(components)
    if not names or not all(name in available for name in names):
        raise ValueError(f"`components` must name models of the pipeline, some of {sorted(available)}, got {names}.")
    return {name: model for component in names for name, model in _parts(component, available[component]).items()}


def _parts(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """A model by its name; or those that it consists of, which it saves one by one."""
    parts: dict[str, nn.Module] | None = getattr(model, "saved_parts", None)
    return {name: model} if parts is None else {f"{name}.{key}": part for key, part in parts.items()}


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: value for name, value in pipe.components.items() if isinstance(value, nn.Module)}


def _checked_prompts(
    pipe_or_model: Any, prompts: str | Sequence[str] | None, config: SVDQuantConfig, kwargs: dict[str, Any]
) -> list[str]:
    if prompts is None:
        if config.gptq:
            raise ValueError("`gptq=True` needs calibration data: pass `prompts`, or set `gptq=False`.")
        if kwargs:
            raise TypeError(
                f"{sorted(kwargs)} would be arguments of the pipeline, which runs with `prompts` only. The options of "
                "SVDQuant are in `SVDQuantConfig`."
            )
        return []
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`prompts` must be strings, at least one, got {prompts!r}. Pass None to do without.")
    if not isinstance(pipe_or_model, DiffusionPipeline):
        raise ValueError(
            f"`prompts` need the whole pipeline to generate images, got a {type(pipe_or_model).__name__}. Pass the "
            "pipeline."
        )
    if getattr(pipe_or_model, "_cuda_graphs", None) is not None:
        raise ValueError("`prompts` need a pipeline without CUDA graphs. Call `pipe.disable_cuda_graphs()` before.")
    return prompts


def _check_not_quantized(model: nn.Module) -> None:
    if any(True for _ in quantized_layers(model)):
        raise ValueError(f"{type(model).__name__} is already quantized by SVDQuant. Load the original to do it again.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} must be without adapters to be quantized. Call `unload_lora_weights` before, and "
            "`fuse_lora` before that to make them part of the weights; or load them after quantizing."
        )


def _check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError for a weight that is not in memory or not finite, before any is quantized."""
    for name in names:
        weight = cast(Tensor, model.get_submodule(name).weight)
        if weight.is_meta:
            raise ValueError(
                f"the weight of {name!r} must be in memory, got one that was offloaded. Quantize the model first, "
                "offload it afterwards."
            )
        check_finite(name, weight)


def _opened_run(
    folder: str | os.PathLike | None,
    pipe_or_model: Any,
    models: dict[str, nn.Module],
    config: SVDQuantConfig,
    prompts: list[str],
    num_inference_steps: int | None,
    seed: int,
    kwargs: dict[str, Any],
) -> Any:
    """A context manager that gives the run of a folder, described by all that its result depends on, or None."""
    if folder is None:
        return nullcontext()
    involved = _modules(pipe_or_model) if prompts else models
    parts = {name: part for name, part in pipe_or_model.components.items() if part is not None} if prompts else {}
    description = {
        "config": config.to_dict(),
        "weights": {name: digest(model) for name, model in involved.items()},
        "prompts": prompts,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "arguments": {key: repr(value) for key, value in kwargs.items()},
        "settings": {name: settings_digest(part) for name, part in parts.items()},
    }
    return UnfinishedRun(Path(folder), description)


def _options(group: LayerGroup, config: SVDQuantConfig, data: dict[str, Tensor]) -> list[Option]:
    """The ways to store a group of layers, among which a budget decides."""
    options = [Option(sum(weight.nbytes for weight in group.weights), 0.0)]
    ranks: dict[str, Sequence[int]] = {mode_for("int8", group.mode): (0,), group.mode: ranks_for(group.layers)}
    for mode in ranks:
        for rank in ranks[mode]:
            weights, reports = decompose(group.weights, replace(config.for_layer(mode), rank=rank), **data)
            results = [(weight.to("cpu"), report) for weight, report in zip(weights, reports, strict=True)]
            options.append(Option.of(mode, results))
    return options


def _within_budget(
    models: dict[str, nn.Module],
    groups: list[LayerGroup],
    targets: dict[str, dict[str, str]],
    options: dict[str, list[Option]],
    budget: str,
) -> dict[str, tuple[QuantizedWeight, LayerReport]]:
    """The quantized weights that a budget allows; `targets` gets their modes, and loses layers that stay in 16 bit."""
    other = sum(tensor.nbytes for model in models.values() for tensor in model.state_dict().values())
    other -= sum(weight.nbytes for group in groups for weight in group.weights)
    chosen = choose(options, other, parse_budget(budget) * bf16_bytes(models.values()))
    finished: dict[str, tuple[QuantizedWeight, LayerReport]] = {}
    for group in groups:
        option = chosen[group.key]
        for name in group.names:
            targets[group.component][name] = option.mode
        finished |= dict(zip(group.keys, option.results, strict=False))  # none in 16 bit
    for component, modes in targets.items():
        targets[component] = {name: mode for name, mode in modes.items() if mode}
    for component, left in targets.items():
        if not left:
            raise ValueError(
                f"`budget` must be small enough to need quantized layers in {component!r}, got {budget!r}."
            )
    return finished


def _replace_layers(
    models: dict[str, nn.Module],
    targets: dict[str, dict[str, str]],
    finished: dict[str, tuple[QuantizedWeight, LayerReport]],
    config: SVDQuantConfig,
) -> SVDQuantConfig:
    """Replaces all target layers by quantized ones on the same devices; returns the config of the last model."""
    recorded = config
    with _all_or_nothing(models.values()):
        for component, model in models.items():
            for name, mode in targets[component].items():
                device = cast(Tensor, model.get_submodule(name).weight).device
                weight, _ = finished[f"{component}.{name}"]
                replace_layer(model, name, weight.to(device), mode, config.compute_mode)
            recorded = recorded_config(config, model, targets[component])
            if hasattr(model, "save_pretrained"):
                mark_quantized(model, recorded)
    return recorded


@contextmanager
def _all_or_nothing(models: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the submodules of models if the block is interrupted or fails."""
    before = [(module, dict(module._modules)) for model in models for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, children in before:
            module._modules.update(children)
        raise


def _save(pipe_or_model: Any, model: Any, report: QuantizationReport, run: UnfinishedRun) -> None:
    """Saves the quantized pipeline with report and model card, and finishes the run."""
    origin = str(getattr(pipe_or_model.config, "_name_or_path", ""))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists()
    with run.writing():
        path = run.new_model_folder()
        pipe_or_model.save_pretrained(path)
        report.save(path)
        card = model_card(
            report,
            type(pipe_or_model),
            name=run.target.name,
            dtype=str(model.dtype).removeprefix("torch."),
            base_model=origin if is_hub_id else None,
        )
        save_card(card, path)
        run.finish()
