"""How the codes of a picture are drawn: guidance, temperature, top-k, top-p, and noise that a seed fixes.

Nothing here reads a value on the host. A draw is the largest of p / e with e ~ Exp(1), which picks code k with
probability p_k and, unlike `torch.multinomial`, fits into a CUDA graph. The noise belongs to the codes, not to their
ranks: a seed means about the same picture whatever top_k, precision or batch is.

Legend: N samples, K codebook entries, D codes a cell.
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
        do_sample: draw; otherwise take the best, whatever the other fields say.
        temperature: divides the logits.
        top_k: of so many best codes; 0 for all.
        top_p: then of the fewest best that together have this probability.

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
                f"`temperature` must be above 0 and finite, but is {self.temperature}; for the best code use"
                " do_sample=False"
            )
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 (all codes) or more, but is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, but is {self.top_p}")

    @classmethod
    def from_options(cls, configs: Sequence[Any], **given: Any) -> "VisualSampling":
        """What was given, where it is not None, or else what the first configuration says; see `visual_option`."""
        return cls(**{name: visual_option(name, value, configs, getattr(cls, name)) for name, value in given.items()})

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What may be drawn from `[N, K]`: probabilities, best first and not normalized again, and their codes.

        The candidate that passes `top_p` still counts, so there is always one.
        """
        size = logits.shape[-1]
        values, codes = (logits.float() / self.temperature).topk(min(self.top_k or size, size))
        probabilities = values.softmax(-1)
        better = probabilities.cumsum(-1) - probabilities
        if self.top_p < 1:
            probabilities = torch.where(better < self.top_p, probabilities, 0.0)
        return probabilities, codes

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Codes `[N]` from logits `[N, K]`; `noise` is `[N, K]`, Exp(1), and not needed without `do_sample`."""
        if not self.do_sample or noise is None:
            return logits.argmax(-1)
        probabilities, codes = self.candidates(logits)
        choice = (probabilities / noise.gather(-1, codes)).argmax(-1, keepdim=True)
        return codes.gather(-1, choice)[:, 0]


def visual_option(name: str, given: Any, configs: Sequence[Any], default: Any) -> Any:
    """`given`, or else the first `visual_<name>` of `configs`, or else `default`; None counts as not there."""
    chosen = (given, *(getattr(config, f"visual_{name}", None) for config in configs))
    return next((value for value in chosen if value is not None), default)


def guide(logits: Tensor, scales: Tensor | None) -> Tensor:
    """Classifier-free guidance: from conditional then unconditional logits `[2N, K]`, by scales `[N, 1]`, to `[N, K]`.

    Without scales, the logits are `[N, K]` and stay what they are.
    """
    if scales is None:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return torch.lerp(unconditional, conditional, scales)


class CodeNoise:
    """Noise for the codes of N samples, drawn for some cells at a time.

    Args:
        generators: None for the global one; one for all samples, then what a sample gets depends on the batch; or one
            for each, then it does not.
        shape: (N, cells a draw, D, K).
        device: where the noise is used. A generator may live elsewhere; then each draw is copied over.

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
            raise ValueError(f"`generator` must be one for each of {shape[0]} samples, but is {len(generators)}")
        self.generators = generators
        self.shape = shape
        self.device = device

    def draw(self) -> Tensor:
        """The next `[N, cells, D, K]`, all above 0."""
        if isinstance(self.generators, Sequence):
            return torch.stack([self._draw(generator, self.shape[1:]) for generator in self.generators])
        return self._draw(self.generators, self.shape)

    def _draw(self, generator: torch.Generator | None, shape: tuple[int, ...]) -> Tensor:
        device = self.device if generator is None else generator.device
        noise = torch.empty(shape, device=device).exponential_(generator=generator)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny).to(self.device)
