"""Quantized layers: stock `nn.Linear` and 1x1 `nn.Conv2d` to everything around them, 4 bits and low rank inside.

Adapters, offloading and device maps find a linear layer with plain parameters; `weight` gives the 16-bit matrix that
the layer stands for. Modes of computation (`compute_mode`):

    w4a4    activations in the weight's 4-bit format
    w4a8    activations in int8, one scale a token; the weight becomes int8 on the fly (GPU) or once (CPU)
    w4a16   activations as they are; the weight becomes 16 bit on the fly
    auto    what the device is best at, see `best_mode`

When a gradient is wanted the layer computes in w4a16, and the gradient flows through to the input.

Legend: B batch, K input features, Kp = K padded, N output features, r rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.kernels.cpu import int8_linear
from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.linear import PIECE, linear
from diffusers_sana.kernels.low_bit import GROUP_SIZES, padded, precision_of
from diffusers_sana.kernels.lowbit_linear import lowbit_linear
from diffusers_sana.kernels.precision import arithmetic_dtype
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank
from diffusers_sana.quantizers.svdquant.algorithm.decompose import QuantizedWeight
from diffusers_sana.quantizers.svdquant.config import COMPUTE_MODES
from diffusers_sana.quantizers.svdquant.layers.compute_mode import best_mode
from diffusers_sana.quantizers.svdquant.layers.lora import LowRankBranch, PlainConvolutions, lazy_weight


class _FrozenLinear(torch.autograd.Function):
    """`x @ weight.T` whose weight is made again for the gradient, not kept: a frozen 4-bit base under an adapter."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, layer: "SVDQuantLayer") -> Tensor:
        ctx.layer = layer
        return linear(hidden_states, layer.dequantize(hidden_states.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantize(grad.dtype)
        return linear(grad, weight.t()), None


class SVDQuantLayer(LowRankBranch):
    """What quantized linear layers and 1x1 convolutions share: parameters, modes, memory.

    Attributes:
        qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, bias: parameters without gradient, see
            `QuantizedWeight`; `wtscale` and `bias` may be None.
        compute_mode: "auto", "w4a4", "w4a8" or "w4a16".
        is_weight_only: computes in w4a16 whatever `compute_mode` says, as adaLN layers do.
    """

    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor | None
    smooth_factor: Tensor
    bias: Any
    compute_mode: str
    is_weight_only: bool

    def _set_tensors(
        self, weight: QuantizedWeight, bias: Tensor | None, compute_mode: str, is_weight_only: bool
    ) -> None:
        for name in ("qweight", "wscales", "wtscale", "smooth_factor", "proj_down", "proj_up"):
            tensor = getattr(weight, name)
            parameter = None if tensor is None else nn.Parameter(tensor.contiguous(), requires_grad=False)
            self.register_parameter(name, parameter)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.is_weight_only = is_weight_only
        self._change_ranks = []
        self._prepared: tuple[tuple, int8_linear.PreparedWeight] | None = None
        self.set_compute_mode(compute_mode)

    def set_compute_mode(self, compute_mode: str) -> None:
        """Chooses the mode.

        Raises:
            ValueError: another name.
        """
        if compute_mode not in COMPUTE_MODES:
            raise ValueError(f"`compute_mode` must be one of {COMPUTE_MODES}, got {compute_mode!r}.")
        self.compute_mode = compute_mode
        self._prepared = None

    @property
    def precision(self) -> str:
        """ "int4" or "nvfp4"."""
        return precision_of(self.wscales)

    def dequantize(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        """The matrix `[N, K]` that the layer stands for, or some of its rows."""
        return dequantize_weight(
            self.qweight[rows],
            self.wscales[rows],
            None if self.wtscale is None else self.wtscale[rows],
            self.smooth_factor,
            self.proj_down,
            self.proj_up[rows],
            dtype or self.proj_up.dtype,
        )

    def multiply(self, hidden_states: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, in the dtype of the layer."""
        dtype = self.proj_up.dtype
        hidden_states = hidden_states.to(dtype)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            out = _FrozenLinear.apply(hidden_states, self)
            return out if self.bias is None else out + self.bias
        tokens = hidden_states.flatten(0, -2)
        mode = self.mode_on(tokens.device)
        on_cpu = tokens.device.type == "cpu"
        if mode == "w4a16" or (mode == "w4a8" and on_cpu and torch.compiler.is_compiling()):
            out = self._multiply_16_bit(tokens)
        elif mode == "w4a8" and on_cpu and int8_linear.is_supported():
            prepared = self._prepare()
            out = int8_linear.int8_linear(tokens, self.smooth_factor, self.proj_down, prepared)
        else:
            activation_format = "int8" if mode == "w4a8" else self.precision
            codes, scales, low = quantize_lowrank(tokens, self.smooth_factor, self.proj_down, activation_format)
            out = lowbit_linear(
                codes, scales, low, self.qweight, self.wscales, self.wtscale, self.proj_up, self.bias,
                activation_format=activation_format,
            )  # fmt: skip
        return out.unflatten(0, hidden_states.shape[:-1])

    def mode_on(self, device: torch.device) -> str:
        """The mode in which the layer computes on a device."""
        if self.is_weight_only:
            return "w4a16"
        return best_mode(device, self.precision) if self.compute_mode == "auto" else self.compute_mode

    def _multiply_16_bit(self, tokens: Tensor) -> Tensor:
        """On a CPU in pieces that stay in the cache."""
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return linear(tokens, self.dequantize(), self.bias)
        compute = arithmetic_dtype(tokens)
        inputs = tokens.to(compute)
        bias = None if self.bias is None else self.bias.to(compute)
        out = tokens.new_empty(tokens.shape[0], self.num_outputs)
        rows = max(PIECE // tokens.shape[1], 16)
        for start in range(0, out.shape[1], rows):
            piece = slice(start, start + rows)
            weight = self.dequantize(compute, piece)
            out[:, piece] = nn.functional.linear(inputs, weight, None if bias is None else bias[piece])
        return out

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.qweight.shape[0]

    def _prepare(self) -> int8_linear.PreparedWeight:
        """The 8-bit weight of `int8_linear`, made again when a parameter has changed."""
        parts = (self.qweight, self.wscales, self.wtscale, self.proj_up, self.bias)
        # Tensors made under `torch.inference_mode` count no versions; `_load_from_state_dict` covers their changes.
        key = tuple(
            (id(part), part.data_ptr(), part.is_inference() or part._version) for part in parts if part is not None
        )
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, int8_linear.prepare(*parts)
        return self._prepared[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to` and its like. Bits of e4m3 scales are no numbers to convert, and the CPU's copy is left behind."""
        self._prepared = None

        def on_bits(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float8_e4m3fn:
                return fn(tensor.view(torch.uint8)).view(torch.float8_e4m3fn)
            result = fn(tensor)
            if result.is_floating_point() and result.itemsize == 1:
                raise ValueError(
                    f"a 4-bit layer cannot be kept in {result.dtype}: its scales would be lost. Leave it out, as "
                    "`enable_layerwise_casting` of the model does."
                )
            return result

        return super()._apply(on_bits, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the CPU's 8-bit weight, which cannot be copied."""
        return {**self.__dict__, "_prepared": None}


class SVDQuantLinear(SVDQuantLayer, nn.Linear):
    """A linear layer in 4 bits.

    Args:
        weight: the parts.
        bias: `[N]` or None.
        compute_mode, is_weight_only: see `SVDQuantLayer`.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_mode: str = "auto",
        is_weight_only: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.qweight.shape[0], weight.smooth_factor.shape[0]
        self._set_tensors(weight, bias, compute_mode, is_weight_only)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The 16-bit matrix `[N, K]` that the layer stands for, computed where it is used; see `LazyWeight`."""
        return lazy_weight(self, (self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return self.multiply(input)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"precision={self.precision}, rank={self.rank}, compute_mode={self.compute_mode}"
        )


class SVDQuantConv2d(PlainConvolutions, SVDQuantLayer, nn.Conv2d):
    """A 1x1 convolution in 4 bits: a matrix product over the channels of each pixel.

    Args: see `SVDQuantLinear`.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_mode: str = "auto",
        is_weight_only: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_channels, self.in_channels = weight.qweight.shape[0], weight.smooth_factor.shape[0]
        self.kernel_size = self.stride = self.dilation = (1, 1)
        self.padding, self.output_padding = (0, 0), (0, 0)
        self.groups, self.transposed, self.padding_mode = 1, False, "zeros"
        self._reversed_padding_repeated_twice = [0, 0, 0, 0]
        self._set_tensors(weight, bias, compute_mode, is_weight_only)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The 16-bit kernel `[N, K, 1, 1]` that the layer stands for, as in `SVDQuantLinear`."""
        return lazy_weight(self, (self.out_channels, self.in_channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """`[B, K, h, w]` to `[B, N, h, w]`, channels-last in memory, which is also the fast input."""
        return self.multiply(input.movedim(1, -1)).movedim(-1, 1)


def placeholder(
    out_features: int, in_features: int, rank: int, precision: str, dtype: torch.dtype, device: Any = "meta"
) -> QuantizedWeight:
    """The parts of a quantized layer without their numbers: what a checkpoint is loaded into."""
    features = padded(in_features)
    groups = features // GROUP_SIZES[precision]
    is_nvfp4 = precision == "nvfp4"

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return QuantizedWeight(
        empty(out_features, features // 2, dtype=torch.uint8),
        empty(out_features, groups, dtype=torch.float8_e4m3fn if is_nvfp4 else dtype),
        empty(out_features) if is_nvfp4 else None,
        empty(in_features),
        empty(rank, in_features),
        empty(out_features, rank),
    )


def quantized_layer(
    module: nn.Module, weight: QuantizedWeight, compute_mode: str = "auto", is_weight_only: bool = False
) -> SVDQuantLinear | SVDQuantConv2d:
    """The quantized layer in place of a linear layer or a 1x1 convolution, with its bias."""
    cls = SVDQuantConv2d if isinstance(module, nn.Conv2d) else SVDQuantLinear
    return cls(weight, module.bias, compute_mode, is_weight_only)  # type: ignore[arg-type]
