"""SVDQuant in `from_pretrained` and `save_pretrained` of transformers, for text encoders; see `diffusers.py`."""

from typing import Any

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from diffusers_sana._compat import ConversionOps
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.integrations import checkpoint
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer
from diffusers_sana.quantizers.svdquant.targets import find_targets
from diffusers_sana.saving import check_saveable


class SVDQuantTransformersQuantizer(HfQuantizer):
    """The hooks that `from_pretrained` of a transformers model calls; see `HfQuantizer`.

    Args:
        quantization_config: how. For on-the-fly quantization it is copied, and the copy lists the quantized layers.
        pre_quantized: whether the checkpoint is already quantized.
    """

    is_trainable = True  # gradients flow through to adapters
    is_compileable = True  # as a whole graph
    quantization_config: SVDQuantConfig

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: dict[str, str] = {}  # on the fly: layers whose weight has not been loaded yet

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for requests that are not supported; see `checkpoint.check_request`."""
        checkpoint.check_request(self.quantization_config, self.pre_quantized, device_map)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            checkpoint.check_layout(self.quantization_config)
            checkpoint.insert_empty_layers(model, self.quantization_config)
            for name, module in model.named_modules():
                if isinstance(module, SVDQuantLayer):
                    _skip_initialization(model, name)
            checkpoint.check_files(model, checkpoint_files or [])
        else:
            self.targets = find_targets(model, self.quantization_config)
            self.quantization_config = checkpoint.recorded_config(self.quantization_config, model, self.targets)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
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
        if not self.pre_quantized:  # which layers are rotated is known only now
            self.quantization_config = checkpoint.recorded_config(self.quantization_config, model)
            model.config.quantization_config = self.quantization_config

    def mark_quantized(self, model: Any) -> None:
        """Sets on a model that was quantized in memory what `from_pretrained` sets on a loaded one."""
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        model.config._is_quantized = True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """For `save_pretrained`; raises ValueError for adapters beside the layers, but for those it saves alone."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            check_saveable(model, type(model).__name__)
        return super().get_state_dict_and_metadata(model)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether `QuantizeWeight` handles the tensor; in a quantized checkpoint, whether its shape may differ."""
        name, _, leaf = param_name.rpartition(".")
        if self.pre_quantized:
            return leaf in ("proj_down", "proj_up") and checkpoint.layer_of(model, param_name)[0] is not None
        return leaf == "weight" and name in self.targets

    def get_quantize_ops(self) -> "QuantizeWeight":
        """The conversion of a weight to a quantized layer."""
        return QuantizeWeight(self)

    @property
    def quantized_element_size(self) -> float | None:
        """For `device_map="auto"`: the bytes of weights to be quantized; quantized tensors have their true sizes."""
        if self.pre_quantized:
            return None
        return 1.0 if self.quantization_config.precision == "int8" else 0.5

    def is_serializable(self) -> bool:
        """The tensors are plain."""
        return True


class QuantizeWeight(ConversionOps):
    """Quantizes a weight when it arrives, and replaces the layer."""

    def __init__(self, quantizer: SVDQuantTransformersQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Consumes the one weight in `input_dict`; returns no tensors to set."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.rpartition(".")[0]
        mode = self.quantizer.targets.pop(name)
        layer = checkpoint.quantize_weight(model, name, weight, mode, self.quantizer.quantization_config)
        kwargs["missing_keys"].discard(full_layer_name)
        _skip_initialization(model, name)
        for parameter in layer.parameters():
            if not parameter.is_meta:  # a bias that is loaded later
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        return {}


def _skip_initialization(model: nn.Module, name: str) -> None:
    """Tells transformers not to initialize a layer, nor its parent, which may initialize its children.

    Initialization would read the weight, which is computed at each access.
    """
    for module in (model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])):
        module._is_hf_initialized = True  # type: ignore[assignment]
