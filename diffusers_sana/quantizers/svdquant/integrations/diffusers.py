"""SVDQuant in diffusers' `from_pretrained` and `save_pretrained`.

With a 16-bit folder each weight is quantized when it arrives, so that the 16-bit model is never in memory as a whole.
A quantized folder is loaded as it is. `attach` makes a model that was quantized in memory one that can be saved.
"""

import re
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.integrations import checkpoint
from diffusers_sana.quantizers.svdquant.integrations.transformers import SVDQuantTransformersQuantizer
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer
from diffusers_sana.quantizers.svdquant.layers.lora import answer_for_weights
from diffusers_sana.quantizers.svdquant.quantize_model import recorded_config
from diffusers_sana.quantizers.svdquant.targets import find_targets


class SVDQuantQuantizer(DiffusersQuantizer):
    """What `from_pretrained` of a diffusers model calls, step by step; see `DiffusersQuantizer`.

    Args:
        quantization_config: how. On the fly it is copied, and the copy lists the layers that were quantized.
        pre_quantized: whether the checkpoint is quantized already.
    """

    use_keep_in_fp32_modules = True
    quantization_config: SVDQuantConfig

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._targets: dict[str, str] = {}  # on the fly: layers whose weight has not arrived yet
        self._bar: Any = None

    def validate_environment(self, torch_dtype: Any = None, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for what cannot be done; see `checkpoint.check_request`."""
        checkpoint.check_request(self.quantization_config, self.pre_quantized, device_map)
        if isinstance(torch_dtype, torch.dtype) and torch_dtype not in checkpoint.FULL_DTYPES:
            raise ValueError(
                f"`torch_dtype` must be one of {checkpoint.FULL_DTYPES}, that of scales, low-rank branch and layers "
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
            checkpoint.insert_placeholders(model, self.quantization_config)
        else:
            self._targets = find_targets(model, self.quantization_config)
            self.quantization_config = recorded_config(self.quantization_config, model, self._targets)
            self._bar = logging.tqdm(total=len(self._targets), desc="Quantizing", unit="layer")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None  # it cannot be copied with the model
        if self._targets:
            raise checkpoint.missing_tensors([f"{name}.weight" for name in self._targets])
        checkpoint.check_layers(model)
        self._mark(model)

    def attach(self, model: Any) -> None:
        """What `from_pretrained` does to a quantized model, for one that was quantized in memory."""
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.hf_quantizer = self
        self._mark(model)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """A quantized model without a dtype given is loaded in its own."""
        own = self.quantization_config.dtype if self.pre_quantized else None
        return getattr(torch, own) if torch_dtype is None and own is not None else torch_dtype

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """For `save_pretrained`; raises ValueError for adapters beside the layers."""
        checkpoint.check_no_adapters(state_dict)
        return state_dict, {}

    def _mark(self, model: Any) -> None:
        self.quantization_config = recorded_config(self.quantization_config, model)
        model.register_to_config(quantization_config=self.quantization_config)
        # Storage in fp8 is for 16-bit layers: ours are smaller already, and their bits are not numbers to cast.
        names = [name for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)]
        own = [f"^{re.escape(name)}$" for name in names]
        model._skip_layerwise_casting_patterns = [*(model._skip_layerwise_casting_patterns or []), *own]
        answer_for_weights(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor goes to `create_quantized_param`."""
        if self.pre_quantized:
            return checkpoint.layer_of(model, param_name)[0] is not None
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and name in self._targets

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Raises ValueError for a shape that cannot be; called where it is not the expected one."""
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
        """Quantizes a weight, or puts a tensor of a quantized layer in its place."""
        layer, leaf = checkpoint.layer_of(model, param_name)
        if layer is not None:
            # The dtype is that of the file; `param_value` may be cast already.
            shape, dtype = tuple(param_value.shape), state_dict[param_name].dtype
            checkpoint.check_tensor(param_name, getattr(layer, leaf), shape, dtype)
            setattr(layer, leaf, nn.Parameter(param_value.to(target_device), requires_grad=False))
            return
        name = param_name.rpartition(".")[0]
        mode = self._targets.pop(name)
        checkpoint.quantize_weight(model, name, param_value.to(target_device), mode, self.quantization_config)
        self._bar.update()

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ValueError for parameters without a value: under quantization nobody would initialize them."""
        parameters = dict(model.named_parameters())
        if missing := [name for name in missing_keys if name in parameters]:
            raise checkpoint.missing_tensors(missing)
        return missing_keys

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """For `device_map="auto"`: 4 bits for weights to come; a quantized model's tensors have their true sizes."""
        return torch_dtype if self.pre_quantized else CustomDtype.INT4

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """For `device_map="auto"`: what is not quantized, or is already."""
        parameters = model.named_parameters()
        return {name: value.dtype for name, value in parameters if name.removesuffix(".weight") not in self._targets}

    def get_cuda_warm_up_factor(self) -> int:
        """By what the number of all elements is divided to give that of 16-bit numbers in the same memory, about."""
        return 2 if self.pre_quantized else 4

    @property
    def supports_parallel_loading(self) -> bool:
        """Layers are replaced one at a time."""
        return self.pre_quantized

    @property
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


def attach(model: nn.Module, config: SVDQuantConfig) -> None:
    """Lets both libraries know that a model's layers were quantized in memory, so that it can be saved and loaded.

    Args:
        model: of diffusers or transformers, after `quantize_layers`.
        config: which `quantize_layers` returned.
    """
    cls = SVDQuantQuantizer if isinstance(model, ConfigMixin) else SVDQuantTransformersQuantizer
    cls(config, pre_quantized=True).attach(model)  # type: ignore[arg-type]
