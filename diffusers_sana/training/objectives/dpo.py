"""Direct preference optimization of flows (Diffusion-DPO, arXiv 2311.12908; of flows, arXiv 2501.13918).

Of two images of a prompt one is preferred. The likelihood of an image is bounded by the error of its velocity. So the
model is to err less than the base on the preferred image, by more than on the rejected one: a reward that no network
has to compute.

Legend: B pairs.
"""

import torch.nn.functional as F
from torch import Tensor


def preference_losses(errors: Tensor, base_errors: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of each pair `[B]`, and its margin `[B]`: above 0 where the model prefers the right image.

    Args:
        errors: mean squared errors of the velocities of the model that trains, `[2 B]`: of the preferred images, then
            of the rejected ones, at the same noise levels under the same noise.
        base_errors: those of the base.
        beta: how little the model may depart from the base.
    """
    preferred, rejected = (base_errors - errors).chunk(2)
    margins = preferred - rejected
    return -F.logsigmoid(beta / 2 * margins), margins
