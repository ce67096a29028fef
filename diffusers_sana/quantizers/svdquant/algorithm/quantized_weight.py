"""A weight in 4 or 8 bits with a low-rank branch: its tensors, and the output that a layer has with it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import decode_e2m1, decode_weight, precision_of, unpack_nibbles
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from diffusers_sana.kernels.rotation import rotate


@dataclass
class QuantizedWeight:
    """The tensors of a quantized layer, under the names of its state dict.

    Attributes:
        qweight: uint8 `[N, Kp/2]`; for int8 int8 `[N, Kp]`, for float8 uint8 `[N, Kp]`.
        wscales: `[N, Kp/G]`, 16 bit or e4m3; for int8 and float8 fp32 `[N]`.
        wtscale: `[N]` for nvfp4, else None.
        smooth_factor: `[K]`.
        proj_down: `[r, K]`, for the raw input: already divided by `smooth_factor`.
        proj_up: `[N, r]`.
        rotation: int8, the size of the groups that are rotated, see `kernels/rotation.py`; None in layers that are
            not.
    """

    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor | None
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    rotation: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "QuantizedWeight":
        """The inverse of `tensors`."""
        return cls(*(tensors.get(item.name) for item in fields(cls)))  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """By name, without those that are None."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """On another device."""
        return self.from_tensors({name: value.to(device) for name, value in self.tensors().items()})

    def rows(self, features: slice) -> "QuantizedWeight":
        """Only the given output features."""
        shared = {"smooth_factor", "proj_down", "rotation"}
        values = self.tensors().items()
        return self.from_tensors({name: value if name in shared else value[features] for name, value in values})

    def residual(self) -> Tensor:
        """The part of the smoothed weight that the codes represent, fp32 `[N, K]`."""
        decoded = decode_weight(self.qweight, self.wscales, self.wtscale)
        decoded = decoded if self.rotation is None else rotate(decoded, self.rotation)
        return decoded[:, : self.smooth_factor.shape[0]]

    def output(self, inputs: Tensor, mode: str) -> Tensor:
        """The output of a layer with this weight, fp32 `[S, N]`.

        Args:
            inputs: `[S, K]`, fp32.
            mode: a compute mode of the layer, such as "w4a8". The rounding of a 4-bit weight to 8 bits is left out: it
                is a tenth of that to 4 bits.
        """
        smooth, up = self.smooth_factor.float(), self.proj_up.float().t()
        if mode.endswith("a16"):
            return torch.addmm(inputs @ self.proj_down.float().t() @ up, inputs / smooth, self.residual().t())
        precision = precision_of(self.wscales) if mode == "w4a4" else "int8"
        codes, scales, low = quantize_lowrank_reference(inputs, smooth, self.proj_down, precision, self.rotation)
        if precision == "nvfp4":
            codes = decode_e2m1(unpack_nibbles(codes, 16))
        group_size = codes.shape[-1] // scales.shape[-1]
        smoothed = (codes.float().unflatten(-1, (-1, group_size)) * scales.float()[..., None]).flatten(-2)
        return torch.addmm(low @ up, smoothed, decode_weight(self.qweight, self.wscales, self.wtscale).t())
