"""SVDQuant in `from_pretrained` and `save_pretrained` of diffusers.

Each weight of a 16-bit folder is quantized when it arrives, so that the 16-bit model is never in memory as a whole. A
quantized folder is loaded as it is.
"""

import re
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from torch import Tensor, nn

from diffusers_sana._compat import warn_if_untested
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.integrations import checkpoint
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer
from diffusers_sana.quantizers.svdquant.layers.lora import enable_weight_lookup
from diffusers_sana.quantizers.svdquant.targets import find_targets


warn_if_untested("accelerate")


class SVDQuantQuantizer(DiffusersQuantizer):
    """The hooks that `from_pretrained` of a diffusers model calls; see `DiffusersQuantizer`.

    Args:
        quantization_config: how. For on-the-fly quantization it is copied, and the copy lists the quantized layers.
        pre_quantized: whether the checkpoint is already quantized.
    """

    is_serializable = True  # plain tensors
    is_trainable = True  # gradients flow through to adapters
    is_compileable = True  # as a whole graph
    use_keep_in_fp32_modules = True
    quantization_config: SVDQuantConfig

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._targets: dict[str, str] = {}  # on the fly: layers whose weight has not been loaded yet
        self._bar: Any = None

    def validate_environment(self, torch_dtype: Any = None, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for requests that are not supported; see `checkpoint.check_request`."""
        checkpoint.check_request(self.quantization_config, self.pre_quantized, device_map)
        if isinstance(torch_dtype, torch.dtype) and torch_dtype not in checkpoint.FULL_DTYPES:
            raise ValueError(
                f"`dtype` must be one of {checkpoint.FULL_DTYPES}, that of scales, low-rank branch and layers "
                f"that are not quantized, got {torch_dtype}."
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:  # `from_single_file`, which does not tell quantized files from others
            self.pre_quantized = any(name.endswith(".qweight") for name in state_dict)
        elif self.pre_quantized:
            checkpoint.check_layout(self.quantization_config)
        if self.pre_quantized:
            checkpoint.insert_empty_layers(model, self.quantization_config)
        else:
            self._targets = find_targets(model, self.quantization_config)
            self.quantization_config = checkpoint.recorded_config(self.quantization_config, model, self._targets)
            self._bar = logging.tqdm(total=len(self._targets), desc="Quantizing", unit="layer")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None  # it cannot be copied with the model
        if self._targets:
            raise checkpoint.missing_tensors([f"{name}.weight" for name in self._targets])
        checkpoint.check_layers(model)
        self._mark(model)

    def mark_quantized(self, model: Any) -> None:
        """Sets on a model that was quantized in memory what `from_pretrained` sets on a loaded one."""
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.hf_quantizer = self
        self._mark(model)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Without `dtype`, a quantized model is loaded in the dtype in which it was saved."""
        saved = self.quantization_config.dtype if self.pre_quantized else None
        return getattr(torch, saved) if torch_dtype is None and saved is not None else torch_dtype

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """For `save_pretrained`; raises ValueError for unfused adapters."""
        checkpoint.check_no_adapters(state_dict)
        return state_dict, {}

    def _mark(self, model: Any) -> None:
        self.quantization_config = checkpoint.recorded_config(self.quantization_config, model)
        model.register_to_config(quantization_config=self.quantization_config)
        # fp8 storage is for 16-bit layers: quantized ones are already smaller, and their bits must not be cast.
        names = [name for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)]
        patterns = [f"^{re.escape(name)}$" for name in names]
        model._skip_layerwise_casting_patterns = [*(model._skip_layerwise_casting_patterns or []), *patterns]
        enable_weight_lookup(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` handles the tensor."""
        if self.pre_quantized:
            return checkpoint.layer_of(model, param_name)[0] is not None
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and name in self._targets

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Called where the shape is not the expected one; raises ValueError if it is not supported."""
        checkpoint.check_tensor(param_name, current_param, tuple(loaded_param.shape), loaded_param.dtype)
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Quantizes a weight, or sets a tensor of a quantized layer."""
        layer, leaf = checkpoint.layer_of(model, param_name)
        if layer is not None:
            # `param_value` may already be cast; the file has the original dtype.
            shape, original = tuple(param_value.shape), state_dict[param_name]
            checkpoint.check_tensor(param_name, getattr(layer, leaf), shape, original.dtype)
            keeps_dtype = leaf == "wscales" and layer.wscales.dim() == 1
            value = original if keeps_dtype else param_value
            setattr(layer, leaf, nn.Parameter(value.to(target_device), requires_grad=False))
            return
        name = param_name.rpartition(".")[0]
        mode = self._targets.pop(name)
        checkpoint.quantize_weight(model, name, param_value.to(target_device), mode, self.quantization_config)
        self._bar.update()

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ValueError for parameters without a value, because diffusers does not initialize quantized models."""
        parameters = dict(model.named_parameters())
        if missing := [name for name in missing_keys if name in parameters]:
            raise checkpoint.missing_tensors(missing)
        return missing_keys

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """For `device_map="auto"`: the bits of weights to be quantized; quantized tensors have their true sizes."""
        if self.pre_quantized:
            return torch_dtype
        return torch.int8 if self.quantization_config.precision == "int8" else CustomDtype.INT4

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """For `device_map="auto"`: dtypes of parameters that are not quantized on the fly."""
        parameters = model.named_parameters()
        return {name: value.dtype for name, value in parameters if name.removesuffix(".weight") not in self._targets}

    def get_cuda_warm_up_factor(self) -> int:
        """Roughly the ratio of the number of elements to that of 16-bit numbers in the same memory."""
        return 2 if self.pre_quantized or self.quantization_config.precision == "int8" else 4

    @property
    def supports_parallel_loading(self) -> bool:
        """Layers are replaced one at a time."""
        return self.pre_quantized
