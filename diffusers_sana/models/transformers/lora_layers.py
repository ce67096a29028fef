"""LoRA of a depthwise convolution in all forms that trainers write.

For a grouped convolution PEFT supports one form of LoRA, whose rank must be a multiple of the number of groups, 11,200
in Sana. Trainers write other forms, so this layer derives the grouping from the factors.

For C channels, k x k positions and rank r:

    A `[r, C, k, k]`   B `[1, r, 1, 1]`     OneTrainer: one change, added to all channels
    A `[r, C, k, k]`   B `[C, r, 1, 1]`     kohya's rule: a dense convolution beside the depthwise one
    A `[r, C, k, k]`   B `[C, r/C, 1, 1]`   PEFT
    A `[C, 1, k, k]`   B `[C, 1, 1, 1]`     a change of the layer's own weights, as LoHa and LoKr have it

Imported only when PEFT is about to be used.
"""

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import Conv2d, LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from diffusers_sana._compat import warn_if_untested


warn_if_untested("peft")


class DepthwiseLora(Conv2d):
    """PEFT's layer around a depthwise convolution, with adapters of the forms above.

    Args:
        base_layer: the convolution.

    Attributes:
        forms: name of an adapter that is about to be loaded -> shapes of its A and B. PEFT passes only the rank.
    """

    def __init__(self, base_layer: nn.Conv2d):
        nn.Module.__init__(self)  # PEFT's own creates the first adapter, whose form is not known yet
        LoraLayer.__init__(self, base_layer)
        self._active_adapter: list[str] = []
        self._kernel_dim = 4
        self.conv_fn = nn.functional.conv2d
        self.forms: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: Any, **kwargs: Any) -> None:
        """Allocates an adapter in the form given in `forms`, or else in PEFT's form."""
        if adapter_name not in self.forms:
            super().update_layer(adapter_name, r, lora_alpha, **kwargs)
            return
        (rank, inputs, *kernel), (outputs, width, *_) = self.forms.pop(adapter_name)
        base: Any = self.get_base_layer()
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        options = {"device": base.weight.device, "dtype": base.weight.dtype, "bias": False}
        groups = base.in_channels // inputs, rank // width
        size = kernel[0], kernel[1]
        self.lora_A[adapter_name] = nn.Conv2d(
            base.in_channels, rank, size, padding=base.padding, groups=groups[0], **options
        )
        self.lora_B[adapter_name] = nn.Conv2d(rank, outputs, 1, groups=groups[1], **options)
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_bias[adapter_name] = self.use_dora[adapter_name] = False
        is_stabilized = getattr(kwargs.get("config"), "use_rslora", kwargs.get("use_rslora", False))
        self.use_rslora[adapter_name] = is_stabilized
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if is_stabilized else r)
        if adapter_name in self.lora_variant:  # no LoRA at all, see `loaders/lora/layers.py`
            self.lora_variant[adapter_name].init(self, adapter_name=adapter_name)
        self.set_adapter(self.active_adapters)

    def is_own_weight(self, adapter_name: str) -> bool:
        """Whether an adapter has the form of the layer's own weights and can be fused."""
        if adapter_name in self.lora_variant:
            return True
        down, up = self._weights(adapter_name)
        return down.shape[1] == up.shape[1] == 1

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weights `[C, 1, k, k]`, for an adapter that can be fused."""
        down, up = self._weights(adapter)
        return down * up * self.scaling[adapter]

    def _weights(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        down: Any = self.lora_A[adapter_name]
        up: Any = self.lora_B[adapter_name]
        return down.weight, up.weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuses adapters.

        Raises:
            ValueError: an adapter that depthwise weights cannot express, or with `safe_merge` one with non-finite
                values.
        """
        base: Any = self.get_base_layer()
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if unfusable := [name for name in names if not self.is_own_weight(name)]:
            raise ValueError(cannot_fuse(unfusable[0]))
        for name in names:
            if name in self.lora_variant:
                changed = self.lora_variant[name].merge_safe(self, name, base.weight.data)
            else:
                changed = base.weight.data + self.get_delta_weight(name).to(base.weight.dtype)
            if safe_merge and not changed.isfinite().all():
                raise ValueError(f"adapter {name!r} must be finite to be fused, got NaN or infinity.")
            base.weight.data = changed
            self.merged_adapters.append(name)


def cannot_fuse(adapter_name: str) -> str:
    """The error message for an adapter that cannot be fused."""
    return (
        f"adapter {adapter_name!r} mixes the channels of a depthwise convolution (`ff.conv_depth`), which the layer's "
        "weights cannot express, so it cannot be fused. Use it unfused, or train without that layer."
    )


def check_can_be_fused(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Checks that all adapters can be fused, before the first one is.

    Args:
        model: with adapters.
        adapter_names: which; None for the active ones.

    Raises:
        ValueError: naming one that cannot be fused.
    """
    for layer in model.modules():
        if isinstance(layer, DepthwiseLora):
            for name in adapter_names or layer.active_adapters:
                if name in layer.lora_A and name not in layer.merged_adapters and not layer.is_own_weight(name):
                    raise ValueError(cannot_fuse(name))


def prepare_depthwise(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Prepares the depthwise convolutions of a model for an adapter that PEFT is about to load.

    Args:
        model: dense, quantized or with other adapters.
        state_dict: `<layer>.lora_A.weight` and `<layer>.lora_B.weight` with matching shapes.
        adapter_name: name of the adapter.

    Raises:
        ValueError: factors of an unknown form; or the convolution already has another adapter, in a PEFT layer that
            does not support this form.
    """
    for key, down in state_dict.items():
        name, ending, _ = key.partition(".lora_A.weight")
        if not ending:
            continue
        layer: Any = model.get_submodule(name)
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if not isinstance(base, nn.Conv2d) or base.groups == 1:
            continue
        form = tuple(down.shape), tuple(state_dict[f"{name}.lora_B.weight"].shape)
        rank, channels = form[0][0], base.out_channels
        sides = form[0][1], *form[1][:2]
        known = {(channels, 1, rank), (channels, channels, rank), (channels, channels, rank // channels)}
        if sides not in known | ({(1, channels, 1)} if rank == channels else set()):
            raise ValueError(
                f"{key!r} must have one of the forms of LoRA for a depthwise convolution of {channels} channels, got "
                f"factors of the shapes {[list(shape) for shape in form]}."
            )
        if not isinstance(layer, LoraLayer):
            layer = DepthwiseLora(base).train(base.training)
            _replace(model, name, layer)
        elif not isinstance(layer, DepthwiseLora):  # added by PEFT, in training or by another pipeline
            if sides[1:] == (channels, rank // channels):
                continue
            raise ValueError(
                f"{name!r} has an adapter that this pipeline did not load, next to which this LoRA cannot be loaded. "
                "Load this one first, or delete the other."
            )
        layer.forms[adapter_name] = form


def drop_unused(model: nn.Module) -> None:
    """Restores convolutions whose wrappers have no adapter, for example after a file that could not be loaded."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DepthwiseLora):
            layer.forms.clear()
            if not layer.lora_A:
                _replace(model, name, layer.get_base_layer())


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
