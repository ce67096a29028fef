"""A model with quantized layers as writers take it: its layers one at a time, and all other tensors."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.loaders.quantized.layer import UnpackedLayer, stack_rows
from diffusers_sana.loaders.quantized.names import Scheme, file_names
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantConv2d, SVDQuantLayer
from diffusers_sana.quantizers.svdquant.targets import sibling_groups


logger = logging.getLogger(__name__)


@dataclass
class Written:
    """What a writer wants on disk.

    Attributes:
        tensors: by key.
        config: of the config.json; None for formats whose files stand alone.
        metadata: of the header of the safetensors file.
        extra: further JSON files, by name.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class QuantizedModel:
    """The content of a model that this package quantized or loaded.

    Args:
        model: of diffusers, with quantized layers and without adapters.
        takes_rotated: whether the format can hold a rotated 4-bit layer; by default it can hold none.

    Attributes:
        layers: our layers, by name.
        tensors: all that are not of these layers, by key.
        dtype: of the model.
        config: of the model, without `quantization_config`.
        class_name: of its class in diffusers.

    Raises:
        ValueError: no quantized layers, or adapters.
    """

    def __init__(self, model: nn.Module, takes_rotated: Callable[[UnpackedLayer], bool] | None = None) -> None:
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)}
        if not self.layers:
            raise ValueError(f"`model` must have layers quantized by SVDQuant, but {type(model).__name__} has none.")
        if getattr(model, "peft_config", None):
            raise ValueError("`model` must have no adapters. Fuse or unload them first.")
        self.config: dict[str, Any] = json.loads(model.to_json_string())  # type: ignore[operator]
        self.config.pop("quantization_config", None)
        self.class_name = type(model).__name__
        self.dtype = next(iter(self.layers.values())).proj_up.dtype
        self.tensors = {
            key: tensor.detach()
            for key, tensor in model.state_dict().items()
            if key.rpartition(".")[0] not in self.layers
        }
        self._rounded: dict[str, UnpackedLayer] = {}
        self._takes_rotated = takes_rotated

    @property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """The 16-bit tensors of each module by their last names; quantized layers have none."""
        modules: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        for key, tensor in self.tensors.items():
            name, _, leaf = key.rpartition(".")
            modules.setdefault(name, {})[leaf] = tensor
        return modules

    def layer(self, name: str) -> UnpackedLayer:
        """One layer in natural order.

        Raises:
            ValueError: it is rotated and in 4 bits, and the format cannot hold it.
        """
        if name in self._rounded:
            return self._rounded[name]
        if self.is_refused(name):
            raise ValueError(
                f"{name!r} is rotated, which the format cannot express for this layer. Quantize the original model "
                'with `rotation="none"`, or allow rounding once more with `requantize`.'
            )
        return UnpackedLayer.of(self.layers[name])

    def is_refused(self, name: str) -> bool:
        """Whether a layer is rotated and in 4 bits, and the format cannot hold it."""
        layer = self.layers[name]
        if layer.rotation is None or layer.precision == "int8":
            return False
        return self._takes_rotated is None or not self._takes_rotated(UnpackedLayer.of(layer))

    def matrix(self, name: str) -> Tensor:
        """The weight that a layer represents, fp32 `[N, K]`."""
        return self._rounded[name].matrix() if name in self._rounded else self.layers[name].dequantize(torch.float32)

    def requantize_rotated(self) -> None:
        """Requantizes refused layers without rotation; a warning states the error."""
        names = list(filter(self.is_refused, self.layers))
        self._requantize(sibling_groups(dict.fromkeys(names, "w4a4")), None)

    def is_weight_only(self, name: str) -> bool:
        """Whether activations of a layer stay in 16 bit."""
        return self.layers[name].is_weight_only

    def is_convolution(self, name: str) -> bool:
        """Whether a layer is a 1x1 convolution."""
        return isinstance(self.layers[name], SVDQuantConv2d)

    def dense(self, name: str) -> dict[str, Tensor]:
        """The tensors of a layer in 16 bits: `weight`, and `bias` where it has one."""
        weight, bias = self.matrix(name).to(self.dtype), self.layers[name].bias
        tensors = {"weight": weight[:, :, None, None] if self.is_convolution(name) else weight}
        return tensors if bias is None else tensors | {"bias": bias.detach().to(self.dtype)}

    def check_dtype(self, *dtypes: torch.dtype, format_name: str) -> None:
        """Raises ValueError if a format cannot hold the model's dtype."""
        if self.dtype not in dtypes:
            raise ValueError(
                f"{format_name} holds tensors in {' or '.join(map(str, dtypes))}, got a model in {self.dtype}. Load "
                "it with `dtype=torch.bfloat16`."
            )

    def common_rank(self, names: list[str], multiple: int) -> int:
        """The smallest rank that all these layers can have, a positive multiple of `multiple`."""
        return -(-max([1, *(self.layer(name).rank for name in names)]) // multiple) * multiple

    def usual_precision(self, names: Iterable[str]) -> str:
        """The format that most of the named layers have, among those in 4 bits; "int4" if there are none."""
        counts = Counter(self.layers[name].precision for name in names)
        return max(("int4", "nvfp4"), key=counts.__getitem__)

    def convert_precision(
        self, names: list[str], precision: str, requantize: bool, format_name: str, scheme: Scheme | None = None
    ) -> None:
        """Requantizes those of the named layers that a file cannot hold as they are, if that is allowed.

        They are in another format, or are fused in the file and have different smoothing factors. Their weights are
        decomposed again, without data: that adds an error, which a warning states.

        Args:
            names: of layers that the file has in 4 bits.
            precision: the file's.
            requantize: whether it is allowed.
            format_name: for messages.
            scheme: names in the file.

        Raises:
            ValueError: there are such layers and `requantize` is False.
        """
        known = set(names)
        fused = [group for group in file_names(self.modules, scheme or {}).values() if known.issuperset(group)]
        groups = [group for group in fused if len(group) > 1]
        alone = [name for name in names if not any(name in group for group in groups)]
        wrong = [
            group
            for group in groups + sibling_groups(dict.fromkeys(alone, "w4a4"))
            if self._must_change(group, precision, group in groups)
        ]
        if not wrong:
            return
        if not requantize:
            raise ValueError(
                f"{format_name} cannot hold {sum(map(len, wrong))} layers as they are, such as {wrong[0][0]!r}: it "
                f"needs {precision}, and fused layers with one set of smoothing factors. Quantize the model to "
                f"{precision}, or allow rounding once more with `requantize`."
            )
        self._requantize(wrong, precision)

    def _requantize(self, groups: Iterable[list[str]], precision: str | None) -> None:
        """Decomposes groups of layers with one input again, by default in their own format."""
        errors: dict[str, float] = {}
        for group in groups:
            layers, weights = [self.layers[name] for name in group], [self.matrix(name) for name in group]
            mode = "w4a16" if layers[0].is_weight_only else "w4a4"
            config = LayerConfig(precision or layers[0].precision, max(layer.rank for layer in layers), mode=mode)
            quantized, _ = decompose([weight.to(self.dtype) for weight in weights], config)
            for name, layer, weight, fitted in zip(group, layers, weights, quantized, strict=True):
                self._rounded[name] = UnpackedLayer.of_weight(fitted, layer.bias, layer.is_weight_only)
                errors[name] = ((self.matrix(name) - weight).norm() / weight.norm()).item()
        if errors:
            worst = max(errors, key=errors.__getitem__)
            logger.warning(
                f"{len(errors)} layers were rounded once more, to {precision or 'be without rotation'}; the relative "
                f"error of the weights is at most {errors[worst]:.3f} ({worst})."
            )

    def _must_change(self, group: list[str], precision: str, is_fused: bool) -> bool:
        items = [self.layer(name) for name in group]
        has_other = any(item.precision != precision for item in items)
        return has_other or (is_fused and not all(torch.equal(item.smooth, items[0].smooth) for item in items))

    def in_file(
        self, scheme: Scheme, is_quantized: Callable[[str], bool]
    ) -> Iterator[tuple[str, UnpackedLayer | dict[str, Tensor]]]:
        """All content under the names of a file: a layer, or the 16-bit tensors of a module by their last names.

        Args:
            scheme: names in the file.
            is_quantized: whether the file has 4 bits for a layer; otherwise it is written in 16 bits.
        """
        modules = self.modules
        for place, members in file_names(modules, scheme).items():
            quantized = [name in self.layers and is_quantized(name) for name in members]
            if all(quantized):
                parts = [self.layer(name) for name in members]
                yield place, parts[0] if len(parts) == 1 else stack_rows(parts, place)
                continue
            dense = [self.dense(name) if name in self.layers else modules[name] for name in members]
            if any(part.keys() != dense[0].keys() for part in dense):
                raise ValueError(f"{place!r} cannot be fused: some of {members} have a bias, others do not.")
            yield (
                place,
                dense[0]
                if len(dense) == 1
                else {leaf: torch.cat([part[leaf] for part in dense]) for leaf in dense[0]},
            )


def refuse_layers(model: QuantizedModel, names: Mapping[str, str], format_name: str) -> None:
    """Raises ValueError if there are layers that a format cannot express, each with the reason."""
    if names:
        name, reason = next(iter(names.items()))
        raise ValueError(
            f"{format_name} cannot express {len(names)} of the {len(model.layers)} quantized layers, such as "
            f"{name!r}: {reason}."
        )
