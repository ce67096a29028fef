"""The transformer that a SANA-Sprint training begins with, made of a Sana or SANA-1.5 (arXiv 2503.09641, section 3.2).

Three things differ. The guidance scale is an input; its embedding begins with zeros. The time is embedded densely: the
network is told σ in [0, 1] and not 1000 σ, at which the derivative by the time would be a thousand times larger; the
new embedding is fitted to the old one in closed form. Queries and keys are normed, as in SANA-1.5: without it the
paper saw gradients explode in large models. Norms that the teacher lacks begin with weights of 1 and must be learned.
"""

from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.training.objectives.flow_matching import TRAIN_TIMESTEPS


DENSE_SCALE = 1 / TRAIN_TIMESTEPS
TIME_CHANNELS = 256
RIDGE = 1e-3  # relative to the largest singular value: smooth between the points, weights of ordinary size


def make_student(teacher: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A transformer with a guidance embedding that predicts, at any guidance scale, what `teacher` does.

    Exactly that where the teacher has query and key norms and a dense embedding of the time, which the published
    teachers of SANA-Sprint have (`timestep_scale` 0.001); otherwise near to it.

    Raises:
        ValueError: the teacher has a guidance embedding already.
    """
    if teacher.config.guidance_embeds:
        raise ValueError(
            "`teacher` must be a Sana without guidance embedding, got `guidance_embeds=True`. Pass Sana or SANA-1.5."
        )
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    changes = {"guidance_embeds": True, "timestep_scale": DENSE_SCALE, "qk_norm": "rms_norm_across_heads"}
    student = SanaTransformer2DModel.from_config(config | changes)
    state = {name.replace("time_embed.emb.", "time_embed."): value for name, value in teacher.state_dict().items()}
    start = student.state_dict()
    added = [name for name in start if name not in state]
    student.load_state_dict(state | {name: start[name] for name in added})
    embedding = student.time_embed
    nn.init.zeros_(embedding.guidance_embedder.linear_2.weight)
    nn.init.zeros_(embedding.guidance_embedder.linear_2.bias)
    if teacher.config.timestep_scale != DENSE_SCALE:
        fit_dense_time(embedding.timestep_embedder, teacher)
    return student


@torch.no_grad()
def fit_dense_time(embedder: TimestepEmbedding, teacher: SanaTransformer2DModel, points: int = 2001) -> None:
    """Sets the weights of `embedder`, which is told σ, so that it gives what the teacher's makes of its time.

    The hidden units become steps along σ, evenly spaced and alternating in direction; then the second layer is a
    least-squares problem.
    """
    sigmas = torch.linspace(0, 1, points)
    times = sigmas * TRAIN_TIMESTEPS * teacher.config.timestep_scale
    device, dtype = embedder.linear_1.weight.device, embedder.linear_1.weight.dtype
    old = cast(Any, teacher.time_embed).emb.timestep_embedder
    target = old(_sinusoids(times).to(device, dtype)).double().cpu()  # [points, D]

    first, second = embedder.linear_1, embedder.linear_2
    units = len(first.weight)
    steepness = torch.full([units], units / 8.0)
    steepness[1::2] *= -1
    first.weight.zero_()
    first.weight[:, TIME_CHANNELS // 2] = steepness.to(first.weight)  # the sinusoid sin(σ)
    first.bias.copy_(-steepness * torch.linspace(0, 1, units).sin())
    hidden = embedder.act(first(_sinusoids(sigmas).to(device, dtype))).double().cpu()
    hidden = torch.cat([hidden, torch.ones(points, 1, dtype=hidden.dtype)], dim=1)
    left, scale, right = torch.linalg.svd(hidden, full_matrices=False)
    ridge = RIDGE * scale[0]
    solution = right.T @ ((scale / (scale**2 + ridge**2))[:, None] * (left.T @ target))  # [units + 1, D]
    second.weight.copy_(solution[:-1].T)
    second.bias.copy_(solution[-1])


def _sinusoids(times: Tensor) -> Tensor:
    return get_timestep_embedding(times, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
