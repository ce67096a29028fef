"""The transformer of a SANA-Sprint, made of its teacher's weights (arXiv 2503.09641, section 3.2)."""

from copy import deepcopy
from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn


TRAIN_TIMESTEPS = 1000
DENSE_SCALE = 1 / TRAIN_TIMESTEPS
TIME_CHANNELS = 256
RIDGE = 1e-3  # relative to the largest singular value: smooth between the points, weights of ordinary size


def make_student(teacher: Any) -> Any:
    """A transformer with a guidance embedding that predicts, at any guidance scale, what `teacher` does.

    Three things differ (section 3.2 of the paper). The guidance scale is an input; its embedding begins with zeros.
    The network is given σ in [0, 1] and not 1000 σ, by which the derivative would be a thousand times larger; the new
    time embedding is fitted to the old one in closed form. Queries and keys are normalized, as in SANA-1.5: without
    it the paper saw gradients explode in large models. Norms that the teacher lacks begin with weights of 1 and must
    be learned.

    Nothing here is random: a LoRA of the student can be loaded into what this makes of the same teacher.

    The student equals the teacher where that has query and key norms and a dense time embedding, which the published
    teachers of SANA-Sprint have (`timestep_scale` 0.001); otherwise it is close to it.

    Args:
        teacher: a SanaTransformer2DModel, diffusers' or ours.

    Returns:
        A new one of the same class.

    Raises:
        ValueError: the teacher has a guidance embedding already.
    """
    if teacher.config.guidance_embeds:
        raise ValueError(
            "`teacher` must be a Sana without guidance embedding, got `guidance_embeds=True`. Pass Sana or SANA-1.5."
        )
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    changes = {"guidance_embeds": True, "timestep_scale": DENSE_SCALE, "qk_norm": "rms_norm_across_heads"}
    student = type(teacher).from_config(config | changes)
    state = {name.replace("time_embed.emb.", "time_embed."): value for name, value in teacher.state_dict().items()}
    start = student.state_dict()
    added = [name for name in start if name not in state]
    student.load_state_dict(state | {name: start[name] for name in added})
    embedding = student.time_embed
    if teacher.config.timestep_scale != DENSE_SCALE:
        fit_dense_time(embedding.timestep_embedder, teacher)
    embedding.guidance_embedder.linear_1.load_state_dict(embedding.timestep_embedder.linear_1.state_dict())
    nn.init.zeros_(embedding.guidance_embedder.linear_2.weight)
    nn.init.zeros_(embedding.guidance_embedder.linear_2.bias)
    return nn.Module.to(student, teacher.device, teacher.dtype)  # diffusers' own `to` warns of the dtype


@torch.no_grad()
def fit_dense_time(embedder: TimestepEmbedding, teacher: Any, points: int = 2001) -> None:
    """Sets the weights of `embedder`, which is given σ, so that its output equals the teacher's.

    The hidden units become steps along σ, evenly spaced and alternating in direction; then the second layer is a
    least-squares problem.
    """
    sigmas = torch.linspace(0, 1, points, dtype=torch.float64)
    times = sigmas * TRAIN_TIMESTEPS * teacher.config.timestep_scale
    # In float64 on the CPU, so that it comes out the same wherever and whenever: the inverse enlarges rounding errors.
    old = deepcopy(cast(Any, teacher.time_embed).emb.timestep_embedder).double().cpu()
    target = old(_sinusoids(times))  # [points, D]

    first, second = embedder.linear_1, embedder.linear_2
    units = len(first.weight)
    steepness = torch.full([units], units / 8.0)
    steepness[1::2] *= -1
    first.weight.zero_()
    first.weight[:, TIME_CHANNELS // 2] = steepness.to(first.weight)  # the sinusoid sin(σ)
    first.bias.copy_(-steepness * torch.linspace(0, 1, units).sin())
    new = deepcopy(embedder).double().cpu()
    hidden = new.act(new.linear_1(_sinusoids(sigmas)))
    hidden = torch.cat([hidden, torch.ones(points, 1, dtype=hidden.dtype)], dim=1)
    left, scale, right = torch.linalg.svd(hidden, full_matrices=False)
    ridge = RIDGE * scale[0]
    solution = right.T @ ((scale / (scale**2 + ridge**2))[:, None] * (left.T @ target))  # [units + 1, D]
    second.weight.copy_(solution[:-1].T)
    second.bias.copy_(solution[-1])


def _sinusoids(times: Tensor) -> Tensor:
    embedding = get_timestep_embedding(times, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedding.double()
