"""Quantized layers: stock `nn.Linear` and 1x1 `nn.Conv2d` from outside, 4 or 8 bits and a low-rank branch inside.

    out = x @ weight.T + bias,    weight = decode(qweight, wscales, wtscale) / smooth_factor + proj_up @ proj_down

In rotated layers the decoded matrix is rotated before the division (see `kernels/rotation.py`).

Adapters, offloading and device maps find a linear layer with plain parameters; `weight` gives the 16-bit matrix that
the layer represents. The product of a 4-bit layer is computed in one of three modes (`compute_mode`):

    w4a4    activations are quantized to the 4-bit format of the weight
    w4a8    activations are quantized to int8, with one scale per token; the weight is converted to int8 once, or on
            the fly on a GPU without room for an 8-bit copy
    w4a16   activations stay in 16 bit; the weight is converted to 16 bit on the fly
    auto    the fastest of these on the device, see `best_mode`

That of an int8 layer is computed in w8a8, as w4a8 without converting the weight, or in w8a16; that of a float8 layer
in f8a8, with activations in float8 too, or in f8a16; see `mode_for`.

If the input requires a gradient, the layer computes in w4a16, and the gradient flows through to the input.

Legend: B batch, M tokens, K input features, Kp = K padded, N output features, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.arguments import COMPUTE_MODES
from diffusers_sana.kernels.cpu import int8_linear
from diffusers_sana.kernels.cpu.blocked import linear_in_pieces
from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.float8_linear import float8_linear
from diffusers_sana.kernels.kept import forget
from diffusers_sana.kernels.linear import linear
from diffusers_sana.kernels.low_bit import GROUP_SIZES, padded, precision_of
from diffusers_sana.kernels.lowbit_linear import lowbit_linear
from diffusers_sana.kernels.precision import arithmetic_dtype
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank
from diffusers_sana.kernels.rotation import rotation_size, rotation_tensor
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.config import mode_for
from diffusers_sana.quantizers.svdquant.layers.compute_mode import best_mode
from diffusers_sana.quantizers.svdquant.layers.lora import LowRankBranch, PlainConvolutions, lazy_weight


class SVDQuantLayer(LowRankBranch):
    """The common part of quantized linear layers and 1x1 convolutions: parameters, compute modes, memory.

    Args:
        weight: the tensors.
        bias: `[N]` or None.
        compute_mode, is_weight_only: see the attributes.

    Attributes:
        qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, rotation, bias: parameters without gradient, see
            `QuantizedWeight`; `wtscale`, `rotation` and `bias` may be None.
        compute_mode: one of `COMPUTE_MODES`.
        is_weight_only: activations stay in 16 bit whatever `compute_mode` is, as adaLN layers do.
        input_scale: static scale of the input / smooth_factor, for runtimes that need one; not used here.
    """

    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor | None
    smooth_factor: Tensor
    rotation: Tensor | None
    bias: Any
    compute_mode: str
    is_weight_only: bool
    input_scale: float | None = None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_mode: str = "auto",
        is_weight_only: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self._set_features(weight.smooth_factor.shape[0], weight.qweight.shape[0])
        for item in fields(weight):
            name, tensor = item.name, getattr(weight, item.name)
            parameter = None if tensor is None else nn.Parameter(tensor.contiguous(), requires_grad=False)
            self.register_parameter(name, parameter)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.is_weight_only = is_weight_only
        self._changes = []
        self.set_compute_mode(compute_mode)

    def _set_features(self, num_inputs: int, num_outputs: int) -> None:
        """Sets the attributes that the stock class has for its shape."""
        raise NotImplementedError

    def set_compute_mode(self, compute_mode: str) -> None:
        """Chooses the mode.

        Raises:
            ValueError: another name.
        """
        if compute_mode not in COMPUTE_MODES:
            raise ValueError(f"`compute_mode` must be one of {COMPUTE_MODES}, got {compute_mode!r}.")
        self.compute_mode = compute_mode
        forget(self.qweight)

    def mode_on(self, device: torch.device) -> str:
        """The mode in which the layer computes on a device: one of `LAYER_MODES` or "w4a8"."""
        if self.compute_mode == "auto" and not self.is_weight_only:
            return best_mode(device, self.precision)
        return mode_for(self.precision, "w4a16" if self.is_weight_only else self.compute_mode)

    def matmul(self, hidden_states: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, in the dtype of the layer."""
        hidden_states = hidden_states.to(self.proj_up.dtype)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            out = _FrozenLinear.apply(hidden_states, self)
            return out if self.bias is None else out + self.bias
        tokens = hidden_states.flatten(0, -2)
        mode = self.mode_on(tokens.device)
        if mode == "w4a4":
            out = self.matmul_a4(tokens)
        elif mode.endswith("a8"):
            out = self.matmul_a8(tokens)
        else:
            out = self.matmul_a16(tokens)
        return out.unflatten(0, hidden_states.shape[:-1])

    def matmul_a4(self, tokens: Tensor) -> Tensor:
        """`[M, K]` to `[M, N]` with activations in the 4-bit format of the weight."""
        return self._low_bit_matmul(tokens, self.precision)

    def matmul_a8(self, tokens: Tensor) -> Tensor:
        """`[M, K]` to `[M, N]` with activations in int8, or float8 where the weight is."""
        if self.precision == "float8":
            return float8_linear(
                tokens, self.qweight, self.wscales,
                self.smooth_factor, self.proj_down, self.proj_up, self.bias, self.rotation,
            )  # fmt: skip
        if tokens.device.type == "cpu" and int8_linear.is_supported():
            return int8_linear.int8_linear(
                tokens, self.qweight, self.wscales, self.wtscale,
                self.smooth_factor, self.proj_down, self.proj_up, self.bias, self.rotation,
            )  # fmt: skip
        return self._low_bit_matmul(tokens, "int8")

    def matmul_a16(self, tokens: Tensor) -> Tensor:
        """`[M, K]` to `[M, N]` with activations in 16 bit; on a CPU in pieces of the weight that stay in the cache."""
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return linear(tokens, self.dequantize(), self.bias)
        dtype = arithmetic_dtype(tokens)
        return linear_in_pieces(tokens, lambda rows: self.dequantize(dtype, rows), self.num_outputs, self.bias)

    def _low_bit_matmul(self, tokens: Tensor, activation_format: str) -> Tensor:
        codes, scales, low = quantize_lowrank(
            tokens, self.smooth_factor, self.proj_down, activation_format, self.rotation
        )
        return lowbit_linear(
            codes, scales, low, self.qweight, self.wscales, self.wtscale, self.proj_up, self.bias,
            activation_format=activation_format, keep_int8=True,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        """The matrix `[N, K]` that the layer represents, or some of its rows."""
        return dequantize_weight(
            self.qweight[rows],
            self.wscales[rows],
            None if self.wtscale is None else self.wtscale[rows],
            self.smooth_factor,
            self.proj_down,
            self.proj_up[rows],
            dtype or self.proj_up.dtype,
            self.rotation,
        )

    @property
    def precision(self) -> str:
        """ "int4", "nvfp4", "int8" or "float8"."""
        return precision_of(self.wscales, self.qweight)

    @property
    def rotation_size(self) -> int | None:
        """The size of the groups that are rotated, or None."""
        return None if self.rotation is None else rotation_size(self.rotation)

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.qweight.shape[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to` and the like. It keeps the bits of nvfp4 and 8-bit scales, and forgets what was made of parameters."""
        forget(self.qweight, self.smooth_factor)

        def on_bits(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float8_e4m3fn:
                return fn(tensor.view(torch.uint8)).view(torch.float8_e4m3fn)
            if tensor is self.wscales and tensor.dim() == 1:
                return fn(tensor.view(torch.int32)).view(torch.float32)
            result = fn(tensor)
            if result.is_floating_point() and result.itemsize == 1:
                raise ValueError(
                    f"a quantized layer cannot be kept in {result.dtype}: its scales would be lost. Leave it out, as "
                    "`enable_layerwise_casting` of the model does."
                )
            return result

        return super()._apply(on_bits, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        forget(self.qweight, self.smooth_factor)
        super()._load_from_state_dict(*args, **kwargs)


@contextmanager
def forward_mode_products(model: nn.Module) -> Iterator[None]:
    """Inside, forward-mode differentiation (`torch.func.jvp`) goes through the quantized layers of a model.

    They compute as plain products with the matrices that they represent, as in w4a16: the other modes and the fast
    products on a CPU have no derivative.
    """
    layers = list(quantized_layers(model))

    def product(layer: SVDQuantLayer, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states.to(layer.proj_up.dtype)
        return nn.functional.linear(hidden_states, layer.dequantize(hidden_states.dtype), layer.bias)

    for layer in layers:
        layer.matmul = partial(product, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.matmul


class _FrozenLinear(torch.autograd.Function):
    """`x @ weight.T` of a frozen quantized layer; recomputes the weight for the gradient instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, layer: SVDQuantLayer) -> Tensor:
        ctx.layer = layer
        return linear(hidden_states, layer.dequantize(hidden_states.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantize(grad.dtype)
        return linear(grad, weight.t()), None


class SVDQuantLinear(SVDQuantLayer, nn.Linear):
    """A linear layer in 4 or 8 bits; arguments as of `SVDQuantLayer`."""

    def _set_features(self, num_inputs: int, num_outputs: int) -> None:
        self.in_features, self.out_features = num_inputs, num_outputs

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The 16-bit matrix `[N, K]` that the layer represents, computed where it is used; see `LazyWeight`."""
        return lazy_weight(self, (self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return self.matmul(input)

    def extra_repr(self) -> str:
        """The sizes, format, rank and mode, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"precision={self.precision}, rank={self.rank}, rotated={self.rotation is not None}, "
            f"compute_mode={self.compute_mode}"
        )


class SVDQuantConv2d(PlainConvolutions, SVDQuantLayer, nn.Conv2d):
    """A 1x1 convolution in 4 or 8 bits, a matrix product per pixel; arguments as of `SVDQuantLayer`."""

    def _set_features(self, num_inputs: int, num_outputs: int) -> None:
        self.in_channels, self.out_channels = num_inputs, num_outputs
        self.kernel_size = self.stride = self.dilation = (1, 1)
        self.padding, self.output_padding = (0, 0), (0, 0)
        self.groups, self.transposed, self.padding_mode = 1, False, "zeros"
        self._reversed_padding_repeated_twice = [0, 0, 0, 0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The 16-bit kernel `[N, K, 1, 1]` that the layer represents, as in `SVDQuantLinear`."""
        return lazy_weight(self, (self.out_channels, self.in_channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """`[B, K, h, w]` to `[B, N, h, w]`, channels-last in memory, which is also the fast input."""
        return self.matmul(input.movedim(1, -1)).movedim(-1, 1)


def empty_weight(
    out_features: int,
    in_features: int,
    rank: int,
    precision: str,
    dtype: torch.dtype,
    device: Any = "meta",
    rotation: int | None = None,
) -> QuantizedWeight:
    """The tensors of a quantized layer without values, for a checkpoint to be loaded into."""
    features = padded(in_features)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if precision not in GROUP_SIZES:
        codes = empty(out_features, features, dtype=torch.int8 if precision == "int8" else torch.uint8)
        scales = empty(out_features, dtype=torch.float32)
    else:
        codes, groups = empty(out_features, features // 2, dtype=torch.uint8), features // GROUP_SIZES[precision]
        scales = empty(out_features, groups, dtype=torch.float8_e4m3fn if precision == "nvfp4" else dtype)
    return QuantizedWeight(
        codes,
        scales,
        empty(out_features) if precision == "nvfp4" else None,
        empty(in_features),
        empty(rank, in_features),
        empty(out_features, rank),
        None if rotation is None else torch.empty_like(rotation_tensor(rotation), device=device),
    )


def quantized_layer(
    module: nn.Module, weight: QuantizedWeight, compute_mode: str = "auto", is_weight_only: bool = False
) -> SVDQuantLinear | SVDQuantConv2d:
    """The quantized counterpart of a linear layer or a 1x1 convolution, with its bias."""
    cls = SVDQuantConv2d if isinstance(module, nn.Conv2d) else SVDQuantLinear
    return cls(weight, module.bias, compute_mode, is_weight_only)  # type: ignore[arg-type]


def replace_layer(model: nn.Module, name: str, weight: QuantizedWeight, mode: str, compute_mode: str) -> SVDQuantLayer:
    """Replaces a linear layer or a 1x1 convolution of a model by its quantized counterpart.

    Args:
        model: holds the layer.
        name: of the layer in the model.
        weight: its quantized weight.
        mode: one of `LAYER_MODES`, from `find_targets`.
        compute_mode: see `SVDQuantConfig`.
    """
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, leaf)
    layer = quantized_layer(original, weight, compute_mode, is_weight_only=mode.endswith("a16"))
    setattr(parent, leaf, layer.train(original.training))
    return layer


def quantized_layers(model: nn.Module) -> Iterator[SVDQuantLayer]:
    """The quantized layers of a model, in its order."""
    return (module for module in model.modules() if isinstance(module, SVDQuantLayer))
