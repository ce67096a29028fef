"""SVDQuant in transformers' `from_pretrained` and `save_pretrained`, for text encoders; see `quantizer.py`."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from diffusers_sana._compat import ConversionOps
from diffusers_sana.quantizers.svdquant.algorithm.decompose import QuantizedWeight
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.integrations import checkpoint
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer
from diffusers_sana.quantizers.svdquant.quantize_model import recorded_config
from diffusers_sana.quantizers.svdquant.targets import find_targets


TENSORS = {item.name for item in fields(QuantizedWeight)}


class SVDQuantTransformersQuantizer(HfQuantizer):
    """What `from_pretrained` of a transformers model calls, step by step; see `HfQuantizer`.

    Args:
        quantization_config: how. On the fly it is copied, and the copy lists the layers that were quantized.
        pre_quantized: whether the checkpoint is quantized already.
    """

    quantization_config: SVDQuantConfig

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: dict[str, str] = {}  # on the fly: layers whose weight has not arrived yet

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for what cannot be done; see `checkpoint.check_request`."""
        checkpoint.check_request(self.quantization_config, self.pre_quantized, device_map)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            checkpoint.check_layout(self.quantization_config)
            checkpoint.insert_placeholders(model, self.quantization_config)
            for name, module in model.named_modules():
                if isinstance(module, SVDQuantLayer):
                    _skip_initialization(model, name)
        else:
            self.targets = find_targets(model, self.quantization_config)
            self.quantization_config = recorded_config(self.quantization_config, model, self.targets)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.targets:
            raise checkpoint.missing_tensors([f"{name}.weight" for name in self.targets])
        missing = [
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            if isinstance(module, SVDQuantLayer)
            for leaf, parameter in module.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)  # which transformers sets on what it loads
        ]
        if missing:
            raise checkpoint.missing_tensors(missing)
        checkpoint.check_layers(model)

    def attach(self, model: Any) -> None:
        """What `from_pretrained` does to a quantized model, for one that was quantized in memory."""
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        model.config._is_quantized = True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether `QuantizeWeight` gets the tensor; of a quantized checkpoint, whether its shape is free."""
        name, _, leaf = param_name.rpartition(".")
        if self.pre_quantized:
            return leaf in ("proj_down", "proj_up") and checkpoint.layer_of(model, param_name)[0] is not None
        return leaf == "weight" and name in self.targets

    def get_quantize_ops(self) -> "QuantizeWeight":
        """What turns a weight into a quantized layer."""
        return QuantizeWeight(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype for a tensor of a quantized checkpoint; raises ValueError for one of another kind."""
        name = converter.target_patterns[0]
        if dtype is None or name.rpartition(".")[2] not in TENSORS:
            return super().get_new_dtype(converter, param, dtype)
        shape = tuple(param.get_shape() if hasattr(param, "get_shape") else param.shape)
        checkpoint.check_tensor(name, torch.empty(shape, dtype=dtype, device="meta"), shape, param[:0].dtype)
        return dtype

    @property
    def quantized_element_size(self) -> float | None:
        """For `device_map="auto"`: 4 bits for weights to come; a quantized model's tensors have their true sizes."""
        return None if self.pre_quantized else 0.5

    def is_serializable(self) -> bool:
        """Yes: plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: gradients flow through to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes, as a whole graph."""
        return True


class QuantizeWeight(ConversionOps):
    """Quantizes a weight when it arrives, and puts the layer in its place."""

    def __init__(self, quantizer: SVDQuantTransformersQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Takes the one weight in `input_dict`; leaves nothing to be set."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.rpartition(".")[0]
        mode = self.quantizer.targets.pop(name)
        layer = checkpoint.quantize_weight(model, name, weight, mode, self.quantizer.quantization_config)
        kwargs["missing_keys"].discard(full_layer_name)
        _skip_initialization(model, name)
        for parameter in layer.parameters():
            if not parameter.is_meta:  # a bias that has yet to come
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        return {}


def _skip_initialization(model: nn.Module, name: str) -> None:
    """Tells transformers that it need not initialize a layer, nor its parent, as some do for their children.

    It would read the weight for that, which is computed at each reading.
    """
    for module in (model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])):
        module._is_hf_initialized = True  # type: ignore[assignment]
