"""Changes of `changes.py` in PEFT's LoRA layers, beside plain LoRAs, on layers of any precision.

A change is an adapter of a LoRA layer like any other: scales, several at once, hot-swapping, deleting and saving work
as for a LoRA. Its factors A and B, which PEFT needs, are zeros of rank 1, and its parts are in `lora_change`.
The output is that of the layer as it is, plus `scale` times the change, so a scale of 0.5 goes half the way.

Several changes of one layer all start from the stored weight, and are added to each other.

Imported only when PEFT is about to be used.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from diffusers_sana._compat import warn_if_untested
from diffusers_sana.loaders.lora.changes import CHANGE, output_change, weight_change, with_gains
from diffusers_sana.loaders.lora.formats import BIAS, DOWN, MAGNITUDE, fields_of, lora_scale
from diffusers_sana.models.transformers.lora_layers import drop_unused, prepare_depthwise


warn_if_untested("peft")
PARTS = "lora_change"  # the attribute of PEFT's layer


class Change(nn.ParameterDict):
    """The parts of one change."""

    def output(self, x: Tensor, layer: LoraLayer) -> Tensor:
        """What is added to the output: `[..., K]` or `[B, K, h, w]` to `[..., N]` or `[B, N, h, w]`."""
        base: Any = layer.base_layer
        bias: Any = layer.get_base_layer().bias
        parts = {name: tensor.to(x.dtype) for name, tensor in self.items()}
        if isinstance(layer.get_base_layer(), nn.Linear):
            return output_change(parts, x, lambda y: _without_bias(base(y.to(_dtype(layer))), bias))
        if is_product_per_pixel(layer.get_base_layer()):

            def product(y: Tensor) -> Tensor:
                return _without_bias(base(y.movedim(-1, 1).to(_dtype(layer))).movedim(1, -1), bias)

            return output_change(parts, x.movedim(1, -1), product).movedim(-1, 1)
        conv: Any = layer.get_base_layer()
        kernel = weight_change(dict(self.items()), conv.weight).to(x.dtype)
        change = nn.functional.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return change + parts["bias"][:, None, None] if "bias" in parts else change


class ChangeVariant(LoraVariant):
    """What PEFT calls for an adapter that is a change.

    Args:
        parts: the tensors of the change, whose shapes the parameters get.

    Attributes:
        fused: while the adapter is fused, what was added to the weight and the bias.
    """

    def __init__(self, parts: Mapping[str, Tensor]):
        self.parts = dict(parts)
        self.fused: tuple[Tensor, Tensor | None] | None = None

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Allocates the parameters; PEFT then loads them."""
        if not hasattr(module, PARTS):
            module.lora_change = nn.ModuleDict()
        if PARTS not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, PARTS)
        like = module.lora_A[adapter_name].weight
        empty = {name: nn.Parameter(like.new_zeros(x.shape)) for name, x in self.parts.items()}
        module.lora_change[adapter_name] = Change(empty)
        self.parts = {}

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The output with the change."""
        return result + module.scaling[active_adapter] * module.lora_change[active_adapter].output(x, module)

    @torch.no_grad()
    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Adds the change to the weight."""
        change, bias = self._change(module, active_adapter, orig_weight)
        orig_weight.data += change
        self._keep(module, change, bias)

    @torch.no_grad()
    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The weight with the change."""
        change, bias = self._change(module, active_adapter, orig_weight)
        self._keep(module, change, bias)
        return orig_weight + change

    @torch.no_grad()
    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Takes the change out of the weight."""
        assert self.fused is not None, "PEFT separates only what it has fused"
        (change, bias), self.fused = self.fused, None
        if bias is not None:
            module.get_base_layer().bias.data -= bias
        orig_weight.data -= change
        return orig_weight.data

    def _change(self, module: Any, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the adapter adds to the weight and the bias."""
        scale, parts = module.scaling[adapter_name], dict(module.lora_change[adapter_name].items())
        before = weight.float() - sum(_fused(module, name) for name in module.merged_adapters)
        change = (scale * weight_change(parts, before)).to(weight.dtype)
        bias = None
        if "bias" in parts:
            base = module.get_base_layer()
            if base.bias is None:
                raise ValueError(
                    f"adapter {adapter_name!r} adds a bias, so it cannot be fused with a layer that has none. Use it "
                    "unfused."
                )
            bias = (scale * parts["bias"]).to(base.bias.dtype)
        return change, bias

    def _keep(self, module: Any, change: Tensor, bias: Tensor | None) -> None:
        if bias is not None:
            module.get_base_layer().bias.data += bias
        self.fused = change, bias


class LinearWithChange(Linear):
    """PEFT's layer around a linear layer, so far without an adapter."""

    def __init__(self, base_layer: nn.Linear):
        nn.Module.__init__(self)  # PEFT's own would create the first adapter, before its parts are known
        LoraLayer.__init__(self, base_layer)
        self._active_adapter: list[str] = []
        self.fan_in_fan_out = self.is_target_conv_1d_layer = False


class Conv2dWithChange(Conv2d):
    """PEFT's layer around a convolution, so far without an adapter."""

    def __init__(self, base_layer: nn.Conv2d):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter: list[str] = []
        self._kernel_dim = 4
        self.conv_fn = nn.functional.conv2d


def is_product_per_pixel(conv: Any) -> bool:
    """Whether a convolution is a matrix product of each pixel."""
    return {*conv.kernel_size, *conv.stride, conv.groups} == {1} and set(conv.padding) == {0}


@torch.no_grad()
def for_model(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An adapter with what depends on the model: gains for magnitudes, empty factors, the axes of kernels.

    Args:
        state_dict: keys by layers of the model, `x.lora_A.weight`, `x.lora_change.diff` and the like.
        model: dense, quantized, or with other adapters, none of them fused.

    Raises:
        ValueError: DoRA of a weight with a zero row or column.
    """
    found, changes = dict(state_dict), _changes(state_dict)
    for name, parts in changes.items():
        base = _base(model, name)
        for part in parts:
            del found[f"{name}.{CHANGE}{part}"]
        try:
            parts = with_gains(parts, base.weight) if any("magnitude" in part for part in parts) else parts
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        found |= {f"{name}.{CHANGE}{part}": tensor for part, tensor in parts.items()}
        if f"{name}.lora_A.weight" not in found:
            outputs, inputs, *kernel = base.weight.shape
            groups = getattr(base, "groups", 1)
            if groups > 1:  # the form that `lora_layers.py` has for one change of all channels
                inputs, outputs = inputs * groups, 1
            dtype = next(iter(parts.values())).dtype
            found[f"{name}.lora_A.weight"] = torch.zeros((1, inputs, *kernel), dtype=dtype)
            found[f"{name}.lora_B.weight"] = torch.zeros((outputs, 1, *[1] * len(kernel)), dtype=dtype)
    for key, tensor in state_dict.items():
        name, ending, _ = key.partition(".lora_A.weight")
        if ending and tensor.ndim == 4 and name not in changes:
            base = _base(model, name)
            kernel = tuple(getattr(base, "kernel_size", (1, 1)))
            if kernel != (1, 1) and tuple(tensor.shape[2:]) == (1, 1) and tensor.shape[1] == base.weight[0].numel():
                found[key] = tensor.reshape(len(tensor), -1, *kernel)  # of LoHa and LoKr, which fold the kernel
    # diffusers takes a file for an old one whose first key is no factor.
    return dict(sorted(found.items(), key=lambda item: f".{CHANGE}" in item[0]))


def prepare_changes(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Prepares the layers of a model for an adapter with changes that PEFT is about to load.

    Args:
        model: dense, quantized or with other adapters.
        state_dict: from `for_model`.
        adapter_name: name of the adapter.
    """
    for name, parts in _changes(state_dict).items():
        layer: Any = model.get_submodule(name)
        if not isinstance(layer, LoraLayer):
            kind = LinearWithChange if isinstance(layer, nn.Linear) else Conv2dWithChange
            layer = kind(layer).train(layer.training)
            _replace(model, name, layer)
        layer.lora_variant[adapter_name] = ChangeVariant(parts)


def load_into_model(
    model: Any, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, adapter_name: str, prefix: str
) -> None:
    """Puts an adapter beside the layers of a model of diffusers or transformers.

    Args:
        model: dense or quantized.
        state_dict: from `convert_layers`, with the prefix.
        metadata: PEFT's fields.
        adapter_name: that no other adapter of the model has.
        prefix: of the keys.
    """
    plain = for_model({key.removeprefix(prefix): x for key, x in state_dict.items()}, model)
    ranks = {key.removesuffix(f".{DOWN}"): len(x) for key, x in plain.items() if key.endswith(f".{DOWN}")}
    fields = None if metadata is None else fields_of(metadata, prefix)
    alphas = {name: rank * lora_scale(fields, name, rank) for name, rank in ranks.items()}
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=list(ranks),
        use_dora=any(MAGNITUDE in key for key in plain),
        lora_bias=any(key.endswith(BIAS) for key in plain),
    )
    prepare_depthwise(model, plain, adapter_name)
    prepare_changes(model, plain, adapter_name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are no mistake
            inject_adapter_in_model(config, model, adapter_name, state_dict=plain)
        set_peft_model_state_dict(model, plain, adapter_name)
    finally:
        drop_unused_changes(model)
        drop_unused(model)
    model._hf_peft_config_loaded = True  # so that the hosts know of it, as of adapters that they load themselves


def drop_unused_changes(model: nn.Module) -> None:
    """Undoes `prepare_changes` where no adapter came, for example after a file that could not be loaded."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            for adapter_name in [name for name in layer.lora_variant if name not in layer.lora_A]:
                del layer.lora_variant[adapter_name]
        if isinstance(layer, LinearWithChange | Conv2dWithChange) and not layer.lora_A:
            _replace(model, name, layer.get_base_layer())


def for_hotswap(state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """An adapter with the keys that its parts of changes have in the model, as hot-swapping needs them.

    Raises:
        ValueError: the adapter in the model lacks one of the parts, for which PEFT would delete it; or it would
            become a DoRA.
    """
    if magnitude := next((key for key in state_dict if "lora_magnitude_vector" in key), None):
        raise ValueError(
            f"adapter {adapter_name!r} cannot be swapped for a DoRA: PEFT does not swap magnitudes, such as "
            f"{magnitude!r}. Load the file without `hotswap`, under another name."
        )
    for name, parts in _changes(state_dict).items():
        changes = getattr(model.get_submodule(name), PARTS, {})
        present = set(changes[adapter_name].keys()) if adapter_name in changes else set()
        if missing := sorted(parts.keys() - present):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be swapped for one of another kind: it has no {missing[0]!r} of "
                f"{name!r}. Load the file without `hotswap`, under another name."
            )
    return {key.replace(f".{CHANGE}", f".{CHANGE}{adapter_name}."): tensor for key, tensor in state_dict.items()}


@contextmanager
def all_or_none_fused(models: Sequence[nn.Module]) -> Iterator[None]:
    """If fusing fails in one layer, separates again what it has fused in the others."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [list(layer.merged_adapters) for layer in layers]
    try:
        yield
    except Exception:
        for layer, names in zip(layers, before, strict=True):
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        raise


def _changes(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> part -> tensor."""
    changes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        name, found, part = key.partition(f".{CHANGE}")
        if found:
            changes.setdefault(name, {})[part] = tensor
    return changes


def _base(model: nn.Module, name: str) -> Any:
    layer = model.get_submodule(name)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _without_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out - bias


def _dtype(layer: Any) -> torch.dtype:
    return layer.get_base_layer().weight.dtype


def _fused(layer: Any, adapter_name: str) -> Tensor:
    """What an adapter has added to the weight of a layer."""
    variant = layer.lora_variant.get(adapter_name)
    if isinstance(variant, ChangeVariant) and variant.fused is not None:
        return variant.fused[0]
    return layer.get_delta_weight(adapter_name)
