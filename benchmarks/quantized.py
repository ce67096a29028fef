"""What the two studies of quantization share: the variants of SVDQuant, the peers, and models with outliers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.kernels.cpu.int8_linear import is_prepared
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.calibrate import collect_statistics
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer, replace_layer
from diffusers_sana.quantizers.svdquant.targets import find_targets, layer_groups


# Each adds one thing to the one before; "naive" is plain rounding in groups.
ABLATIONS: dict[str, dict[str, Any]] = {
    "naive": {"rank": 0, "smoothing": "none"},
    "smoothing only": {"rank": 0},
    "low rank only": {"smoothing": "none"},
    "svdquant": {},
    "svdquant + gptq": {"gptq": True},
}


def config_for(ablation: str, precision: str = "int4", **changes: Any) -> SVDQuantConfig:
    """The configuration of one variant."""
    return SVDQuantConfig(precision=precision, **(ABLATIONS[ablation] | changes))


def quantize_on(model: nn.Module, config: SVDQuantConfig, run: Callable[[], Any]) -> None:
    """Quantizes a model that has no pipeline, calibrated by what `run` puts through it."""
    groups = layer_groups("model", model, find_targets(model, config))
    layers = {group.names[0]: group.layers[0] for group in groups}
    with_hessian = [group.names[0] for group in groups if config.for_layer(group.mode).uses_hessian]
    statistics = collect_statistics(run, layers, layers, with_hessian)
    for group in groups:
        inputs = statistics.pop(group.names[0]).tensors()
        weights, _ = decompose(group.weights, config.for_layer(group.mode), **inputs)
        for name, weight in zip(group.names, weights, strict=True):
            replace_layer(model, name, weight, group.mode, config.compute_mode)


def add_outliers(
    model: nn.Module, fraction: float = 0.01, low: float = 10.0, high: float = 30.0, seed: int = 0
) -> None:
    """Scales some input channels of every linear layer and 1x1 convolution in the blocks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            is_pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
            if "transformer_blocks." in name and (isinstance(module, nn.Linear) or is_pointwise):
                channels = module.weight.shape[1]
                chosen = torch.randperm(channels, generator=generator)[: max(1, round(fraction * channels))]
                factors = low + (high - low) * torch.rand(len(chosen), generator=generator)
                shape = [-1] + [1] * (module.weight.ndim - 2)
                module.weight[:, chosen] *= factors.view(shape).to(module.weight.dtype)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, through tensor subclasses."""

    def size(tensor: Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.nbytes

    return sum(size(tensor) for tensor in [*model.parameters(), *model.buffers()])


def resident_bytes(model: nn.Module) -> int:
    """Bytes with what our layers keep beside their parameters: the 8-bit copies of w4a8 on a CPU."""
    extra = 0
    for module in model.modules():
        if isinstance(module, SVDQuantLayer) and is_prepared(module.qweight):
            extra += 2 * module.qweight.numel()
    return tensor_bytes(model) + extra


# The peers' own choice of layers, with their 1x1 convolutions; nothing outside of the blocks.
def _quanto(kind: str) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        from optimum.quanto import freeze, qint4, qint8, quantize

        quantize(model.transformer_blocks, weights={"int4": qint4, "int8": qint8}[kind])
        freeze(model.transformer_blocks)
        return model

    return apply


def _sdnq(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        quantized = sdnq_post_load_quant(model, quant_conv=True, **options)
        return quantized[0] if isinstance(quantized, tuple) else quantized

    return apply


def _torchao() -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        quantize_(model.transformer_blocks, PrototypeInt4WeightOnlyConfig(group_size=64))
        return model

    return apply


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quanto int4": _quanto("int4"),
    "sdnq int4": _sdnq(weights_dtype="int4"),
    "sdnq int4 + svd": _sdnq(weights_dtype="int4", use_svd=True),
    # By its defaults it leaves small layers alone, which in the bundled checkpoint are most.
    "sdnq int4 + svd, small layers too": _sdnq(
        weights_dtype="int4", use_svd=True, minimum_allowed_numel=0, minimum_allowed_channel_size=0
    ),
    "torchao int4": _torchao(),
}


def with_peer(model: nn.Module, name: str, inputs: dict[str, Any]) -> nn.Module | str:
    """A copy of the model quantized by a peer, or why that, or a run of it with `inputs`, failed here."""
    try:
        quantized = PEERS[name](copy.deepcopy(model))
        with torch.no_grad():
            quantized(**inputs)
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return quantized
