"""Sampling of image codes: guidance, temperature, top-k, top-p, and noise that is determined by a seed.

Nothing here reads a value on the host. A sample is the largest of p / e with e ~ Exp(1), which selects code k with
probability p_k and, unlike `torch.multinomial`, can be captured in a CUDA graph. The noise belongs to the codes, not
to their ranks, so a seed gives nearly the same image for any top_k, precision or batch.

Legend: N samples, K codebook entries, D codes per image token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualSampling:
    """How a code is chosen from its logits.

    Args:
        do_sample: sample; otherwise take the most probable code, whatever the other fields are.
        temperature: divides the logits.
        top_k: the number of most probable codes to sample from; 0 for all.
        top_p: of those, the fewest that together have this probability.

    Raises:
        ValueError: naming the field.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"`temperature` must be above 0 and finite, got {self.temperature}; for the most probable code use"
                " do_sample=False"
            )
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 (all codes) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")

    @classmethod
    def from_options(cls, configs: Sequence[Any], **options: Any) -> "VisualSampling":
        """From options; those that are None come from the generation configs, see `visual_option`."""
        return cls(
            **{name: visual_option(name, value, configs, getattr(cls, name)) for name, value in options.items()}
        )

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The codes to sample from, by logits `[N, K]`: descending probabilities, not renormalized, and the codes.

        The candidate that crosses `top_p` is included, so there is always one.
        """
        size = logits.shape[-1]
        values, codes = (logits.float() / self.temperature).topk(min(self.top_k or size, size))
        probabilities = values.softmax(-1)
        cumulative = probabilities.cumsum(-1) - probabilities
        if self.top_p < 1:
            probabilities = torch.where(cumulative < self.top_p, probabilities, 0.0)
        return probabilities, codes

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Codes `[N]` from logits `[N, K]`; `noise` is `[N, K]`, Exp(1), and only needed with `do_sample`."""
        if not self.do_sample or noise is None:
            return logits.argmax(-1)
        probabilities, codes = self.candidates(logits)
        choice = (probabilities / noise.gather(-1, codes)).argmax(-1, keepdim=True)
        return codes.gather(-1, choice)[:, 0]


def visual_option(name: str, value: Any, configs: Sequence[Any], default: Any) -> Any:
    """`value`, else the first `visual_<name>` in `configs`, else `default`; None counts as missing."""
    candidates = (value, *(getattr(config, f"visual_{name}", None) for config in configs))
    return next((value for value in candidates if value is not None), default)


def guide(logits: Tensor, scales: Tensor | None) -> Tensor:
    """Classifier-free guidance: conditional, then unconditional logits `[2N, K]` to `[N, K]`, with scales `[N, 1]`.

    Without scales, the logits are `[N, K]` and are returned unchanged.
    """
    if scales is None:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return torch.lerp(unconditional, conditional, scales)


class CodeNoise:
    """Noise for the codes of N samples, sampled for several image tokens at a time.

    Args:
        generators: None for the global one; one for all samples, whose noise then depends on the batch; or one per
            sample.
        shape: (N, image tokens per call of `sample`, D, K).
        device: where the noise is used. If a generator is on another device, the noise is copied.

    Raises:
        ValueError: the number of generators is not N.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator] | None,
        shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> None:
        if isinstance(generators, Sequence) and len(generators) != shape[0]:
            raise ValueError(f"`generator` must have one generator per sample ({shape[0]}), got {len(generators)}")
        self.generators = generators
        self.shape = shape
        self.device = device

    def sample(self) -> Tensor:
        """The next noise, `[N, image tokens, D, K]`, all values above 0."""
        if isinstance(self.generators, Sequence):
            return torch.stack([self._sample(generator, self.shape[1:]) for generator in self.generators])
        return self._sample(self.generators, self.shape)

    def _sample(self, generator: torch.Generator | None, shape: tuple[int, ...]) -> Tensor:
        device = self.device if generator is None else generator.device
        noise = torch.empty(shape, device=device).exponential_(generator=generator)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny).to(self.device)
