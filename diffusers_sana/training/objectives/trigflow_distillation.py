"""Continuous-time consistency distillation in TrigFlow (sCM, arXiv 2410.11081; SANA-Sprint, arXiv 2503.09641).

The student's output `cos(t) x_t - sin(t) F(x_t, t)` is to stay the same along the teacher's path `dx_t / dt`. Its
derivative along the path has that of F in it, which forward-mode differentiation computes in one pass.

Legend: B batch, C latent channels, h/w latent height and width, L text vectors, D text width.
"""

from collections.abc import Callable
from typing import cast

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_sana.prompts.encoding import drop_prompts
from diffusers_sana.schedulers.trigflow import flow_to_trigflow
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer


Prompt = tuple[Tensor, Tensor]
WEIGHT_CHANNELS = 64


class TrigFlowStudent(nn.Module):
    """A transformer of SANA-Sprint as TrigFlow sees it, and how uncertain it is at each angle.

    Args:
        transformer: a SanaTransformer2DModel with a guidance embedding; see `make_student`.
    """

    def __init__(self, transformer: ModelMixin):
        super().__init__()
        self.transformer = transformer
        self.log_variance = nn.Linear(WEIGHT_CHANNELS, 1, bias=False)  # of the adaptive weighting; not saved
        nn.init.zeros_(self.log_variance.weight)

    def forward(self, noisy: Tensor, angles: Tensor, guidance: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Prediction F `[B, C, h, w]`, and the log variance of its error `[B]`.

        Args:
            noisy: x_t, `[B, C, h, w]`.
            angles: `[B]`.
            guidance: guidance scales `[B]`.
            prompt: vectors `[B, L, D]` and mask `[B, L]`.
        """
        embeds, mask = prompt
        scaled_guidance = guidance * self.transformer.config.guidance_embeds_scale

        def predict(latents: Tensor, sigmas: Tensor) -> Tensor:
            arguments = {"encoder_attention_mask": mask, "guidance": scaled_guidance, "return_dict": False}
            return self.transformer(latents, embeds, sigmas, **arguments)[0].float()

        described = get_timestep_embedding(angles, WEIGHT_CHANNELS, scale=1000)
        return flow_to_trigflow(predict, noisy, angles), self.log_variance(described)[:, 0].float()


@torch.no_grad()
def guided_prediction(
    teacher: ConditionedTransformer, noisy: Tensor, angles: Tensor, guidance: Tensor, prompt: Prompt
) -> Tensor:
    """The teacher's F with classifier-free guidance `[B, C, h, w]`: dx_t / dt of the path to be followed.

    Arguments are those of `TrigFlowStudent.forward`.
    """
    embeds, mask = (part.repeat(2, *[1] * (part.ndim - 1)) for part in prompt)
    mask = drop_prompts(mask, torch.arange(len(mask), device=mask.device) >= len(noisy))

    def predict(latents: Tensor, sigmas: Tensor) -> Tensor:
        velocity = teacher(latents.repeat(2, 1, 1, 1), sigmas.repeat(2), (embeds, mask)).float()
        guided, empty = velocity.chunk(2)
        return empty + guidance.view(-1, 1, 1, 1) * (guided - empty)

    return flow_to_trigflow(predict, noisy, angles)


@torch.no_grad()
def directional_derivative(
    predict: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, angles: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """F and `cos(t) sin(t) dF / dt` along `direction`, both `[B, C, h, w]`.

    The factor, with which the derivative is wanted, goes into the pass: without it numbers grow large near 0 and π/2.
    Forward mode has no rule for fused attention, so that is computed in the open here. Nor has it one for our Triton
    kernels: on a GPU call this in `kernel_mode("torch")`.

    Args:
        predict: from x_t and angles to F.
        noisy: x_t, `[B, C, h, w]`.
        angles: `[B]`.
        direction: dx_t / dt, `[B, C, h, w]`.
    """
    factor = angles.cos() * angles.sin()
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        tangents = (factor.view(-1, 1, 1, 1) * direction, factor)
        return cast(tuple[Tensor, Tensor], torch.func.jvp(predict, (noisy, angles), tangents))


def consistency_tangent(
    noisy: Tensor,
    angles: Tensor,
    predicted: tuple[Tensor, Tensor],
    direction: Tensor,
    warmup: float = 1.0,
    sigma_data: float = 0.5,
    constant: float = 0.1,
) -> Tensor:
    """Where F should move, `[B, C, h, w]`: minus cos(t) times the output's derivative along the path, normalized.

    Args:
        noisy, angles: x_t and t.
        predicted: F and its derivative, as `directional_derivative` returns them.
        direction: dx_t / dt.
        warmup: weight of all but the distance to the teacher, 0 at the beginning of the training and 1 later. At 0
            the student learns to predict as the teacher does.
        sigma_data: the unit in which `constant` is meant.
        constant: added to the norm that the tangent of each image is divided by.
    """
    prediction, derivative = predicted
    cos, sin = angles.cos().view(-1, 1, 1, 1), angles.sin().view(-1, 1, 1, 1)
    tangent = -(cos**2) * (prediction - direction) - warmup * (cos * sin * noisy + derivative)
    tangent = sigma_data * tangent
    return tangent / (tangent.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + constant)


def weighted_loss(prediction: Tensor, target: Tensor, log_variance: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Squared error of `[B, C, h, w]`, weighted so that all angles matter alike: mean of `exp(-u) error + u`.

    The error is the sum over an image. A normalized tangent makes it nearly 1, so u can start at 0.

    Args:
        prediction: F, with gradients.
        target: what it should be, without.
        log_variance: u `[B]`, learned.
        weights: of images, `[B]`.
    """
    error = (prediction - target).square().flatten(1).sum(dim=1)
    return (weights * (torch.exp(-log_variance) * error + log_variance)).mean()
