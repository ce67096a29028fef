"""The three phases of decoupled high-resolution adaptation (DC-AE, arXiv 2410.10733, section 3.3 and appendix A).

A deep-compression autoencoder is trained whole at low resolution; then only its latent side is adapted at high
resolution, where training everything would not fit; then only the decoder's head is refined against a discriminator.
The paper does not list the layers of phases 2 and 3, so the prefixes are settings.
"""

from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffusers_sana.training.config import check_choice


@dataclass(frozen=True)
class Phase:
    """What one phase trains, and its settings in the paper.

    Attributes:
        trained_prefixes: key prefixes of the parameters that train; "" means all of them.
        resolution: side of the training images in pixels.
        learning_rate, betas, weight_decay: of AdamW; the learning rate is constant.
        adversarial: whether a discriminator takes part.
    """

    trained_prefixes: tuple[str, ...]
    resolution: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    adversarial: bool


PHASES = {
    1: Phase(("",), 256, 6.4e-5, (0.9, 0.999), 0.1, False),
    2: Phase(("encoder.conv_out.", "decoder.conv_in."), 512, 1.6e-5, (0.9, 0.999), 0.001, False),
    # The paper gives no weight decay for phase 3; that of phase 2 is kept.
    3: Phase(("decoder.norm_out.", "decoder.conv_out."), 256, 5.4e-5, (0.5, 0.9), 0.001, True),
}


def get_phase(phase: int) -> Phase:
    """The settings of phase 1, 2 or 3; a ValueError for any other number."""
    check_choice("phase", phase, tuple(PHASES))
    return PHASES[phase]


def select_parameters(model: nn.Module, prefixes: tuple[str, ...]) -> list[nn.Parameter]:
    """Let exactly the parameters under `prefixes` train, freeze the others, and return those that train.

    Raises a ValueError when a prefix matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            roots = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"`trained_prefixes` must match parameters, got {prefix!r}. The model has {roots}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
    set_training_modes(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_training_modes(model: nn.Module) -> None:
    """Training mode, but evaluation mode where all parameters are frozen: a frozen batch norm keeps its statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def mask_latents(model: ModelMixin) -> None:
    """Make an autoencoder's decoder multiply its latents with its new buffer `latent_mask`, all ones `[1, C, 1, 1]`.

    The buffer stays outside the state dict; the saved model is an ordinary one.
    """
    mask = torch.ones(1, model.config.latent_channels, 1, 1)
    model.decoder.register_buffer("latent_mask", mask, persistent=False)
    model.decoder.register_forward_pre_hook(lambda decoder, arguments: (arguments[0] * decoder.latent_mask,))


def draw_latent_prefix(mask: Tensor, step: int) -> None:
    """Let `mask` keep the first c' channels, c' drawn uniformly from step, 2 step, ..., all channels."""
    channels = mask.shape[1]
    kept = min(step * int(torch.randint(1, -(-channels // step) + 1, ())), channels)
    mask[:, :kept], mask[:, kept:] = 1, 0


class DecodedLatents:
    """The latents that the decoder of `model` was last given, to which it adds `noise` while it trains."""

    def __init__(self, model: ModelMixin, noise: float):
        self.noise, self.last = noise, torch.empty(0)
        model.decoder.register_forward_pre_hook(self._keep)

    def _keep(self, decoder: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.last, *others = arguments
        if not (self.noise and torch.is_grad_enabled()):
            return arguments
        return self.last + self.noise * torch.randn_like(self.last), *others

    def distance_from_unit_scale(self) -> Tensor:
        """Mean over the channels of the squared distance of their mean square to 1."""
        return (self.last.float().square().mean((0, 2, 3)) - 1).square().mean()
