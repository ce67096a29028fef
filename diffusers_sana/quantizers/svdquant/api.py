"""One call from a 16-bit pipeline to a 4-bit one: `diffusers_sana.quantize(pipe)`."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from diffusers_sana.quantizers.svdquant.algorithm.decompose import LayerReport, QuantizedWeight
from diffusers_sana.quantizers.svdquant.calibrate import Statistics, collect_statistics, passes, statistics_bytes
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.integrations.diffusers import attach
from diffusers_sana.quantizers.svdquant.model_card import model_card, save_card
from diffusers_sana.quantizers.svdquant.quantize_model import (
    all_or_nothing,
    check_not_quantized,
    check_weights,
    decompose_layers,
    finish_layers,
    options_for,
    replace_layers,
)
from diffusers_sana.quantizers.svdquant.report import LayerResult, QuantizationReport
from diffusers_sana.quantizers.svdquant.targets import find_targets, sibling_groups
from diffusers_sana.quantizers.svdquant.unfinished_run import UnfinishedRun, digest, settings_digest


MODEL = "model"  # the name of a model that comes without a pipeline


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
    """Quantizes a pipeline, or one model, in place to 4 bits with SVDQuant (arXiv 2411.05007).

    Without prompts it needs no data and takes minutes. With prompts the 16-bit pipeline generates their images first,
    and each layer is fitted to its inputs on the way. The same prompts and seed give the same bits. If it is
    interrupted, the pipeline is as it was before; both forms of the quantized weights are in memory for a moment.

    Args:
        pipe_or_model: any diffusers pipeline, or a model of diffusers or transformers, with its weights in memory.
        config: how; by default int4, rank 32.
        prompts: calibration prompts; a few dozen are plenty.
        components: of the pipeline: which to quantize.
        folder: where to save the result, with a report and a model card; new or empty. A quantization that is cut off
            goes on where it stopped if it is called again with the same arguments; what it has is in
            `folder` + ".unfinished" until then.
        num_inference_steps: of the calibration; by default the pipeline's.
        memory_gib: for what is collected at a time: of each distinct input of layers, with K features, a K x K matrix
            in fp32 above all. The pipeline runs as often as that takes. No matrix without a branch and `gptq`.
        progress: show bars.
        seed: of the noise, prompt i has `seed + i`, and of the sample of inputs.
        **kwargs: of the pipeline's call, for the calibration.

    Returns:
        The errors layer by layer; print it, or `.save(folder)` it.

    Raises:
        ValueError, TypeError: naming the argument, before anything is changed.
        RuntimeError: another process quantizes into `folder`.
        OSError: `folder` cannot be written, such as on a full disk.
    """
    config = SVDQuantConfig() if config is None else config
    models = _models(pipe_or_model, components)
    prompts = _checked_prompts(pipe_or_model, prompts, config, kwargs)
    if not memory_gib > 0:
        raise ValueError(f"`memory_gib` must be positive, got {memory_gib!r}.")
    if folder is not None and not hasattr(pipe_or_model, "save_pretrained"):
        raise TypeError(f"`folder` needs a model with `save_pretrained`, got {type(pipe_or_model).__name__}.")
    for model in models.values():
        check_not_quantized(model)
    targets = {component: find_targets(model, config) for component, model in models.items()}
    for component, model in models.items():
        check_weights(model, targets[component])

    run = None
    if folder is not None:
        description = {
            "config": config.to_dict(),
            "weights": {name: digest(model) for name, model in _involved(pipe_or_model, models, prompts).items()},
            "prompts": prompts,
            "num_inference_steps": num_inference_steps,
            "seed": seed,
            "arguments": {key: repr(value) for key, value in kwargs.items()},
            "settings": _settings(pipe_or_model) if prompts else {},
        }
        run = UnfinishedRun(Path(folder), description)
    try:
        work = _Work(models, targets, config, run, progress)
        if prompts:
            draw = partial(_draw, pipe_or_model, prompts, num_inference_steps, seed, progress, kwargs)
            with _unchanged_tokenizers(pipe_or_model):
                work.calibrate(draw, memory_gib * 2**30, seed)
        recorded = work.replace_layers()
        report = QuantizationReport(recorded, work.ordered_results(), len(prompts))
        if run:
            with run.writing():
                _save(pipe_or_model, next(iter(models.values())), report, run)
        return report
    finally:
        if run:
            run.close()


class _Work:
    """The layers of all models that are to be quantized; done ones are kept in `finished`, on the CPU."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        targets: dict[str, dict[str, str]],
        config: SVDQuantConfig,
        run: UnfinishedRun | None,
        progress: bool,
    ) -> None:
        self.models, self.targets, self.config, self.run, self.progress = models, targets, config, run, progress
        self.finished = run.layers() if run else {}
        self.results: dict[str, LayerResult] = {}
        for key, value in self.finished.items():
            self._note(key, *value)

    def calibrate(self, draw: Callable[[], None], budget: float, seed: int) -> None:
        """Runs the pipeline and finishes all layers; nothing is replaced, because it may have to run again."""
        groups, layers, modes = {}, {}, {}
        for component, model in self.models.items():
            for names in sibling_groups(self.targets[component]):
                key = f"{component}.{names[0]}"
                groups[key], layers[key] = (component, names), model.get_submodule(names[0])
                modes[key] = self.targets[component][names[0]]
        to_do = [
            key for key, (component, names) in groups.items()
            if not all(f"{component}.{name}" in self.finished for name in names)
        ]  # fmt: skip
        hessians = {key for key in to_do if options_for(self.config, modes[key]).uses_hessian}

        def finish(key: str, statistics: Statistics) -> None:
            component, names = groups[key]
            model = self.models[component]
            results = decompose_layers(model, names, modes[key], self.config, statistics.tensors())
            for name, (weight, report) in zip(names, results, strict=True):
                self.finished[f"{component}.{name}"] = weight.to("cpu"), report
                self.keep(component, name, weight, report)
            if self.run:
                self.run.drop_statistics(key)

        stored = self.run.statistics() if self.run else {}
        for key in self._bar([key for key in to_do if key in stored]):
            finish(key, cast(UnfinishedRun, self.run).load_statistics(key))
        sizes = {key: statistics_bytes(layers[key], key in hessians) for key in to_do if key not in stored}
        for keys in passes(sizes, budget):
            statistics = collect_statistics(draw, layers, keys, hessians, seed)
            for key in keys if self.run else ():
                cast(UnfinishedRun, self.run).save_statistics(key, statistics[key])
            for key in self._bar(keys):
                finish(key, statistics.pop(key))

    def replace_layers(self) -> SVDQuantConfig:
        """Puts finished layers in their places, and finishes the others where they are; returns what to record."""
        for component, model in self.models.items():
            done = {name: self.finished.pop(key) for name, key in self._keys(component) if key in self.finished}
            progress = self.progress and len(done) < len(self.targets[component])
            finish_layers(model, self.targets[component], self.config, done, partial(self.keep, component), progress)
            self.finished |= {key: done[name] for name, key in self._keys(component)}
        recorded = self.config
        with all_or_nothing(self.models.values()):
            for component, model in self.models.items():
                weights = {name: self.finished[key][0] for name, key in self._keys(component)}
                recorded = replace_layers(model, self.targets[component], weights, self.config)
                if hasattr(model, "save_pretrained"):
                    attach(model, recorded)
        return recorded if len(self.models) == 1 else self.config

    def ordered_results(self) -> list[LayerResult]:
        """In the order of the models."""
        return [self.results[key] for component in self.models for _, key in self._keys(component)]

    def keep(self, component: str, name: str, weight: QuantizedWeight, report: LayerReport) -> None:
        """Notes a finished layer, also on disk."""
        self._note(f"{component}.{name}", weight, report)
        if self.run:
            self.run.save_layer(f"{component}.{name}", weight, report)

    def _note(self, key: str, weight: QuantizedWeight, report: LayerReport) -> None:
        component, _, name = key.partition(".")
        self.results[key] = LayerResult.of(key, self.targets[component][name], weight, report)

    def _keys(self, component: str) -> list[tuple[str, str]]:
        return [(name, f"{component}.{name}") for name in self.targets[component]]

    def _bar(self, keys: list[str]) -> Iterable[str]:
        return tqdm(keys, desc="Quantizing", unit="group", disable=not self.progress or not keys)


def _models(pipe_or_model: Any, components: str | Sequence[str]) -> dict[str, nn.Module]:
    """What is to be quantized, by the name of the component."""
    if not isinstance(pipe_or_model, DiffusionPipeline):
        if not isinstance(pipe_or_model, nn.Module):
            raise TypeError(f"`pipe_or_model` must be a pipeline or a model, got {type(pipe_or_model).__name__}.")
        return {MODEL: pipe_or_model}
    there = _modules(pipe_or_model)
    names = [components] if isinstance(components, str) else list(components)
    if not names or not all(name in there for name in names):
        raise ValueError(f"`components` must name models of the pipeline, some of {sorted(there)}, got {names}.")
    return {name: there[name] for name in names}


def _checked_prompts(
    pipe_or_model: Any, prompts: str | Sequence[str] | None, config: SVDQuantConfig, kwargs: dict[str, Any]
) -> list[str]:
    if prompts is None:
        if config.gptq:
            raise ValueError("`gptq=True` needs calibration data: pass `prompts`, or set `gptq=False`.")
        if kwargs:
            raise TypeError(
                f"{sorted(kwargs)} would be arguments of the pipeline, which runs with `prompts` only. What SVDQuant "
                "offers is in `SVDQuantConfig`."
            )
        return []
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`prompts` must be strings, at least one, got {prompts!r}. Pass None to do without.")
    if not isinstance(pipe_or_model, DiffusionPipeline):
        raise ValueError(
            f"`prompts` need the whole pipeline to draw them, got a {type(pipe_or_model).__name__}. Pass the pipeline."
        )
    if getattr(pipe_or_model, "_cuda_graphs", None) is not None:
        raise ValueError("`prompts` need a pipeline without CUDA graphs. Call `pipe.disable_cuda_graphs()` before.")
    return prompts


def _involved(pipe_or_model: Any, models: dict[str, nn.Module], prompts: list[str]) -> dict[str, nn.Module]:
    """The models on which the result depends."""
    return _modules(pipe_or_model) if prompts else models


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: value for name, value in pipe.components.items() if isinstance(value, nn.Module)}


def _settings(pipe: Any) -> dict[str, str]:
    """What calibration depends on beside the weights."""
    return {name: settings_digest(part) for name, part in pipe.components.items() if part is not None}


def _draw(
    pipe: Any, prompts: list[str], num_inference_steps: int | None, seed: int, progress: bool, kwargs: dict[str, Any]
) -> None:
    """Runs the pipeline for each prompt, up to the latents."""
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    settings = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for i, prompt in enumerate(tqdm(prompts, desc="Calibrating", unit="prompt", disable=not progress)):
            generator = torch.Generator("cpu").manual_seed(seed + i)  # the same noise on every device
            pipe(**{"prompt": prompt, "generator": generator, "output_type": "latent", **steps, **kwargs})
    finally:
        pipe.set_progress_bar_config(**settings)


@contextmanager
def _unchanged_tokenizers(pipe: Any) -> Iterator[None]:
    """Tokenizers keep padding and truncation of their last call, and would be saved with them."""
    backends = [c.backend_tokenizer for c in pipe.components.values() if hasattr(c, "backend_tokenizer")]
    before = [(backend.truncation, backend.padding) for backend in backends]
    try:
        yield
    finally:
        for backend, (truncation, padding) in zip(backends, before, strict=True):
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def _save(pipe_or_model: Any, model: Any, report: QuantizationReport, run: UnfinishedRun) -> None:
    path = run.new_model_folder()
    pipe_or_model.save_pretrained(path)
    report.save(path)
    origin = str(getattr(pipe_or_model.config, "_name_or_path", ""))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists()
    card = model_card(
        report,
        type(pipe_or_model),
        name=run.target.name,
        dtype=str(model.dtype).removeprefix("torch."),
        base_model=origin if is_hub_id else None,
    )
    save_card(card, path)
    run.finish()
