"""PEFT's LoRA layers, around a quantized layer: fused and separated exactly.

Imported only when PEFT wraps a quantized layer; see `lora.py`.

Legend: K input features, N output features, p rank of an adapter.
"""

import warnings
from typing import Any

from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor


class ExactlyFused:
    """Mixin that fuses adapters as ranks of the base layer. A product rounds `scale * A` to the layer's dtype, and
    nothing else differs from the adapter beside the layer; separated, the layer has its old bits.
    """

    fused_rank = 0

    @property
    def weight(self: Any) -> Tensor:
        """The matrix `[N, K]` that the base layer stands for."""
        return self.get_base_layer().weight

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuses adapters; those that are fused already stay as they are, with PEFT's warning.

        Args:
            safe_merge: look for NaN and infinity first.
            adapter_names: which; None for the active ones.

        Raises:
            ValueError: an adapter that is more than a low-rank product, or with `safe_merge` one that is not finite.
                The layer is as before.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        factors = [self._factors(name, safe_merge) for name in names]
        for name, (down, up) in zip(names, factors, strict=True):
            self.get_base_layer().append_ranks(down, up)
            self.fused_rank += down.shape[0]
            self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Separates all fused adapters."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.get_base_layer().drop_ranks(self.fused_rank)
        self.fused_rank = 0
        self.merged_adapters.clear()

    def _factors(self: Any, name: str, safe_merge: bool) -> tuple[Tensor, Tensor]:
        """`[p, K]` with the scale, fp32, and `[N, p]`."""
        if name in self.lora_variant or self.lora_bias.get(name):
            kind = "a bias" if self.lora_bias.get(name) else type(self.lora_variant[name]).__name__
            raise ValueError(
                f"adapter {name!r} has {kind} and cannot be fused into a 4-bit layer, which only takes up low-rank "
                "products. Leave it beside the layer, where it works, or fuse it into the 16-bit model."
            )
        down = self.lora_A[name].weight.detach().flatten(1).float() * self.scaling[name]
        up = self.lora_B[name].weight.detach().flatten(1)
        if safe_merge and not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"adapter {name!r} must be finite to be fused, got NaN or infinity. Its file is broken.")
        return down, up


class SVDQuantLoraLinear(ExactlyFused, lora.Linear):
    """Of a linear layer."""


class SVDQuantLoraConv2d(ExactlyFused, lora.Conv2d):
    """Of a 1x1 convolution."""


SPECIALIZED: dict[type, type] = {lora.Linear: SVDQuantLoraLinear, lora.Conv2d: SVDQuantLoraConv2d}
